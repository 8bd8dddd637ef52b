"""The parser of fit, validate, test and tune, whose --help has one line for each option."""

import argparse
import itertools
import os
import re
import shutil
import textwrap
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from project import arguments, files
from project.errors import UserError
from project.training import sections

NO_SETTINGS = "this is no YAML file of settings in UTF-8; configs/default.yaml is one."
GROUPS = ("", "data", "model")  # whose options --help lists; those of Lightning's Trainer are listed on request


class Parser(arguments.Parser, LightningArgumentParser):
    """Lightning's parser, with one sentence for a mistake.

    `--help` lists the options of this project, `--help trainer` those of a group; `--help OPTION` explains an option.
    """

    _words: tuple[str, ...] = ()

    def parse_args(self, args: Any = None, *more: Any, **options: Any) -> Any:
        self._words = tuple(word.split("=")[0] for word in args or ())  # argparse does not parse what follows --help
        try:
            values = super().parse_args(args and sections.named(args)[0], *more, **options)
        except UnicodeDecodeError as error:  # of a file that --model or another group is given
            given = [value for word in args or () if os.path.isfile(value := word.rpartition("=")[2])]  # noqa: PTH113
            raise UserError(f"{', '.join(given)}: {NO_SETTINGS}") from error
        for key, value in list(values.items()):
            if isinstance(value, str):
                name = re.sub(r"^(fit|validate|test)\.", "", key)
                if not name.startswith("trainer.") and name != "data.keep":  # a class of Lightning's may take ""
                    arguments.require_word(f"--{name}", value)
                values[key] = files.with_home(value)  # of a YAML file; on the command line it is done already
        return values

    def parse_path(self, path: Any, *more: Any, **options: Any) -> Any:
        try:
            return super().parse_path(path, *more, **options)
        except (UserError, UnicodeDecodeError) as error:
            is_unusable = re.search("Unexpected config|unacceptable character|codec can't decode", str(error))
            reason = NO_SETTINGS if is_unusable else str(error).replace('"<unicode string>", ', "")
            raise UserError(f"{path}: {reason}") from error

    def format_help(self, *formatter: Any) -> str:
        names = [(name, action) for action in arguments.actions(self) for name in action.option_strings]
        options = {name[2:]: action for name, action in names if name.startswith("--")}
        groups: dict[str, dict[str, argparse.Action]] = {}
        for name, action in options.items():
            if not name.endswith((".help", "+")):  # --trainer.strategy.help, --trainer.callbacks+
                groups.setdefault(name.rpartition(".")[0], {})[name] = action
        if not groups.keys() >= set(GROUPS):  # the help of a class, as by --trainer.strategy.help DDPStrategy
            return super().format_help(*formatter)
        pairs = itertools.pairwise(self._words)
        topic = next((word.removeprefix("--") for before, word in pairs if before in ("-h", "--help")), "")
        if topic and topic in groups:
            return _lines(groups[topic])
        if topic in options:
            blocks = re.split(r"\n(?=  -|\S)", super().format_help(*formatter))
            text = next(block for block in blocks if re.match(rf"  (-\w.*, )?--{re.escape(topic)}[\s,]", block))
            # not the hundreds of layers of torch
            return re.sub(r",\s*known\s+subclasses:.{2000,}\)", ")", text, flags=re.DOTALL) + "\n"
        if topic and not os.path.lexists(topic):  # rather than the images, or a run
            raise arguments.explain(f"unrecognized arguments: --{topic}", [f"--{name}" for name in options])
        verb = self.prog.split()[-1]
        usage = self.usage or f"python -m project.cli {verb} [{'DIR' if verb == 'fit' else 'RUN'}] [options]"
        groups[""] = {name: action for name, action in groups[""].items() if name not in groups}
        intro = f"usage: {usage}\n\n{textwrap.fill(str(self.description), 100)}\n"
        end = "--help OPTION explains an option in full; --help trainer lists the options of Lightning's Trainer.\n"
        return "\n".join([intro, *(_lines(groups[group]) for group in GROUPS), end])


def _lines(options: dict[str, argparse.Action]) -> str:
    """One line for each option, as wide as the terminal, 100 columns at most."""
    width, lines = max(map(len, options)) + 2, ""
    space = min(shutil.get_terminal_size((100, 24)).columns, 100) - width - 4
    for name, action in options.items():
        default = "" if action.default in (None, argparse.SUPPRESS) else f" [{action.default}]"
        text = textwrap.shorten(str(action.help or ""), max(space - len(default), 20), placeholder=" ...")
        lines += f"  --{name:{width}}{text}{default}\n"
    return lines
