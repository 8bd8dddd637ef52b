"""Hooks of mkdocs (mkdocs.yml): README.md is the start page, each verb has a page, linked files come along.

The pages in docs/ link to other files of the repository as on GitHub. In the site README.md is index.md, the pages of
docs/ lie beside it, and a linked configuration is a page with its text.
"""

import argparse
import contextlib
import io
import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any
from unittest.mock import patch

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from project import arguments, cli

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")  # the path of a link inside the repository
CODE = {".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".sh": "sh", ".py": "python", "": ""}


def address(path: str) -> str:
    """Where a file of the repository lies in the site: docs/data.md is data.md, x/ddp.yaml is x/ddp.yaml.md."""
    if path == "README.md" or (ROOT / path).is_dir():
        return "index.md"
    return path.removeprefix("docs/") + ".md" * (PurePosixPath(path).suffix in CODE)


def linked(path: str) -> dict[str, str]:
    """The links of a page to files of the repository: as they are written, and the paths of the files."""
    found = LINK.findall((ROOT / path).read_text("utf-8"))
    return {link: posixpath.normpath(posixpath.join(posixpath.dirname(path), link)) for link in found}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the verbs into the navigation, and leaves out pages that a fork has removed."""

    def kept(entries: list[Any]) -> list[Any]:
        there = []
        for entry in entries:
            for title, value in entry.items() if isinstance(entry, dict) else [(None, entry)]:
                if value == "verbs":
                    there.append({title: [f"verbs/{verb}.md" for verb in cli.VERBS]})
                elif isinstance(value, list):
                    there += [{title: below}] if (below := kept(value)) else []
                elif value == "index.md" or (ROOT / value).exists() or (ROOT / "docs" / value).exists():
                    there.append(entry)
        return there

    config.nav = kept(config.nav or [])
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the start page, the pages of the verbs, and the files outside docs/ that are linked."""
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    readmes = [file.name for file in sorted(ROOT.glob("README*.md"))]
    todo = [*readmes, *pages]
    for path in todo:  # grows
        source, uri = ROOT / path, address(path)
        if source.suffix == ".md" and source.is_file():
            todo += {*linked(path).values()} - {*todo}
        if source.is_file() and files.get_file_from_path(uri) is None:
            if source.suffix in CODE:
                content = f"# {path}\n\n````{CODE[source.suffix]}\n{source.read_text('utf-8')}\n````\n"
                file = File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV)
            else:
                shown = InclusionLevel.UNDEFINED if path in readmes else InclusionLevel.NOT_IN_NAV
                file = File.generated(config, uri, abs_src_path=str(source), inclusion=shown)
            files.append(file)
    for verb in cli.VERBS:
        files.append(File.generated(config, f"verbs/{verb}.md", content=verb_page(verb)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the links to files of the repository into links inside the site."""
    uri = page.file.src_uri
    path = "README.md" if uri == "index.md" else uri if (ROOT / uri).exists() else f"docs/{uri}"
    if not (ROOT / path).exists():  # a generated page
        return markdown
    links, here = linked(path), posixpath.dirname(uri)
    return LINK.sub(lambda link: posixpath.relpath(address(links[link[1]]), here or "."), markdown)


def verb_page(verb: str) -> str:
    """The reference of a verb: what its --help says, in full, with a table of the options."""
    parsers: list[argparse.ArgumentParser] = []
    with (
        patch.object(arguments.Parser, "print_help", lambda parser: parsers.append(parser), create=True),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        cli.main([verb, "--help"])
    (parser,) = parsers
    every = {action.option_strings[-1] if action.option_strings else action.dest: action for action in listed(parser)}
    if verb in cli.TRAINER_VERBS:  # whole sections, given as files
        every = {name: action for name, action in every.items() if name not in ("--data", "--model", "--trainer")}
    usage = parser.format_help().partition("\n")[0].removeprefix("usage: ")  # of the Trainer's verbs
    groups, end = [("", r"\w+"), ("", r"--\w+")], ""
    if verb == "fit":
        groups += [("Data", r"--data\.\w+"), ("Network", r"--model\.\w+")]
        end = "[configs/default.yaml](../configs/default.yaml.md) has every setting with its default, and\n"
        end += "`python -m project.cli fit --help trainer` lists the options of Lightning's Trainer.\n"
    elif verb in cli.TRAINER_VERBS:
        end = "The options of [data](fit.md#data), [network](fit.md#network) and Trainer are those of `fit`.\n"
    else:
        words = [f"[{name}]" if every[name].nargs in ("?", "*") else name for name in every if name.isidentifier()]
        usage = " ".join([parser.prog, *words, "[options]"])
    what = f"{cli.TRAINER_VERBS[verb].capitalize()}." if verb in cli.TRAINER_VERBS else parser.description
    page = f"# {verb}\n\n```sh\n{usage}\n```\n\n{escaped(what)}\n"
    for title, group in groups:
        rows = [row(name, action) for name, action in every.items() if re.fullmatch(group, name)]
        page += f"\n## {title}\n" if title else ""
        page += "\n| | meaning | default |\n| --- | --- | --- |\n" + "".join(rows) if rows else ""
    more = re.search(rf"^\| `{verb}` \|.*\| (\[.*\)) \|$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    return "\n".join(filter(None, (page, end, more and f"More: {more[1].replace('docs/', '../')}\n")))


def listed(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments of a parser without --help and its like."""
    hidden = re.compile(r"--(help|.+\.help|.+\+)|subcommand")
    every = [action for action in arguments.actions(parser) if action.help != argparse.SUPPRESS]
    return [action for action in every if not any(map(hidden.fullmatch, [*action.option_strings, action.dest]))]


def row(name: str, action: argparse.Action) -> str:
    """The row of an argument in its table."""
    default = action.default
    is_given = default not in (None, argparse.SUPPRESS, "", []) and default is not False
    return f"| `{name}` | {escaped(action.help)} | {f'`{default}`' if is_given else ''} |\n"


def escaped(text: str | None) -> str:
    """A help text as Markdown: `code` stays, and nothing else is markup. Lightning's lists are left out."""
    sentences = re.split(r"(?<=\.) (?=[^.]*``)", " ".join((text or "").split()))[0]
    parts = re.split(r"(`[^`]+`)", sentences)
    return "".join(
        part if part[:1] == "`" else re.sub(r"([\\*_>|\[\]#])", r"\\\1", part).replace("<", "&lt;") for part in parts
    )
