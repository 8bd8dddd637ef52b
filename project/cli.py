"""The verbs. Run `python -m project.cli --help`.

The Trainer's verbs go through LightningCLI (training.py); each other verb is a typed function in a file of its own,
whose signature is its options and whose docstring is its help. Nothing heavy is imported before a verb needs it.
"""

import importlib
import io
import sys

from project.data import workers
from project.errors import UserError, did_you_mean

TRAINER_VERBS = {
    "fit": "train on a folder of pictures (the bundled digits, if none is given)",
    "validate": "measure a checkpoint on its validation pictures",
    "test": "measure a checkpoint on its test pictures",
}
# verb: what it does; the verb is a function of the same name in the module of the same name
COMMANDS = {
    "predict": "label pictures with a checkpoint",
    "check": "look through a folder of pictures before training on it",
    "bench": "measure how fast pictures are read, beside the usual ways",
}
VERBS = TRAINER_VERBS | COMMANDS


def main(argv: list[str] | None = None) -> int:
    """Runs one command line.

    Args:
        argv: The words after the program's name; by default the process's own.

    Returns:
        The exit code: 0 fine, 1 findings or a failed run, 2 the user's mistake, 130 Ctrl-C, 143 SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr, sys.stdin):  # a file's name may be no text in this locale
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "backslashreplace")
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except SystemExit as error:  # argparse after --help
        return error.code if isinstance(error.code, int) else 1


def _run(argv: list[str]) -> int:
    verb, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if verb in ("-h", "--help"):
        print(_help())
        return 0
    if verb.startswith("-"):
        later = next((word for word in rest if word in VERBS), "fit")
        raise UserError(f"Options come after the verb: python -m project.cli {later} {verb} ...")
    if verb not in VERBS:
        raise UserError(f"There is no verb {verb}.{did_you_mean(verb, VERBS)} The verbs are {', '.join(VERBS)}.")
    if verb in TRAINER_VERBS:
        if any(word.startswith(("--data.root", "--config")) for word in rest):
            workers.start_server()  # it imports torch while this process imports Lightning
        from project import training

        return training.run(verb, rest)
    from project import usage

    return usage.call(getattr(importlib.import_module(f"project.{verb}"), verb), verb, rest)


def _help() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:{width}}  {text}" for verb, text in VERBS.items()]
    return "\n".join(
        [
            "usage: python -m project.cli VERB [options]",
            "",
            *lines,
            "",
            "  fit --data.root DIR          train on your own pictures: DIR/<class>/*.jpg",
            "  VERB --help                  all options of a verb",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
