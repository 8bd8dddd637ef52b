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
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    words = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_ONLY]
    lists = [parameter.name for parameter in parameters if parameter.annotation in (list[str], list[str] | None)]
    for parameter in parameters:
        if parameter.name in (*words, *lists):
            name = parameter.name if parameter.name in words else f"--{parameter.name}"
            kind: dict[str, Any] = {"type": parameter.annotation}
            if parameter.name in lists:
                kind = {"type": str, "nargs": "+"}
            elif parameter.default is not parameter.empty:
                kind |= {"nargs": "?", "default": parameter.default}
            parser.add_argument(name, help=helps[parameter.name], **kind)
    parser.add_function_arguments(function, skip={*words, *lists})
    flags = {f"--{parameter.name}" for parameter in parameters if parameter.annotation is bool}
    argv = with_underscores(argv, [option for action in actions(parser) for option in action.option_strings])
    argv = [f"{word}=true" if word in flags else word for word in argv]
    values = parser.instantiate_classes(parser.parse_args(argv)).as_dict()
    for name, value in values.items():  # some libraries refuse a PositiveInt, a subclass of int
        if isinstance(value, int | float) and not isinstance(value, bool):
            values[name] = int(value) if isinstance(value, int) else float(value)
    return function(*[values.pop(name) for name in words], **values)


def with_underscores(argv: list[str], options: Collection[str]) -> list[str]:
    """Replaces dashes in the names of those options that have underscores instead."""
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        option = "--" + name.removeprefix("--").replace("-", "_")
        words.append(f"{option}{equals}{value}" if word.startswith("--") and option in options else word)
    return words


def explain(message: str, options: Collection[str]) -> UserError:
    """A parser's message as one sentence."""
    if unknown := re.match(r"unrecognized arguments: ([^\s=]+)", message):
        kind = "option" if unknown[1].startswith("-") else "place for the word"
        return UserError(f"There is no {kind} {unknown[1]}.{did_you_mean(unknown[1], options)} See --help.")
    if unknown := re.match(r"Subcommand '\w+' does not accept option '(.+)'", message):
        hint = did_you_mean(f"--{unknown[1]}", options)
        return UserError(f"A --config file sets {unknown[1]}, which does not exist.{hint}")
    message = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message).replace("NoneType", "null")
    message = re.sub(
        r"typing\.Literal\[(.*?)\]", lambda found: found[1].replace("'", "").replace(", ", " or "), message
    )
    key = re.match(r'Parser key "([^"]+)":\s*(.*)', message, re.DOTALL)
    value = re.search(r"(?:Got|Given) value: (.*)|: (.+) does not conform to", message)
    if key is None or value is None:
        return UserError(" ".join((f"--{key[1]}: {key[2]}" if key else message).split()))
    expected = (
        f"takes {' or '.join(re.findall(r'(?:Expected an?|Not of type) (.+?)(?:[.:]|$)', message, re.MULTILINE))}"
    )
    if limits := re.search(r"does not conform to restriction (.+)", message):
        expected = f"must be {limits[1]}"
        for sign, words in {"v>=": "at least ", "v<=": "at most ", "v>": "above ", "v<": "below "}.items():
            expected = expected.replace(sign, words)
    return UserError(f"--{key[1]} is {' '.join((value[1] or value[2]).split())}; it {expected}.")
