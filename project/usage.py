"""How words on the command line reach a function, and what is said of words that nobody knows."""

import argparse
import inspect
import re
from collections.abc import Callable, Collection
from typing import Any, NoReturn

import docstring_parser
import jsonargparse

from project.errors import UserError, did_you_mean


class Parser(jsonargparse.ArgumentParser):
    """Raises, in one sentence, what argparse would print with pages of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises UserError."""
        raise explain(message, self) from ex


def call(function: Callable[..., int], verb: str, argv: list[str]) -> int:
    """Runs a verb: the signature is its options, the docstring its help.

    A positional-only parameter is a word of the command line, `list[str]` one or more of them; others are options, a
    bool one that takes no value, one of `list[str]` one or more words. An option may be spelt with dashes, too:
    --batch-size is --batch_size.
    """
    document = docstring_parser.parse(function.__doc__ or "")
    parser = Parser(prog=f"python -m project.cli {verb}", description=document.description, allow_abbrev=False)
    explained = {parameter.arg_name: parameter.description for parameter in document.params}
    signature = inspect.signature(function, eval_str=True).parameters.values()
    words = [parameter for parameter in signature if parameter.kind is parameter.POSITIONAL_ONLY]
    for word in words:
        many = word.annotation == list[str]
        optional = {} if word.default is word.empty else {"nargs": "?", "default": word.default}
        given: dict[str, Any] = {"type": str, "nargs": "+"} if many else {"type": word.annotation, **optional}
        parser.add_argument(word.name, help=explained[word.name], **given)
    lists = [parameter for parameter in signature if parameter.annotation == list[str] | None]
    for option in lists:
        parser.add_argument(f"--{option.name}", help=explained[option.name], type=str, nargs="+")
    parser.add_function_arguments(function, skip={parameter.name for parameter in (*words, *lists)})
    flags = {f"--{parameter.name}" for parameter in signature if parameter.annotation is bool}
    argv = [f"{word}=true" if word in flags else word for word in spelt(argv, _options(parser))]
    values = parser.instantiate_classes(parser.parse_args(argv)).as_dict()
    return function(*[values.pop(word.name) for word in words], **values)


def spelt(argv: list[str], options: Collection[str]) -> list[str]:
    """The same words; an option with dashes where one with underscores is known is spelt like that."""

    def known(word: str) -> str:
        name, equals, value = word.partition("=")
        own = "--" + name.removeprefix("--").replace("-", "_")
        return f"{own}{equals}{value}" if word.startswith("--") and own in options else word

    return [known(word) for word in argv]


def explain(message: str, parser: argparse.ArgumentParser) -> UserError:
    """A parser's complaint as one sentence."""
    if unknown := re.match(r"unrecognized arguments: (\S+)", message):
        word = unknown[1].split("=")[0]
        kind = "option" if word.startswith("-") else "place for the word"
        return UserError(f"There is no {kind} {word}.{did_you_mean(word, _options(parser))} --help lists the options.")
    if unknown := re.match(r"Subcommand '\w+' does not accept option '(.+)'", message):
        option = f"--{unknown[1]}"
        return UserError(
            f"A --config file sets {unknown[1]}, which does not exist.{did_you_mean(option, _options(parser))}"
        )
    if key := re.match(r'Parser key "([^"]+)":\s*(.*)', message, re.DOTALL):
        name, details = key.groups()
        expected = [_plain(kind) for kind in re.findall(r"Expected an? (.+?)(?:\. Got value|\n|$)", details)]
        if value := re.search(r"(?:Given|Got) value: (.*)", details, re.DOTALL):
            return UserError(f"--{name} is {_line(value[1])}; it takes {' or '.join(expected) or _line(details)}.")
        return UserError(f"--{name}: {_line(details)}")
    return UserError(_line(message))


def _options(parser: argparse.ArgumentParser) -> list[str]:
    known = [option for action in parser._actions for option in action.option_strings]
    for action in parser._actions:
        if isinstance(action.choices, dict):  # the verbs' own parsers
            known += [option for verb in action.choices.values() for option in _options(verb)]
    return known


def _plain(kind: str) -> str:
    """<class 'int'> is int, typing.Literal['a', 'b'] is a or b."""
    kind = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", kind)
    if choices := re.fullmatch(r"(?:typing\.)?Literal\[(.*)\]", kind):
        return " or ".join(str(choice).strip(" '\"") for choice in choices[1].split(","))
    return {"NoneType": "null"}.get(kind, kind)


def _line(text: Any) -> str:
    return " ".join(str(text).split())
