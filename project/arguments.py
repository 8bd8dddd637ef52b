"""How the words of a command line become the arguments of a function, and mistakes in them one sentence."""

import argparse
import inspect
import itertools
import pkgutil
import re
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any, NoReturn, get_args, get_origin

import docstring_parser
import jsonargparse

from project.errors import UserError, did_you_mean

# of options, by their names in other programs
OTHER_NAMES = {"learning_rate": "lr", "wd": "weight_decay", "gpus": "devices", "seed": "seed_everything"}
OTHER_NAMES |= {"epoch": "max_epochs", "pretrained": "weights", "device": "accelerator", "bs": "batch_size"}
OTHER_NAMES |= dict.fromkeys(("imgsz", "img_size", "size"), "image_size")

CLASS = r"<class '([\w.]*?)(\w+)'>"  # as Python writes a class


class Parser(jsonargparse.ArgumentParser):
    """Raises a UserError of one sentence where argparse would print its usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise explain(message, [option for action in actions(self) for option in action.option_strings]) from ex


def actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments of a parser and of its subcommands, which argparse lists under a private name only."""
    found: list[argparse.Action] = []
    for action in parser._actions:
        subcommands = action.choices.values() if isinstance(action.choices, dict) else ()
        found += [action, *(inner for subcommand in subcommands for inner in actions(subcommand))]
    return found


def call(function: Callable[..., int | None], verb: str, argv: list[str]) -> int:
    """Runs a verb: the signature is its options, the docstring its help.

    A parameter without a default, or a positional-only one, is a word of the command line, a list is one or more words,
    *NAME any number; the others are options. An option whose type is a tuple may be repeated. A bool is a flag, with
    --no-NAME where it is on by default. Dashes may replace underscores: --batch-size is --batch_size.
    """
    document = docstring_parser.parse(function.__doc__ or "")
    parser = Parser(prog=f"python -m project.cli {verb}", description=document.description, allow_abbrev=False)
    helps = {parameter.arg_name: parameter.description for parameter in document.params}
    signature = inspect.signature(function, eval_str=True)
    words = {p.name for p in signature.parameters.values() if p.default is p.empty or p.kind is p.POSITIONAL_ONLY}
    for name, parameter in signature.parameters.items():
        kind, options = parameter.annotation, dict[str, Any](help=helps.get(name))
        if parameter.default is not parameter.empty:
            options |= {"default": parameter.default} | ({"nargs": "?"} if name in words else {})
        elif parameter.kind is parameter.VAR_POSITIONAL:
            options |= {"default": [], "nargs": "*"}
        if kind is bool and name not in words:
            options["action"] = argparse.BooleanOptionalAction if parameter.default else "store_true"
        elif get_origin(kind) is tuple:
            options |= {"action": "append", "default": list(parameter.default)}
        elif lists := [one for one in (kind, *get_args(kind)) if get_origin(one) is list]:
            options |= {"type": get_args(lists[0])[0], "nargs": "+"}
        else:
            options["type"] = kind
        parser.add_argument(name if name in words else f"--{name}", **options)
    spellings = {option.replace("_", "-"): option for action in actions(parser) for option in action.option_strings}
    split = [word.partition("=") for word in argv]
    values = parser.parse_args(["".join((spellings.get(name, name), *value)) for name, *value in split]).as_dict()
    for name, value in values.items():  # some libraries refuse a PositiveInt, a subclass of int
        if value != signature.parameters[name].default:
            require_word(name if name in words else f"--{name}", value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            values[name] = int(value) if isinstance(value, int) else float(value)
    bound = signature.bind_partial()
    bound.arguments |= values
    return function(*bound.args, **bound.kwargs) or 0


def require_word(name: str, value: object) -> None:
    """Raises UserError where an empty word is given, as by a shell's variable that is not set."""
    if value == "" or (isinstance(value, list) and "" in value):
        raise UserError(f"An empty word is given for {name}; a dot means the current folder.")


def named(argv: list[str], option: str) -> list[str]:
    """The words of a command line without --, with `option` before the one of no option; UserError if it is there."""
    words = []
    for before, word in itertools.pairwise(["", *argv]):
        belongs = before != "--" and (word.startswith("-") or re.match("--?(?!print_)[a-z][^=]*$", before))
        words.append(word if belongs else f"{option}={word}")
    if words != argv and sum(word.partition("=")[0] == option for word in words) > 1:
        raise UserError(f"{option} takes one value, with or without its name; leave the others out.")
    return [word for word in words if word != "--"]


def explain(message: str, options: Collection[str]) -> UserError:
    """A parser's message as one sentence."""
    unknown = re.match(r"unrecognized arguments: (-[^\s=]+)|Subcommand '\w+' does not accept option '(.+)'", message)
    if unknown:
        option = unknown[1] or f"--{unknown[2]}"
        known = [name for name in options if re.fullmatch(r"--(?!(data|model|trainer)$|.*(help|\+)$).+", name)]
        word = re.sub("^(n|nb|num)_(train_)?", "", option.strip("-").rpartition(".")[2].replace("-", "_"))
        word = re.escape(OTHER_NAMES.get(word, word))
        forms = (rf"[-.]{word}$", rf"[-._]{word}(_|$)")  # in another group, or a part of the name
        same = (name for form in forms for name in known if re.search(form, name))
        return UserError(f"There is no option {option}.{did_you_mean(next(same, option), known)} See --help.")
    if missing := re.match(r"argument (-\S+): expected one argument", message):
        return UserError(f"{missing[1]} needs a value, after it or after =; see --help.")
    if flag := re.search(r"argument (-\S+): ignored explicit|arguments: (true|false)$", message, re.IGNORECASE):
        return UserError(f"{flag[1] or 'A flag'} is given without a value; leave {flag[2] or 'it'} out.")
    if re.search("required: .*images$", message):
        return UserError("A run and images are needed, in this order; type a run first, as in: runs/latest photos/")
    if inner := re.match(r"Option '(?:init_args\.)?(.+)' is not accepted", message):  # of a class
        near = did_you_mean(inner[1], [option.strip("-") for option in options if not option.endswith("help")])
        return UserError(f"it takes no {inner[1]}.{near}")
    message = re.sub(r'^Parser key "([^"]+)"', r"--\1", message).replace("NoneType", "null")
    if group := re.match(r"--(data|model|trainer):\s+Unable to load config '(.*?)'", message):
        return UserError(f"--{group[1]} takes a YAML file, not {group[2]}; one setting is --data.root or --model.name.")
    if sentence := _class_error(message):
        return UserError(sentence)
    message = re.sub(CLASS, r"\2", message)
    message = re.sub(r"typing\.Literal\['?(.*?)'?\]", r"\1", message).replace("', '", " or ")
    value = re.search(r"(?:Got|Given) value: (.*)|: (.+) does not conform to|(?:literal|convert) .+: '(.*)'", message)
    if value is None:
        return UserError(" ".join(message.split()))
    types = re.findall(r"(?:Expected an?|Not of type) (.+?)(?:[.:]|$)", message, re.MULTILINE)
    expected = f"takes {' or '.join(types)}"
    if limits := re.search(r"does not conform to restriction (.+)", message):
        expected = f"must be {limits[1]}"
        for sign, words in {"v>=": "at least ", "v<=": "at most ", "v>": "above ", "v<": "below "}.items():
            expected = expected.replace(sign, words)
    return UserError(f"{message.partition(':')[0]} is {value[value.lastindex or 0]}; it {expected}.")


def _class_error(message: str) -> str:
    """What is wrong with the class that an option names; empty where the message is about something else."""
    # of a metric, which is a function of num_classes to the parser
    form = r"Type .+ expects a function or a callable class:(.+?)(\.* Got value: .+)?$"
    message = re.sub(form, r"Problem with given class_path '-':\1", message, flags=re.MULTILINE)
    if not re.search("class_path|subclass of|dot import path|NestedArg|{'init_args'", message):
        return ""
    words = re.findall(r"[\w-]+", "".join(re.findall(r"Expected a typing\.Literal\[(.*?)\]", message)))
    classes, message = re.findall(CLASS, message), re.sub(CLASS, r"\2", message)
    # of the errors, one for each type that the option takes, those about the class
    errors = message.partition("Errors:")[2] or message
    found = re.findall(r"^ +- (?!Expected an? (?!dot)|Not |an? (?:class|dict) )(.+(?:\n {6}.+)?)", errors, re.MULTILINE)
    error = re.sub(r"Problem with given class_path '.+':\s*", "", found[0] if found else "no class path is given")
    name = re.search(r"class_path(?:=|': | )'([\w.]+)'|Given value: ([\w.]+)$", message)
    path = str(name[name.lastindex or 0]) if name else ""
    if error.startswith("Expected a dot import path"):
        takes = f"it takes {' or '.join(words)}, or" if words else "there is no such class; give"
        error = f"{takes} package.module.Class.{did_you_mean(path, [*words, *_subclasses(classes)])}"
    elif absent := re.match(r"module '(.+)' has no attribute '(.+)'", error):
        members = [name for name, value in vars(sys.modules[absent[1]]).items() if callable(value)]
        error = f"{absent[1]} has no {absent[2]}.{did_you_mean(absent[2], members)}"
    elif absent := re.match(r"No module named '(.+)'", error):
        error = f"there is no module {absent[1]}.{did_you_mean(absent[1], [m.name for m in pkgutil.iter_modules()])}"
    for old, new in (
        (r"^--(\w+ is )", r"\1"),
        (r"the following arguments are required:", "it needs"),
        (r"it takes no (?:max_)?(lr|weight_decay)\..*", r"--model.\1 sets its \1."),
        (r".*not correspond to a subclass of (\w+)", r"it is no \1, nor a function annotated -> \1"),
    ):
        error = re.sub(old, new, error)
    option = re.match(r"--[\w.]+", message)
    subject = " ".join(filter(None, (option and option[0], path)))
    return f"{subject} cannot be used: {' '.join(error.split())}"


def _subclasses(classes: Collection[tuple[str, str]]) -> Iterator[str]:
    """The names of the classes, each given by module and name, and of those below them, as far as imported."""
    kinds = [getattr(sys.modules.get(module.strip(".")), name, None) for module, name in classes]
    for kind in kinds:
        kinds += type.__subclasses__(kind) if isinstance(kind, type) else []
        yield getattr(kind, "__name__", "")
