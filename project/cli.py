"""The verbs. Run `python -m project.cli --help`.

The Trainer's verbs go through LightningCLI (training.py); each other verb is a typed function in a file of its own,
whose signature is its options and whose docstring is its help. Nothing heavy is imported before a verb needs it.
"""

import importlib
import io
import sys

from project.data import workers
from project.errors import FailedRun, UserError, did_you_mean

TRAINER_VERBS = {
    "fit": "train on a folder of pictures (the bundled digits, if none is given)",
    "validate": "measure a checkpoint on its validation pictures",
    "test": "measure a checkpoint on its test pictures",
    "tune": "find a learning rate and a batch size for fit",
}
# verb: its module in project/, which has a function of the verb's name, and what it does
COMMANDS = {
    "predict": ("predict", "label pictures with a checkpoint"),
    "report": ("report", "one page on what a checkpoint has learned"),
    "explain": ("explain", "draw over pictures where the network sees a class"),
    "export": ("export", "pack a checkpoint as ONNX and safetensors, checked, with a model card"),
    "serve": ("serve", "answer over HTTP what is on pictures, with a page for people"),
    "models": ("models.listing", "list the networks, their size and published accuracy"),
    "check": ("check", "look through a folder of pictures before training on it"),
    "bench": ("bench", "measure how fast this machine trains and reads, beside the usual ways"),
}
VERBS = TRAINER_VERBS | {verb: text for verb, (_, text) in COMMANDS.items()}


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
    except FailedRun as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
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

        if verb == "tune":
            from project.tune import Tuning

            return training.run("fit", rest, Tuning)
        return training.run(verb, rest)
    from project import usage

    module = importlib.import_module(f"project.{COMMANDS[verb][0]}")
    return usage.call(getattr(module, verb), verb, rest)


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
