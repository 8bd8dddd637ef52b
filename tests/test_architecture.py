"""The structure of project/, held by reading its sources: floors, circles, ceilings, other libraries' private names."""

import ast
import graphlib
import importlib
import inspect
import re
import sys
import tomllib
from collections import Counter
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = Path(__file__).parents[1] / "project"
MODULES = {  # their sources
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").strip("."): file.read_text(
        "utf-8"
    )
    for file in PACKAGE.rglob("*.py")
}
# A room imports rooms of lower floors only. An import for a type counts, too.
FLOORS = [
    {"errors"},
    {"files", "arguments", "batch"},
    {"parts"},
    {"optim", "losses", "metrics", "models"},
    {"runs", "data"},
    {"inference"},
    {"evaluation", "classifier"},
    {"training", "export", "serving"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Ceilings: what would break one is paid for by something that goes.
ENTRIES, LINES, FILE, FUNCTION, CLASS, BENCHMARKS = 21, 12_428, 330, 60, 250, 1_110
# Uses of private names of other libraries, by file; at most 12. Why: arguments lists a parser's options, loop_state
# sets the loops of a resumed fit, signals reads the options of the user's SLURMEnvironment, sharded names what may be
# unpickled.
PRIVATE = {"arguments": 1, "inference.sharded": 1, "training.loop_state": 9, "training.signals": 1}
LOOP_KEYS = {"epoch_progress", "is_last_batch"}  # with every key that begins with epoch_loop.
UNDOCUMENTED = (  # modules without a page in their library's documentation
    r"(lightning\.pytorch\.(loops|trainer\.connectors)|starlette\.formparsers|tensorboard\.(compat|plugins|summary)"
    r"|uvicorn\.(protocols|server))(\.|$)"
)
PUBLIC = {"_asdict", "_exit", "_fields", "_make", "_replace"}  # documented, of named tuples and os


@cache
def tree(name):
    return ast.parse(MODULES[name])


def imported_modules(node):
    """The full names of the modules that an import statement names."""
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


@cache
def imported(name):
    """The modules of the package that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "project":
            base = node.module.removeprefix("project").strip(".")
            for alias in node.names:
                module = f"{base}.{alias.name}".strip(".")
                found.add(module if module in MODULES else base)
    return found


def room(module):
    return module.partition(".")[0]


def test_every_room_has_a_floor_and_imports_only_lower_ones():
    assert {room(name) for name in MODULES if name} == set(FLOOR)
    for name in filter(None, MODULES):
        for other in imported(name):
            same_or_lower = room(other) == room(name) or FLOOR[room(other)] < FLOOR[room(name)]
            assert same_or_lower, f"{name} imports {other}"


def test_no_module_imports_itself_through_others():
    order = graphlib.TopologicalSorter({name: imported(name) for name in MODULES}).static_order()
    assert {*order} == {*MODULES}  # a circle raises a CycleError


def test_only_load_decides_whether_a_path_is_a_bundle():
    assert {name for name, source in MODULES.items() if "is_bundle(" in source} == {"inference.load"}


def test_data_and_model_meet_only_in_training():
    meet = {name for name in MODULES if {"classifier", "data.datamodule"} <= imported(name)}
    assert {room(name) for name in meet} == {"training"}


def test_nothing_unpickles_code_or_names_a_device():
    for name, source in MODULES.items():
        for forbidden in ("weights_only=False", "pickle.load", ".cuda(", "shell=True"):
            assert forbidden not in source, name


def test_rooms_files_functions_and_classes_stay_below_their_ceilings():
    assert len({entry.name for entry in PACKAGE.iterdir()} - {"__pycache__", "py.typed"}) <= ENTRIES
    lengths = {name: len(source.splitlines()) for name, source in MODULES.items()}
    lines = sum(lengths.values())
    assert lines <= LINES, f"{lines:,} lines are above the ceiling LINES; in a fork, raise it"
    assert sum(len(file.read_text().splitlines()) for file in PACKAGE.parent.glob("benchmarks/*.py")) <= BENCHMARKS
    assert {name: length for name, length in lengths.items() if length > FILE} == {}
    too_long = []
    for name in MODULES:
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                # without the docstring, which of ImageData and Classifier is the help of their options
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                most = CLASS if isinstance(node, ast.ClassDef) else FUNCTION
                too_long += [f"{name}:{node.name}"] * bool(body and body[-1].end_lineno - body[0].lineno >= most)
    assert too_long == []


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_" and name not in PUBLIC


@cache
def own_private_names():
    """Every name with an underscore that the package itself defines."""
    nodes = [node for name in MODULES for node in ast.walk(tree(name))]
    stored = [node for node in nodes if isinstance(getattr(node, "ctx", None), ast.Store)]
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    own |= {node.id for node in stored if isinstance(node, ast.Name)}
    return own | {node.attr for node in stored if isinstance(node, ast.Attribute)}


def foreign_private_names(name):
    """Attributes and imports with an underscore that are not the package's own, and overrides of other classes'."""
    own, found = own_private_names(), []
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            found.append(node.attr)
        elif isinstance(node, ast.ImportFrom) and room(node.module or "") != "project":
            found += [part for part in (node.module or "").split(".") if is_private(part)]
            found += [alias.name for alias in node.names if is_private(alias.name)]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            found += [a.value for a in node.args if is_private(str(getattr(a, "value", ""))) and a.value not in own]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # keys of Lightning's loop state
            is_key = node.value in LOOP_KEYS or node.value.startswith("epoch_loop.")
            found += [node.value] * (is_key or bool(re.fullmatch("_[a-z]+(_[a-z]+)+", node.value)))
        found += [module for module in imported_modules(node) if re.match(UNDOCUMENTED, module)]
    module = importlib.import_module(f"project.{name}".rstrip("."))
    for _, kind in inspect.getmembers(module, inspect.isclass):
        if kind.__module__ == module.__name__:
            above = {
                n for base in kind.__mro__[1:] if room(base.__module__) not in ("project", "typing") for n in vars(base)
            }
            found += [n for n in vars(kind) if is_private(n) and n in above and not n.startswith("_abc")]
    return found


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"", "__main__"}))
def test_private_names_of_other_libraries_are_on_the_list(name):
    found = foreign_private_names(name)
    assert len(found) <= PRIVATE.get(name, 0), Counter(found)
    assert sum(PRIVATE.values()) <= 12


def test_every_imported_distribution_is_declared():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    extras = [needed for name, needed in project["optional-dependencies"].items() if name != "dev"]
    declared = {canonicalize_name(Requirement(line).name) for line in sum(extras, project["dependencies"])}
    packages = {room(module) for name in MODULES for node in ast.walk(tree(name)) for module in imported_modules(node)}
    distributions = packages_distributions()
    for package in packages - {"project"} - sys.stdlib_module_names:
        names = {canonicalize_name(name) for name in distributions[package]}
        assert names & declared, f"{package} is imported, but {names} is not declared in pyproject.toml"


def test_every_room_has_tests():
    folders = {folder.name for folder in Path(__file__).parent.iterdir() if folder.is_dir()}
    assert {name for name in FLOOR if (PACKAGE / name).is_dir()} <= folders
