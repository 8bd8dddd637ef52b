"""Parts that a class path names, {"class_path": "nets.Tiny", "init_args": {"width": 8}}, and who may name which.

What the user types is trusted. Whoever writes a checkpoint, a bundle or a run's config.yaml must not choose what code
runs: it may name networks, optimizers, schedules, metrics and transforms of well-known libraries and of this package.
"""

import importlib
import inspect
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from project.arguments import Parser
from project.errors import UserError, did_you_mean, some

PACKAGE = __name__.partition(".")[0]
LIBRARIES = ("torch", "torchvision", "torchmetrics", "timm", PACKAGE)
SECTIONS = ("data", "model", "trainer")  # of the options
# Options that name classes; of the Trainer's, too.
PARTS = {"network", "transforms", "loss", "metrics", "optimizer", "scheduler"}
PARTS |= {"callbacks", "logger", "plugins", "profiler", "strategy", "accelerator", "class_path", "init_args"}
# Types of which a parser makes text and numbers only.
PLAIN = {"str", "int", "float", "bool", "None", "NoneType", "Path", "pathlib", "Literal", "Optional", "Union", "typing"}


def part(entry: Any) -> dict[str, Any]:
    """A part in full, given as its class path alone or with its arguments."""
    entry = {"class_path": entry} if isinstance(entry, str) else entry
    return {"class_path": "", "init_args": {}, **entry}


def is_part(entry: Any) -> bool:
    """Whether an entry of a file has the form of a part."""
    if not isinstance(entry, dict) or not isinstance(entry.get("class_path"), str):
        return False
    return all(isinstance(entry.get(key, {}), dict) for key in ("init_args", "dict_kwargs"))


def make(entry: Any, option: str, **given: Any) -> Any:
    """Makes a part; of the `given` arguments it gets those that it takes.

    Args:
        entry: A class path, or that with arguments as jsonargparse writes them.
        option: The part's name on the command line, for errors.
        given: Arguments that the configuration does not have.

    Raises:
        UserError: There is no such class, or it refuses its arguments.
    """
    entry = part(entry)
    made, taken = find(path := entry["class_path"], option), takes(entry, option)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        given = {name: value for name, value in given.items() if name in taken}
    parser = Parser()
    add = parser.add_class_arguments if inspect.isclass(made) else parser.add_function_arguments
    add(made, option, skip=set(given), fail_untyped=False)
    parsed = parser.parse_object({option: entry["init_args"]})
    in_full = {*re.findall(r"[\w.]+", repr(entry))}
    if short := [path for path in named(parsed.as_dict()) if path not in in_full and not _is_known(path)]:
        raise UserError(f"--{option} {path}: give {some(short)} in full.")  # the parser finds what is imported
    arguments = vars(parser.instantiate_classes(parsed, instantiate_groups=False).get(option, parsed))
    try:
        return made(**given, **arguments, **entry.get("dict_kwargs", {}))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"--{option} {path} refuses its arguments: {' '.join(str(error).split())}") from error


def takes(entry: Any, option: str) -> Mapping[str, inspect.Parameter]:
    """The parameters of a part, by name."""
    return inspect.signature(find(part(entry)["class_path"], option)).parameters


def taken(entry: Any, option: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given arguments that a part's own signature names; what its **kwargs may be is not known."""
    return {name: value for name, value in given.items() if name in takes(entry, option)}


def find(path: str, option: str) -> Any:
    """The class or function of a class path; raises a UserError where there is none."""
    module, _, name = path.rpartition(".")
    try:
        names = vars(importlib.import_module(module or "builtins"))
    except ModuleNotFoundError as error:
        raise UserError(f"--{option} {path}: there is no module {error.name}.") from error
    except ImportError as error:
        raise UserError(f"--{option} {path} cannot be imported: {error}.") from error
    if module and callable(names.get(name)):
        return names[name]
    near = did_you_mean(name, [name for name, value in names.items() if callable(value)])
    raise UserError(f"--{option} {path}: there is no such class; give package.module.Class.{near}")


def named(tree: Any) -> Iterator[str]:
    """The class paths in a configuration."""
    if isinstance(tree, Mapping):
        yield from (value for key, value in tree.items() if key == "class_path")
    for value in tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list) else ():
        yield from named(value)


def trust_words(entry: Any) -> list[str]:
    """The words with which a command line allows the class paths in a configuration that need it."""
    return [word for path in named(entry) if not _is_known(path) for word in ("--trust", path)]


def require_trusted_options(config: Any, trust: Collection[str], source: object) -> None:
    """Raises UserError where options of a file name code that is not trusted, as `require_trusted` says.

    Other options are plain. A parser would read more files for `config`, and for a section that is no mapping, and
    takes keys with dots for those of a section.
    """
    sections: list[Any] = [config]
    if isinstance(config, Mapping):
        sections += [config.get(name) for name in SECTIONS]
    found = list[str]()
    for options in sections:
        names = [str(name) for name in options] if isinstance(options, Mapping) else ["config"]
        if not all(re.fullmatch(r"(?!config$)[a-z]\w*", name) for name in names):
            raise UserError(f"{source} does not have the form of a run's options.")
        for name in options:
            if name in PARTS:
                found += _untrusted(options[name], trust, name == "class_path")
    _require_none(found, source)


def require_trusted_arguments(made: type, given: Mapping[str, Any], trust: Collection[str], source: object) -> None:
    """Raises UserError where a file's arguments for parameters that are not of plain types name code, as above."""
    signatures = [inspect.signature(vars(kind).get("__init__", made)) for kind in made.__mro__]
    for name, value in given.items():
        found = [each.parameters[name].annotation for each in signatures if name in each.parameters]
        text = inspect.formatannotation(found[0] if found else Any).strip("'\"")
        if not {*re.findall(r"\w+", re.sub(r"\bLiteral\[[^]]*\]|\b(list|tuple)\[", "", text))} <= PLAIN:
            require_trusted(value, trust, source)


def require_trusted(entry: Any, trust: Collection[str], source: object) -> None:
    """Raises UserError where a part of a file names code that is neither trusted nor a part of a well-known library."""
    _require_none(_untrusted(entry, trust), source)


def require_trusted_names(options: Any, trust: Collection[str], source: object) -> None:
    """Raises UserError where a parser has found, for a word in a file, a class that neither is trusted nor may be."""
    _require_none((path for path in named(options) if path not in trust and not _is_known(path)), source)


def require_trusted_hyperparameters(
    content: Mapping[str, Any], section: str, trust: Collection[str], source: object
) -> None:
    """Raises UserError where the arguments that Lightning takes from a checkpoint name code, as above."""
    prefix = {"model": "", "data": "datamodule_"}[section]
    other = {"hparams", "module_arguments", f"{prefix}hparams_type"} & content.keys()  # where it looks, too
    if other or content.get(f"{prefix}hparams_name") not in (None, "kwargs"):
        raise UserError(f"{source} does not have the form of this project's checkpoints.")
    given = content.get(f"{prefix}hyper_parameters", {})
    require_trusted_options({name: given if name == section else {} for name in SECTIONS}, trust, source)


def _untrusted(entry: Any, trust: Collection[str], is_path: bool = False) -> Iterator[str]:
    """What a part of a file names and must not, without trust.

    A parser imports what a string names wherever a class or a function is expected, and reads the file or the YAML that
    it is: so only plain words pass.
    """
    if isinstance(entry, Mapping | list | tuple):
        for key, value in entry.items() if isinstance(entry, Mapping) else enumerate(entry):
            yield from _untrusted(value, trust, str(key).rpartition(".")[2] == "class_path")
    elif not isinstance(entry, str):
        if not isinstance(entry, int | float | None):
            yield f"a {type(entry).__name__}"  # which no configuration file holds
    elif entry not in trust:
        is_file = os.path.isfile(entry)  # noqa: PTH113 (Path's raises where a text is long)
        is_word = re.fullmatch(r"[\w +-]*|[\d:.]*", entry) and not is_path
        if is_file or not (is_word or _is_known(entry)):
            yield entry


def _require_none(untrusted: Iterable[str], source: object) -> None:
    if names := list(dict.fromkeys(untrusted)):
        trust = " ".join(f"--trust {name}" for name in names)
        raise UserError(
            f"{source} names {', '.join(names)}; a file may name networks, optimizers, schedules, metrics and "
            f"transforms of {some(LIBRARIES)} only. If you trust whoever wrote it, add {trust}."
        )


def _is_known(path: object) -> bool:
    """Whether a class path names a part of a well-known library; imports nothing else."""
    if not isinstance(path, str) or path.partition(".")[0] not in LIBRARIES or re.search(r"\b_|[^\w.]", path):
        return False  # project.__main__ would run
    import torchvision
    from torch import nn, optim
    from torchmetrics import Metric
    from torchvision.transforms import v2

    try:
        found = find(path, "")
    except UserError:
        return False
    if inspect.isclass(found):
        kinds = (nn.Module, optim.Optimizer, optim.lr_scheduler.LRScheduler, Metric, v2.Transform)
        is_own = found.__module__.partition(".")[0] in LIBRARIES
        is_part = issubclass(found, kinds) and found.__module__ != f"{PACKAGE}.classifier"
        return is_own and is_part and not inspect.isabstract(found)
    name = path.rpartition(".")[2]
    if path.startswith("timm."):
        import timm

        return timm.is_model(name) and timm.model_entrypoint(name) is found
    return name in torchvision.models.list_models() and torchvision.models.get_model_builder(name) is found
