"""Self-contained HTML pages: templates, and figures and images as data addresses."""

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from PIL import Image

from project.data.images import Pixels
from project.evaluation.figures import INK, STYLE

# text stays text, which any browser draws with its own fonts, and colours follow the reader's scheme
SVG = STYLE | {"svg.fonttype": "none", "svg.hashsalt": "page"}
DARK = (
    "<style>@media screen and (prefers-color-scheme: dark) {"
    f'[style*="fill: {INK}"] {{ fill: #e4e7ea !important }} '
    f'[style*="stroke: {INK}"] {{ stroke: #e4e7ea !important }}'
    "}</style>"
)


def render(template: Path, **content: Any) -> str:
    """Fills a template; every text in it is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template.read_text(encoding="utf-8")).render(content)


def drawing(draw: Callable[..., Figure], *args: Any) -> dict[str, Any]:
    """The figure that `draw` makes of its arguments: source, an SVG in a data address, and width in pixels."""
    stream = io.StringIO()
    with mpl.rc_context(SVG):
        figure = draw(*args)
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"^.*?(<svg[^>]*>)", rf"\1{DARK}", stream.getvalue(), count=1, flags=re.DOTALL)
    return {"source": _address("image/svg+xml", svg.encode()), "width": round(figure.get_size_inches()[0] * 96)}


def image(pixels: Pixels) -> str:
    """The data address of an image (H, W, 3) uint8, at most 224 pixels wide and high."""
    thumbnail, stream = Image.fromarray(pixels), io.BytesIO()
    thumbnail.thumbnail((224, 224))
    thumbnail.save(stream, "JPEG", quality=85)
    return _address("image/jpeg", stream.getvalue())


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
