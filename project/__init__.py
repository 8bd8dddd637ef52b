"""A PyTorch Lightning template for image classification.

``from project import load`` gives a trained classifier back from its checkpoint; nothing heavy is imported before that.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from project.inference.load import load

__all__ = ["load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":
        from project.inference.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
