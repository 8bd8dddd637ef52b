"""A PyTorch Lightning template for image classification.

``from project import Classifier, ImageData, fit, load`` is the library, see docs/library.md; nothing heavy is imported
before one of them is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from project.inference.load import load
    from project.training.library import Classifier, ImageData, fit

__all__ = ["Classifier", "ImageData", "fit", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = "project.inference.load" if name == "load" else "project.training.library"
        return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
