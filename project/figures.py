"""Arrays become matplotlib figures; nothing here knows where they come from."""

import contextlib
import functools
import math
import textwrap
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps, font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font


def image_grid(images: npt.NDArray[np.uint8], titles: Sequence[str], columns: int = 8) -> Figure:
    """Pictures in rows, each under its title.

    Args:
        images: (N, H, W, 3) uint8, RGB.
        titles: N texts.
        columns: Pictures in a row.
    """
    rows = max(1, math.ceil(len(images) / columns))
    figure = Figure(figsize=(1.1 * columns, 1.35 * rows), layout="constrained")
    for place, axes in enumerate(np.ravel(figure.subplots(rows, columns, squeeze=False))):
        axes.set_axis_off()
        if place < len(images):
            axes.imshow(images[place])
            axes.set_title(titles[place][:12], fontsize=11, parse_math=False)
    return figure


def rate_finder(
    rates: npt.NDArray[np.floating[Any]], losses: npt.NDArray[np.floating[Any]], chosen: float | None
) -> Figure:
    """Loss over the learning rate, and the one that was chosen.

    Args:
        rates: (N,)
        losses: (N,)
        chosen: None where none could be.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses)
    axes.set_xscale("log")
    finite = losses[np.isfinite(losses)]
    if len(finite):
        axes.set_ylim(0, 2 * finite[0])
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss, smoothed")
    if chosen is not None:
        axes.axvline(chosen, color="tab:red", label=f"suggested: {chosen:.2g}")
        axes.legend()
    return figure


def overlay(image: npt.NDArray[np.uint8], heat: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint8]:
    """A picture in grey with heat in colour on it, the stronger the less of the picture shows through.

    Args:
        image: (H, W, 3) uint8, RGB.
        heat: (H, W), 0 to 1.

    Returns:
        (H, W, 3) uint8, RGB; grey alone where the heat is 0.
    """
    grey = image @ np.array([0.299, 0.587, 0.114])  # luma of ITU-R BT.601, as Pillow's mode L
    colour = colormaps["turbo"](0.3 + 0.7 * heat)[..., :3] * 255  # from green on: its blue end is dark like a shadow
    share = (0.75 * np.sqrt(heat))[..., None]
    mixed: npt.NDArray[np.uint8] = np.rint((1 - share) * grey[..., None] + share * colour).astype(np.uint8)
    return mixed


def explanations(
    images: npt.NDArray[np.uint8],
    heats: npt.NDArray[np.floating[Any]],
    titles: Sequence[str],
    captions: Sequence[str],
    columns: int = 1,
    side: float = 3.0,
) -> Figure:
    """Pairs in rows: each picture under its title, and beside it the same under its heat and a caption.

    Args:
        images: (N, H, W, 3) uint8, RGB.
        heats: (N, H, W), 0 to 1.
        titles: N texts.
        captions: N texts.
        columns: Pairs in a row.
        side: Of a picture, in inches.
    """
    rows = max(1, math.ceil(len(images) / columns))
    figure = Figure(figsize=(2 * side * columns, (side + 0.75) * rows), layout="constrained")
    places = figure.subplots(rows, 2 * columns, squeeze=False).reshape(-1, 2)
    size = 9 if side > 2 else 7
    width = round(11 * side)  # characters of that size in a line, at three quarters of their height each
    for axes in places.ravel():
        axes.set_axis_off()
    for (left, right), image, heat, title, caption in zip(places, images, heats, titles, captions, strict=False):
        for axes, pixels, text in ((left, image, title), (right, overlay(image, heat), caption)):
            axes.imshow(pixels)
            axes.set_title(fitted(text, width), fontsize=size, fontfamily=font_families(), parse_math=False)
    return figure


def filter_grid(filters: npt.NDArray[np.floating[Any]], most: int = 256) -> Figure:
    """A convolution's filters, each scaled by its largest weight; a weight of 0 is middle grey.

    Args:
        filters: (N, C, h, w); in colour where C is 3, else their mean over C in grey.
        most: How many are drawn at most.
    """
    shown = filters[:most] if filters.shape[1] == 3 else filters[:most].mean(axis=1, keepdims=True).repeat(3, axis=1)
    largest = np.abs(shown).max(axis=(1, 2, 3), keepdims=True)
    tiles = 0.5 + shown / np.where(largest == 0, 1, 2 * largest)  # (N, 3, h, w), 0 to 1
    count, _, height, width = tiles.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    gap = max(1, round(width / 8))
    canvas = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, 3))
    for number, tile in enumerate(tiles):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = tile.transpose(1, 2, 0)
    figure = Figure(figsize=(6, 6 * rows / columns + 0.4), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.imshow(canvas, interpolation="nearest")
    of = "" if count == len(filters) else f"the first {count} of "
    axes.set_title(f"first layer: {of}{len(filters)} filters, {height}x{width}", fontsize=9)
    return figure


# one letter of scripts that DejaVu Sans has not: Chinese (simplified and traditional), Japanese, Korean, Devanagari,
# Bengali, Gurmukhi, Gujarati, Odia, Tamil, Telugu, Kannada, Malayalam, Sinhala, Thai, Tibetan, Burmese, Khmer, Ethiopic
LETTERS = "们國中あ한अবਪગଓதతಕമසกལမកሀ"


def font_families() -> list[str]:
    """Names of installed fonts that together draw as many scripts as can be, for `fontfamily=` of any text.

    DejaVu Sans, which comes with matplotlib, is the first: Latin, Greek, Cyrillic, Armenian, Georgian, Hebrew, Arabic.
    A letter that it has not is drawn by the first of the others that has it; `drawable` replaces those that none has.
    """
    return [name for name, _ in _fonts()]


@functools.cache
def _fonts() -> tuple[tuple[str, FT2Font], ...]:
    chosen = {"DejaVu Sans": font_manager.get_font(font_manager.findfont("DejaVu Sans"))}
    others: dict[str, FT2Font] = {}
    for entry in font_manager.fontManager.ttflist:
        # Last Resort has a glyph for every letter, which shows its script's name instead of it
        if not entry.name.startswith("Last Resort") and (entry.style, entry.weight) == ("normal", 400):
            with contextlib.suppress(OSError, RuntimeError):  # a file that is gone, or has no outlines
                others.setdefault(entry.name, font_manager.get_font(entry.fname))
    drawn = {name: {letter for letter in LETTERS if _has(font, letter)} for name, font in others.items()}
    missing = {letter for letter in LETTERS if not _has(chosen["DejaVu Sans"], letter)}
    while best := max(drawn, key=lambda name: (len(drawn[name] & missing), name), default=None):
        if not drawn[best] & missing:
            break
        chosen[best] = others[best]
        missing -= drawn.pop(best)
    return tuple(chosen.items())


def _has(font: FT2Font, letter: str) -> bool:
    return font.get_char_index(ord(letter)) > 0


def drawable(text: str) -> str:
    r"""A text in which every letter that no font of `font_families` has is written as its number, like \u732b."""

    def drawn(letter: str) -> str:
        if letter.isspace() or unicodedata.category(letter) == "Cf":  # a line end; marks that show nothing themselves
            return " " * letter.isspace()
        if letter.isprintable() and any(_has(font, letter) for _, font in _fonts()):
            return letter
        return letter.encode("ascii", "backslashreplace").decode()

    return "".join(map(drawn, text))


def fitted(text: str, width: int, lines: int = 3) -> str:
    """A drawable text in a few lines, cut at its end; each line of the text is broken by itself.

    Args:
        text: Of any letters.
        width: Letters in a line; East Asian ones count twice.
        lines: At most, of each line of the text.
    """
    parts = []
    for part in map(drawable, text.split("\n")):
        wide = any(unicodedata.east_asian_width(letter) in "WF" for letter in part)
        parts.append(textwrap.fill(part, width // 2 if wide else width, max_lines=lines, placeholder="…"))
    return "\n".join(parts)
