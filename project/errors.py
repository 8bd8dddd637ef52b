"""Errors that the command line prints in one sentence, and what these sentences are made of."""

import difflib
import re
import shlex
import unicodedata
from collections.abc import Collection, Iterable

_LATIN = str.maketrans("авеікмнорѕтухјαικνορτυχ", "abeikmhopstyxjaikvoptux")  # by Cyrillic and Greek letters


class UserError(Exception):
    """A mistake of the user: what is wrong, the value, and the next step, in one sentence.

    The command line prints it without a traceback and exits with 2. Any other uncaught exception is a bug.
    """


class FailedRun(Exception):
    """The reason why a run failed, in one sentence; the command line prints it without a traceback and exits with 1."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The question "Did you mean ...?" after a space, if a known word is near; otherwise an empty string."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f" Did you mean {near[0]}?" if near else ""


def look_alike(ours: Iterable[str], theirs: Iterable[str]) -> str:
    """Sentences, each after a space, about names that differ in case, blanks or the code of a letter alone."""
    plain = {_plain(name): name for name in ours}
    pairs = [(plain[_plain(name)], name) for name in theirs if plain.get(_plain(name), name) != name]
    return "".join(f" {own!a} and {other!a} look alike." for own, other in pairs[:3])


def _plain(name: str) -> str:
    folded = unicodedata.normalize("NFKC", name).casefold().translate(_LATIN)
    return "".join(filter(str.isprintable, "".join(folded.split())))


def one_line(text: str) -> str:
    """Text with escapes for line breaks and other control characters."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: ascii(match[0])[1:-1], text)


def some(names: Collection[str], most: int = 10) -> str:
    """The names, separated by commas; of more than `most`, the first ones and how many follow."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(list(names)[:most]) + more


def command(*words: object) -> str:
    """A command line of this project, quoted for a shell."""
    return f"python -m project.cli {shlex.join(map(str, words))}"
