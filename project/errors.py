"""UserError, a mistake of the user's told in one sentence, and the question that often follows it."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What is wrong, the value, and the next step, in one sentence.

    The command line prints it without a traceback and exits with 2. Anything else that escapes is a bug of ours.
    """


class FailedRun(Exception):
    """Why a run cannot go on, in one sentence; the command line prints it without a traceback and exits with 1."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question that starts with a space where a known word is near, else nothing."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f" Did you mean {near[0]}?" if near else ""
