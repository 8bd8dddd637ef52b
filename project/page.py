"""From figures, pictures and numbers to a page that needs nothing else."""

import base64
import io
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from project import figures, lettering
from project.data.images import Pixels

TEMPLATES = Path(__file__).with_name("templates")
NAMES = {"auroc": "AUROC", "f1": "F1", "brier": "Brier score", "ece": "calibration error"}
NONE = "-"
SHARES = ("accuracy", "precision", "recall")  # shown as percentages
# text stays text, which any system draws with its own fonts, and colours follow the reader's
STYLE: dict[Any, Any] = {  # matplotlib types the names of its settings
    "svg.fonttype": "none",
    "svg.hashsalt": "page",
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), figures.INK),
}
DARK = (
    "<style>@media screen and (prefers-color-scheme: dark) {"
    f'[style*="fill: {figures.INK}"] {{ fill: #e4e7ea !important }} '
    f'[style*="stroke: {figures.INK}"] {{ stroke: #e4e7ea !important }}'
    "}</style>"
)


def render(template: str, **content: Any) -> str:
    """Fills a template; every text in it is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(content)


def drawing(draw: Callable[[], Figure], alt: str, caption: str) -> dict[str, Any]:
    """A figure as the template wants it: SVG in a data address."""
    stream = io.StringIO()
    with mpl.rc_context(STYLE | {"font.family": lettering.font_families()}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's system will have it
        figure = draw()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"^.*?(<svg[^>]*>)", rf"\1{DARK}", stream.getvalue(), count=1, flags=re.DOTALL)
    width = round(figure.get_size_inches()[0] * 96)
    return {"source": _address("image/svg+xml", svg.encode()), "alt": alt, "caption": caption, "width": width}


def picture(image: Pixels) -> str:
    """The data address of a picture (H, W, 3) uint8, at most 224 pixels wide."""
    made, stream = Image.fromarray(np.asarray(image)), io.BytesIO()
    made.thumbnail((224, 224))
    made.save(stream, "JPEG", quality=85)
    return _address("image/jpeg", stream.getvalue())


def figure(name: str, value: float) -> str:
    """A figure as people read it."""
    if not math.isfinite(value):
        return NONE
    return f"{100 * value:.1f} %" if name in SHARES else f"{value:.3f}"


def interval(name: str, low: float, high: float) -> str:
    """An interval, likewise."""
    if not math.isfinite(low + high):
        return ""
    first = figure(name, low).removesuffix(" %")
    return f"{first} to {figure(name, high)}"


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
