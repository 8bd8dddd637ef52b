"""Errors that the command line prints in one sentence, and suggestions for mistyped words."""

import difflib
from collections.abc import Iterable


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
