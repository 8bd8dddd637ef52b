"""The verbs of the command line. Run `python -m project.cli --help`.

The Trainer's verbs go through LightningCLI (training/cli.py); each other verb is a typed function in a file of its own,
whose signature is its options and whose docstring is its help. Nothing heavy is imported before a verb needs it.
"""

import importlib
import importlib.util
import io
import os
import sys
import time

from project import files
from project.data import workers
from project.errors import FailedRun, UserError, did_you_mean

TRAINER_VERBS = {
    "fit": "train on a folder of images (by default the bundled digits)",
    "validate": "measure a checkpoint on its validation images",
    "test": "measure a checkpoint on its test images",
    "tune": "find a learning rate and a batch size for fit",
}
# verb: its function's module in project/commands/, and what it does
COMMANDS = {
    "predict": "label images with a checkpoint",
    "report": "write a page about what a checkpoint has learned",
    "explain": "explain predictions with heat maps",
    "export": "convert a checkpoint to ONNX and safetensors, verified, with a model card",
    "serve": "serve predictions over HTTP, with a web page",
    "models": "list the networks, their size and published accuracy",
    "check": "check a folder of images before training on it",
    "shard": "pack a folder of images into a few large files",
    "sweep": "search for good settings",
    "bench": "measure how fast this machine trains and reads images",
}
VERBS = TRAINER_VERBS | COMMANDS
MOVED_BENCHMARKS = ("predict", "accuracy", "bundle", "serve")


def main(argv: list[str] | None = None) -> int:
    """Runs the words after the program's name, by default the process's own; returns the exit code.

    0 success, 1 findings or a failed run, 2 the user's mistake, 130 Ctrl-C, 141 a closed pipe, 143 SIGTERM.
    """
    if argv is None:
        sys.path.append("")  # the current folder, where classes of one's own are found, also by the console script
    for stream in (sys.stdout, sys.stderr, sys.stdin):  # a file name may not be text in this locale
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "backslashreplace")
    try:
        code = _exit_code([files.with_home(word) for word in (sys.argv[1:] if argv is None else argv)])
        sys.stdout.flush()
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # the reader of the output has ended, as `| head` does after some lines
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when Python exits
            return 141  # as a shell reports a process that SIGPIPE has ended
        raise
    return code


def _exit_code(argv: list[str]) -> int:
    workers.limit_threads()
    try:
        return _run(argv)
    except UserError as error:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
            time.sleep(20)  # of a launcher's processes the first usually says the same, and the launcher ends this one
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (FailedRun, OSError) as error:
        if not (reason := error if isinstance(error, FailedRun) else workers.why_lost(error)):
            raise
        print(f"failed: {reason}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if importlib.util.find_spec("torch"):
            raise
        hint = "activate its environment, source .venv/bin/activate, or install it: pip install -e ."
        print(f"error: {sys.executable} does not have what this project needs ({error.name}); {hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except SystemExit as error:  # argparse after --help
        return error.code if isinstance(error.code, int) else 1


def _run(argv: list[str]) -> int:
    verb, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if verb in ("-h", "--help"):
        lines = [f"  {name:{max(map(len, VERBS))}}  {text}" for name, text in VERBS.items()]
        lines += ["", "  fit DIR      train on your own images: DIR/<class>/*.jpg"]
        lines += ["  VERB --help  the options of a verb"]
        print("usage: python -m project.cli VERB [options]", "", *lines, sep="\n")
        return 0
    if verb == "--version":
        print(f"lightning-image-template {importlib.import_module('project').__version__}")
        return 0
    if verb.startswith("-"):
        later = next((word for word in rest if word in VERBS), "fit")
        raise UserError(f"Options come after the verb: python -m project.cli {later} {verb} ...")
    if verb not in VERBS:
        raise UserError(f"There is no verb {verb}.{did_you_mean(verb, VERBS)} The verbs are {', '.join(VERBS)}.")
    from project import arguments

    if verb in TRAINER_VERBS:
        rest = arguments.named(rest, "--ckpt_path" if verb in ("validate", "test") else "--data.root")
        if any(word.startswith(("--data.root", "--config")) for word in rest):
            workers.start_server()  # it imports torch while this process imports Lightning
        from project.training import cli as trainer_cli

        if verb == "tune":
            from project.commands.tune import Tuning

            return trainer_cli.run("fit", rest, Tuning)
        from project.training.repeats import RepeatCli

        return trainer_cli.run(verb, rest, RepeatCli)
    if verb == "bench" and (moved := next((word for word in rest if word in MOVED_BENCHMARKS), None)):
        raise UserError(f"bench {moved} compares with other programs; in a checkout run: make bench ARGS={moved}")
    return arguments.call(getattr(importlib.import_module(f"project.commands.{verb}"), verb), verb, rest)


if __name__ == "__main__":
    sys.exit(main())
