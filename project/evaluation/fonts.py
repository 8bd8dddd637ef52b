"""Fonts for names in many scripts, and names that fit a figure."""

import textwrap
import unicodedata
import warnings

from matplotlib import font_manager

SCRIPTS = (
    "Devanagari Bengali Gurmukhi Gujarati Oriya Tamil Telugu Kannada Malayalam Sinhala Thai Khmer Myanmar Ethiopic"
)
OTHERS = [
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Droid Sans Fallback"),  # Linux
    *("Hiragino Sans GB", "Apple SD Gothic Neo", "Arial Unicode MS"),  # macOS
    *("Microsoft YaHei", "Malgun Gothic", "Nirmala UI"),  # Windows
    *(f"Noto Sans {script}" for script in SCRIPTS.split()),
]
# a letter that no installed font has is drawn as a box; a browser has other fonts for the text in an SVG
warnings.filterwarnings("ignore", "Glyph .* missing from font")


def families() -> list[str]:
    """Font families for `font.family`: matplotlib's own, then installed ones for the scripts that it lacks."""
    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in OTHERS if name in installed)]


def shortened(name: str, length: int) -> str:
    """The name as printable text, with its middle left out where it is longer."""
    keep = length - 1
    name = "".join(c if c.isprintable() or unicodedata.category(c) == "Cf" else "?" for c in name)
    return name if len(name) <= length else f"{name[: keep - keep // 2]}…{name[-(keep // 2) :]}"


def wrapped(text: str, width: int) -> str:
    """Breaks each line of a text into at most three lines of `width` letters, or of half as many East Asian ones."""
    lines = []
    for line in text.split("\n"):
        length = width // 2 if any(unicodedata.east_asian_width(letter) in "WF" for letter in line) else width
        lines += textwrap.wrap(shortened(line, 2 * length), length)  # two full lines never make more than three
    return "\n".join(lines)
