"""How the words of a command line become the arguments of a function, and mistakes in them one sentence."""

import argparse
import inspect
import re
from collections.abc import Callable, Collection
from typing import Any, NoReturn

import docstring_parser
import jsonargparse

from project.errors import UserError, did_you_mean


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


def call(function: Callable[..., int], verb: str, argv: list[str]) -> int:
    """Runs a verb: the signature is its options, the docstring its help.

    A positional-only parameter is a word of the command line, `list[str]` one or more words; the others are options, of
    which a bool takes no value. Dashes may replace underscores: --batch-size is --batch_size.
    """
    document = docstring_parser.parse(function.__doc__ or "")
    parser = Parser(prog=f"python -m project.cli {verb}", description=document.description, allow_abbrev=False)
    helps = {parameter.arg_name: parameter.description for parameter in document.params}
    parameters = inspect.signature(function, eval_str=True).parameters
    words = [name for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_ONLY]
    for name, parameter in parameters.items():
        options: dict[str, Any] = {"help": helps[name], "type": parameter.annotation}
        if parameter.default is not parameter.empty:
            options |= {"default": parameter.default} | ({"nargs": "?"} if name in words else {})
        if parameter.annotation is bool:
            options = {"help": helps[name], "action": "store_true"}
        elif parameter.annotation in (list[str], list[str] | None):
            options |= {"type": str, "nargs": "+"}
        parser.add_argument(name if name in words else f"--{name}", **options)
    spellings = {option.replace("_", "-"): option for action in actions(parser) for option in action.option_strings}
    split = [word.partition("=") for word in argv]
    values = parser.parse_args(["".join((spellings.get(name, name), *value)) for name, *value in split]).as_dict()
    for name, value in values.items():  # some libraries refuse a PositiveInt, a subclass of int
        if isinstance(value, int | float) and not isinstance(value, bool):
            values[name] = int(value) if isinstance(value, int) else float(value)
    return function(*[values.pop(name) for name in words], **values)


def explain(message: str, options: Collection[str]) -> UserError:
    """A parser's message as one sentence."""
    unknown = re.match(r"unrecognized arguments: (-[^\s=]+)|Subcommand '\w+' does not accept option '(.+)'", message)
    if unknown:
        option = unknown[1] or f"--{unknown[2]}"
        return UserError(f"There is no option {option}.{did_you_mean(option, options)} See --help.")
    message = re.sub(r'^Parser key "([^"]+)"', r"--\1", message).replace("NoneType", "null")
    message = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message)
    message = re.sub(r"typing\.Literal\['?(.*?)'?\]", r"\1", message).replace("', '", " or ")
    value = re.search(r"(?:Got|Given) value: (.*)|: (.+) does not conform to", message)
    if value is None:
        return UserError(" ".join(message.split()))
    types = re.findall(r"(?:Expected an?|Not of type) (.+?)(?:[.:]|$)", message, re.MULTILINE)
    expected = f"takes {' or '.join(types)}"
    if limits := re.search(r"does not conform to restriction (.+)", message):
        expected = f"must be {limits[1]}"
        for sign, words in {"v>=": "at least ", "v<=": "at most ", "v>": "above ", "v<": "below "}.items():
            expected = expected.replace(sign, words)
    return UserError(f"{message.partition(':')[0]} is {value[1] or value[2]}; it {expected}.")
