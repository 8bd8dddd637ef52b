"""The sections data and model of the options: of ImageData and Classifier, or of a class of one's own by class_path."""

import argparse
import inspect
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser

from project import arguments, files, parts
from project.classifier import Classifier
from project.data.datamodule import ImageData
from project.data.own import OwnData
from project.errors import UserError, some
from project.models import weights

FROM_DATA = ("class_names", "image_size", "class_weights")  # arguments of the model
SECTIONS = {"data": ImageData, "model": Classifier}
Paths = Mapping[str, str]  # the class path of each section that has one


def named(argv: Sequence[str]) -> tuple[list[str], dict[str, str], set[str]]:
    """A command line, and its files, with the init_args of data and model as options; their class paths; --trust."""
    words, paths, trust = list[str](), dict[str, str](), set[str]()
    for before, word in zip(["", *argv], argv, strict=False):
        option, mark, value = word.partition("=") if word.startswith("-") else ("", "", word)
        if (name := option if mark else before) in ("-c", "--config"):
            value = _flat(files.shipped(value), paths)
        elif name in ("--data.class_path", "--model.class_path"):
            paths[name[2:].partition(".")[0]] = value
        elif name == "--trust":  # one in a file does not count
            trust.add(value)
        words.append(re.sub(r"^--(data|model)\.init_args\.", r"--\1.", option) + mark + value)
    return words, paths, trust


def _flat(config: str, paths: dict[str, str]) -> str:
    try:
        is_file = os.path.isfile(config)  # noqa: PTH113 (Path's raises where a text is long)
        options = yaml.safe_load(Path(config).read_text(encoding="utf-8") if is_file else config)
    except (OSError, ValueError, yaml.YAMLError):  # the parser says what is wrong
        return config
    found = [name for name in SECTIONS if isinstance(options, dict) and parts.is_part(options.get(name))]
    for name in found:
        paths[name] = options[name]["class_path"]
        options[name] |= options[name].pop("init_args", {})
    return json.dumps(options, default=str) if found else config


def add(parser: LightningArgumentParser, paths: Paths) -> None:
    """Adds the options of model and data, without what they are given when they are made, and --trust."""
    given = {*FROM_DATA, "network.init_args.num_classes"}
    given |= {f"optimizer.init_args.{name}" for name in ("params", "lr", "weight_decay")}
    given |= {f"scheduler.init_args.{name}" for name in ("optimizer", "max_lr", "last_epoch")}
    given |= {f"loss.init_args.{name}" for name in ("weight", "label_smoothing", "reduction")}
    skipped = {"model": given, "data": set() if is_foreign(paths) else {"seed"}}
    for name, skip in skipped.items():
        parser.add_class_arguments(kind(name, paths), name, skip=skip, fail_untyped=False, sub_configs=True)
        if name in paths:
            parser.add_argument(f"--{name}.class_path", default=paths[name], help="Class of one's own.")
        needed = {f"--{name}.{option}" for option in inspect.signature(SECTIONS[name]).parameters if option not in skip}
        if (missing := sorted(needed - known(parser))) and not (name == "data" and is_foreign(paths)):
            raise UserError(f"--{name}.class_path {paths[name]} takes no {some(missing)}; let it take **options.")
    text = "Class path that a checkpoint or a run may name; repeatable."
    parser.add_argument("--trust", action="append", metavar="CLASS", default=argparse.SUPPRESS, help=text)


def kind(section: str, paths: Paths) -> type[Any]:
    """The class of a section; UserError where there is none, or it is of another kind."""
    base = {"data": LightningDataModule, "model": Classifier}[section]
    found = parts.find(paths[section], f"{section}.class_path") if section in paths else SECTIONS[section]
    if not (inspect.isclass(found) and issubclass(found, base)):
        what = f"{base.__name__}, on which the other verbs rely; make it a subclass"
        raise UserError(f"--{section}.class_path {paths[section]} is no {what}.")
    return found


def is_foreign(paths: Paths) -> bool:
    """Whether the data is no ImageData."""
    return not issubclass(kind("data", paths), ImageData)


def known(parser: Any) -> set[str]:
    """The options of a parser."""
    return {option for action in arguments.actions(parser) for option in action.option_strings}


def plain(parser: LightningArgumentParser, config: Any, verb: str) -> dict[str, Any]:
    """The verb's options as plain types, with the resize that `weights` stands for."""
    options = config[verb]
    if options.data.get("resize") == "weights":
        options.data.resize = weights.resize(options.model.name, options.model.weights)
    dumped = dict(yaml.safe_load(parser.dump(config, skip_none=False))[verb]) | {"resume": None}
    return {name: value for name, value in dumped.items() if name != "trust"}


def make(parser: Any, config: Any, paths: Paths) -> tuple[Any, ImageData, Classifier]:
    """The parser's objects, the data and the model of a verb; UserError as `kind`, and where OwnData is refused."""
    config, verb = config.clone(), config.subcommand
    options = plain(parser, config, verb)
    for section in ["model", "data"][: 1 if is_foreign(paths) else 2]:
        del config[verb][section]  # they make their parts themselves
    made = parser.instantiate_classes(config, instantiate_groups=False)
    options["data"] |= vars(made[verb])["data"].as_dict() if is_foreign(paths) else {}
    data, model = ({key: options[name][key] for key in options[name] if key != "class_path"} for name in SECTIONS)
    own, seed = kind("data", paths)(**data), options["seed_everything"]
    if is_foreign(paths):
        own = OwnData(own, paths["data"], verb, seed)
    else:
        own.seed = seed
    return made, own, kind("model", paths)(**model, **{name: getattr(own, name) for name in FROM_DATA})
