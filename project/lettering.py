"""Names in figures: fonts for any script, and texts that fit."""

import contextlib
import functools
import textwrap
import unicodedata

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

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
        return letter.encode("unicode_escape").decode()

    return "".join(map(drawn, text))


def fitted(text: str, width: int, lines: int = 3) -> str:
    """A drawable text in a few lines; each line of the text is broken by itself, and loses its middle if it is long.

    Args:
        text: Of any letters.
        width: Letters in a line; where there are East Asian ones, half as many.
        lines: At most, of each line of the text.
    """
    parts = []
    for part in map(drawable, text.split("\n")):
        wide = any(unicodedata.east_asian_width(letter) in "WF" for letter in part)
        room = width // 2 if wide else width
        kept, broken = lines * room // 2, textwrap.wrap(part, room)
        while len(broken) > lines:  # a path and a name are known by their ends
            broken = textwrap.wrap(f"{part[: kept - 1]}…{part[-kept:]}", room)
            kept -= 1
        parts += broken
    return "\n".join(parts)


def shortened(name: str, length: int) -> str:
    """The name, with its middle left out where it is longer than that."""
    keep = length - 1
    return name if len(name) <= length else f"{name[: keep - keep // 2]}…{name[-(keep // 2) :]}"
