"""The documentation: a site that builds, messages that are printed, tables that say where they are from."""

import ast
import inspect
import re
from functools import cache
from importlib import import_module
from itertools import chain
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from project import cli

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The documentation, built as by make docs: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    return folder


def page(site, name):
    return (site / f"{name}.html").read_text("utf-8")


@pytest.mark.slow
def test_each_verb_has_a_page_with_all_its_options(site):
    for verb in cli.COMMANDS:
        function = getattr(import_module(f"project.commands.{verb}"), verb)
        text = page(site, f"verbs/{verb}")
        for option, parameter in inspect.signature(function).parameters.items():
            is_word = parameter.default is parameter.empty or parameter.kind is parameter.POSITIONAL_ONLY
            assert f"<code>{'' if is_word else '--'}{option}</code>" in text, (verb, option)
    for option in ("--resume", "--data.root", "--model.lr"):
        assert f"<code>{option}</code>" in page(site, "verbs/fit")
    assert "configs/default.yaml.html" in page(site, "verbs/fit")
    for verb in cli.VERBS:
        assert f"verbs/{verb}.html" in page(site, "index"), verb


@pytest.mark.slow
def test_a_page_loads_nothing_from_another_server(site):
    pages = [*site.rglob("*.html")]
    assert len(pages) > len(cli.VERBS) + len([*DOCS.glob("*.md")])
    for file in pages:
        tags = re.findall(r"<(?:script|img|link|iframe|source)\b[^>]*>", file.read_text("utf-8"))
        assert [tag for tag in tags if re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag)] == [], file
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(.?(https?:)?//|@import", style.read_text("utf-8")), style


@pytest.mark.slow
def test_the_search_finds_an_option_where_the_site_is_opened_as_files(site, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get((site / "index.html").as_uri())
    field = browser.find_element(By.CSS_SELECTOR, "input.md-search__input")
    field.click()
    field.send_keys("label_smoothing")
    found = WebDriverWait(browser, 60).until(lambda it: it.find_elements(By.CSS_SELECTOR, "a.md-search-result__link"))
    assert any("verbs/fit.html" in link.get_attribute("href") for link in found)


@cache
def messages():
    """Every text of the package, with … for what an f-string puts in."""
    found = []
    for file in (ROOT / "project").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_headings_that_are_messages_are_printed_by_the_package():
    pages = {file.stem: file.read_text("utf-8") for file in DOCS.glob("*.md")}
    headings = {name: re.findall(r"^### `(.+ .+ .+)`$", text, re.MULTILINE) for name, text in pages.items()}
    assert len(headings["troubleshooting"]) >= 15
    for heading in chain.from_iterable(headings.values()):
        fixed = [part for part in heading.split("…") if part.strip(" .")]
        assert sum(map(len, fixed)) >= 18, heading
        pattern = re.compile(".*".join(map(re.escape, fixed)))
        assert any(map(pattern.search, messages())), heading


@pytest.mark.parametrize("name", ["benchmarks", "recipe"])
def test_each_table_of_results_stands_below_its_command_or_says_that_there_is_none(name):
    sections = re.split(r"^## ", (DOCS / f"{name}.md").read_text("utf-8"), flags=re.MULTILINE)
    tables = [section for section in sections if re.search(r"^\| ---", section, re.MULTILINE)]
    assert len(tables) > 1
    for section in tables:
        assert re.search(r"^```sh\n|no command repeats", section, re.MULTILINE), section.splitlines()[0]
