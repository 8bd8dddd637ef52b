"""Who may import whom, held by reading the imports."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "project"
MODULES = {
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): file
    for file in PACKAGE.rglob("*.py")
}


def imports(file, top_level_only=False):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(file):
    return {name for name in imports(file) if name in MODULES and name != "project"}


@pytest.mark.parametrize("room", ["data", "models"])
def test_data_and_models_import_nothing_else_of_the_package(room):
    for name, file in MODULES.items():
        if name.startswith(f"project.{room}"):
            others = {o for o in ours(file) if not o.startswith(f"project.{room}")}
            assert others <= {"project.errors", "project.files"}, name
    assert not ours(MODULES["project.errors"])
    assert ours(MODULES["project.files"]) == {"project.errors"}


def test_nothing_imports_the_command_line():
    for name, file in MODULES.items():
        if name != "project.__main__":
            assert "project.cli" not in ours(file), name


def test_data_and_model_meet_only_in_training():
    """Elsewhere a type's name at most, which nothing imports when it runs."""
    for name in ("project.classifier", "project.callbacks", "project.metrics"):
        assert not {o for o in imports(MODULES[name], top_level_only=True) if o.startswith("project.data")}, name
    meet = {n for n, f in MODULES.items() if {"project.classifier", "project.data.datamodule"} <= ours(f)}
    assert meet == {"project.training"}


def test_nothing_unpickles_code_or_names_a_device():
    for name, file in MODULES.items():
        text = file.read_text(encoding="utf-8")
        for forbidden in ("weights_only=False", "pickle.load", ".cuda(", "shell=True"):
            assert forbidden not in text, name


def test_every_module_has_its_test_file():
    tests = {file.stem for file in Path(__file__).parent.glob("test_*.py")}
    covered_by = {
        "classifier": "training",
        "callbacks": "training",
        "answers": "board",
        "projector": "board",
        "pace": "watcher",
        "runs": "training",
        "origin": "training",
        "average": "saving",
        "place": "resuming",
        "stopping": "processes",
        "errors": "cli",
        "usage": "cli",
    }
    covered_by |= {
        "files": "checkpoint",
        "predictions": "predict",
        "figures": "report",
        "page": "report",
        "gallery": "report",
        "comparison": "report",
        "results": "report",
        "attribution": "explain",
        "lettering": "explain",
        "curves": "logs",
        "card": "export",
        "convert": "export",
        "parity": "export",
        "expected": "bundle",
        "__init__": "cli",
        "__main__": "cli",
    }
    for file in PACKAGE.glob("[a-z]*.py"):
        assert f"test_{covered_by.get(file.stem, file.stem)}" in tests, file.name
