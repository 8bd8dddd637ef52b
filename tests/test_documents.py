"""What pages, headers of configurations and messages tell the reader to type runs; links lead somewhere."""

import ast
import functools
import importlib
import inspect
import itertools
import os
import re
import shlex
import subprocess
import typing
from pathlib import Path

import pytest
import torch
import yaml

from project import arguments, cli, models
from project.classifier import Classifier
from project.commands.tune import Tuning
from project.data.datamodule import ImageData
from project.training import resume
from project.training.repeats import RepeatCli
from tests.conftest import make_images

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
CONFIGS = sorted([*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("configs/**/*.sh"), *ROOT.glob("benchmarks/*.yaml")])
SOURCES = sorted((ROOT / "project").rglob("*.py"))
VERB = f"({'|'.join(cli.VERBS)})"

# The tests that run the commands, by what begins with the place of a command; the first pattern that matches counts.
RUN_BY = {
    "test_drills.py": {r"docs/drills.md": "follow"},
    "commands/test_bench.py": {r".* bench saving$": "test_cost_of_saving_is_that_of_a_fit_with_checkpoints"},
    "commands/test_sweep.py": {r".* sweep .*--storage": "test_three_machines_share_a_postgresql_and_one_is_lost"},
    "data/test_shards.py": {r".* fit s3://": "test_object_storage_has_the_figures_of_the_folder_and_is_read_once"},
    "serving/test_server.py": {r".* serve ": "test_requests_that_have_begun_are_answered_after_a_signal"},
    "training/test_repeats.py": {
        r".* fit .*--seeds": "test_seeds_are_ordinary_runs_with_one_split_made_once_and_summarised",
        r".* fit .*--folds": "test_folds_stopped_in_between_go_on_and_their_pooled_predictions_make_one_report",
    },
    "training/test_distributed.py": {
        r"configs/multinode.yaml: torchrun": (
            "test_a_lost_machine_leaves_the_others_to_go_on_from_the_last_checkpoint_to_the_same_result"
        ),
        r"configs/slurm/train.sh": "test_the_slurm_script_runs_the_fit_on_each_machines_own_disk",
    },
    "test_configs.py": {
        r"configs/fsdp.yaml": "test_fsdp_is_parsed_and_without_a_gpu_refused_in_a_sentence",
        r"(configs/\S+): python -m project\.cli fit --config \1": "test_fit_test_and_predict_with_every_config",
        r"docs/install.md: \$ python -m project\.cli fit$": "test_the_result_in_the_header_is_what_comes_out",
    },
    "test_readme.py": {
        r"docs/recipe.md: python": "test_the_recipes_commands_run",
        r"configs/sweep.yaml": "test_commands_run",  # by docs/sweep.md
        r"(README[\w.-]*|docs/[\w-]+)\.md: python -m project\.cli": "test_commands_run",
        r"\S+ pip install -e \.\[\w+\]$": "test_make_targets_benchmarks_and_extras_exist",
    },
    "test_documents.py": {r"\S+ (\$ )?make ": "test_make_commands_are_targets_and_benchmarks_with_options_that_exist"},
}
# Why a command runs in no test.
NOT_HERE = {
    r"\S+ (\$ )?pip install ": "packages come over the network",
    r"\S+ (\$ )?((source )?\S+activate|python -m venv \S+)$": "make install makes it; the tests run in one",
    r"\S+ (\$ )?docker ": "needs Docker; tests/serving/test_server.py installs and serves what the Dockerfile says",
    r"\S+ (\$ )?curl ": "a program of the reader's; tests/serving/test_app.py sends the same form",
    r"\S+ (\$ )?aws ": "a program of the reader's; tests/data/test_shards.py has a storage of its own",
}


def shown(text):
    """The commands in the blocks of a page: in console blocks, which hold the output, too, those after a prompt."""
    for language, block in re.findall(r"^```(sh|bash|console)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        lines = block.replace("\\\n", " ").splitlines()
        if language == "console":
            lines = [line for line in lines if line.startswith("$ ")]
        yield from lines


def in_header(text):
    """The commands in the comment that a file begins with: its lines with a margin."""
    head = re.match(r"(#.*\n)+", text)[0].replace("\\\n#  ", " ")
    return re.findall(r"^#   (\S.*)$", head, re.MULTILINE)


def commands():
    """Every command of the pages and headers, with its place."""
    found = [(page, line) for page in PAGES for line in shown(page.read_text(encoding="utf-8"))]
    found += [
        (file, line)
        for file in [*CONFIGS, *ROOT.glob("Dockerfile")]
        for line in in_header(file.read_text(encoding="utf-8"))
    ]
    for file, line in found:
        if words := shlex.split(line.removeprefix("$ "), comments=True):
            yield f"{file.relative_to(ROOT).as_posix()}: {'$ ' * line.startswith('$ ')}{shlex.join(words)}", words


def test_every_command_runs_in_a_test_or_says_why_not():
    known = {pattern: (file, name) for file, tests in RUN_BY.items() for pattern, name in tests.items()}
    known |= dict.fromkeys(NOT_HERE)
    found, used = dict(commands()), set()
    assert len(found) > 30
    for command in found:
        where = [known[pattern] for pattern in known if re.match(pattern, command)]
        assert where, f"say in RUN_BY which test runs this, or in NOT_HERE why none does: {command}"
        used.add(where[0])
    for file, name in used - {None}:
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE), (
            file,
            name,
        )


def test_every_configuration_begins_with_its_command():
    for file in CONFIGS:
        name = file.relative_to(ROOT).as_posix()
        assert any(name in line for line in in_header(file.read_text(encoding="utf-8"))), name


def test_make_commands_are_targets_and_benchmarks_with_options_that_exist():
    functions = {}
    for file in ROOT.glob("benchmarks/*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                functions[node.name] = {f"--{argument.arg}" for argument in node.args.args} | {"--config"}
    for command, words in commands():
        if words[0] != "make":
            continue
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        if words[1] == "bench":
            (line,) = re.findall(r"-m benchmarks (.*)", done.stdout)
            name, *options = shlex.split(line)
            assert {option for option in options if option.startswith("--")} <= functions[name], command
    for file in ROOT.glob("benchmarks/*.yaml"):
        (name,) = re.findall(r"ARGS=\"(\w+) --config benchmarks/" + file.name, file.read_text(encoding="utf-8"))
        assert {f"--{key}" for key in yaml.safe_load(file.read_text(encoding="utf-8"))} <= functions[name]


# The options of the verbs, and the parser, which is asked and not followed


class Parsed(Exception):
    """The parser is made."""


@functools.cache
def trainer_parser(kind, verb):
    class Asked(kind):
        def parse_arguments(self, parser, args):
            raise Parsed(parser)

    with pytest.raises(Parsed) as error:
        Asked(verb, [])
    return error.value.args[0]


def function(verb):
    return getattr(importlib.import_module(f"project.commands.{verb}"), verb)


def parse(verb, words):
    """Parses the words of a command as the verb does, and ends there."""
    if verb in cli.COMMANDS:
        assert arguments.call(functools.wraps(function(verb))(lambda *_, **__: 0), verb, words) == 0
        return
    words = arguments.named(words, "--ckpt_path" if verb in ("validate", "test") else "--data.root")
    kind = Tuning if verb == "tune" else RepeatCli
    trainer_parser(kind, "fit").parse_args(["fit" if verb == "tune" else verb, *resume.with_newest(words)])


@functools.cache
def options(verb):
    """The options of a verb."""
    if verb in cli.COMMANDS:
        return {f"--{name}" for name in inspect.signature(function(verb)).parameters} | {"--help"}
    parser = trainer_parser(Tuning if verb == "tune" else RepeatCli, "fit")
    (verbs,) = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    actions = arguments.actions(verbs["fit" if verb == "tune" else verb])
    known = {name for action in actions for name in action.option_strings}
    return known | {"--help", "--data.class_path", "--model.class_path"}


# What the messages say


@functools.cache
def nodes_of(file):
    return [*ast.walk(ast.parse(file.read_text(encoding="utf-8")))]


@functools.cache
def texts(file):
    """The texts in a source, the code of what an f-string inserts in braces."""
    nodes, found = nodes_of(file), []
    pieces = {id(piece) for node in nodes if isinstance(node, ast.JoinedStr) for piece in node.values}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            code = (p.value if isinstance(p, ast.Constant) else f"{{{ast.unparse(p.value)}}}" for p in node.values)
            found.append("".join(code))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in pieces:
            found.append(node.value)
    return found


def printed():
    """The commands that the package prints or has in its docstrings, with plausible values where they are computed."""
    for file in SOURCES:
        for text in texts(file):
            for verb, rest in re.findall(r"python -m project\.cli ([a-z]\w*)(.*)", text):
                if re.search(r": python -m project\.cli .*\.$", text.splitlines()[0]):
                    rest = re.sub(r"\[(\w+)\|.*?\]", r"\1", rest.removesuffix("."))  # a docstring: all of the line
                else:  # what looks like a command, of a sentence
                    rest = re.match(r"(?: --?[\w.]+(?:[ =][\w/.]+)?| '[^']*'| \S*/\S*)*", rest)[0]
                yield verb, shlex.split(rest.replace("THIS_FILE", "configs/quick.yaml"))
        for node in nodes_of(file):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "command":
                literal = [a for a in node.args if not isinstance(a, ast.Starred)]
                given = [a.value if isinstance(a, ast.Constant) else None for a in literal]
                values = {"--config": "configs/quick.yaml"}
                words = [word or values.get(before, "runs/latest") for before, word in itertools.pairwise(["", *given])]
                yield words[0], words[1:] + ["IMAGES"] * (words[0] == "predict")


def test_every_command_that_is_printed_is_valid(monkeypatch):
    monkeypatch.chdir(ROOT)
    unique = dict.fromkeys((verb, *words) for verb, words in printed())
    assert len(unique) > 15
    for verb, *words in unique:
        assert verb in cli.VERBS
        parse(verb, words)


FOREIGN = {"--abbrev", "--always", "--dirty", "--exclude"}  # git
FOREIGN |= {"--logdir", "--shm-size", "--recursive", "--version", "--no-NAME"}  # TensorBoard, Docker, aws, Python's own
OPTION = r"--[a-z](?:[\w-]|\.(?=\w|\{[\w\[\]]+\})|\{[^{}]*\})*"
PROSE = {"and", "takes"}  # words that follow an option of few values in a sentence


def choices(annotation):
    """The values that an annotation allows; None where it allows others."""
    parts = [annotation] if typing.get_origin(annotation) is typing.Literal else typing.get_args(annotation)
    if parts and all(part is type(None) or typing.get_origin(part) is typing.Literal for part in parts):
        return {value for part in parts for value in typing.get_args(part)}
    return None


def test_every_option_in_a_message_exists_and_takes_the_value_beside_it():
    known, values = {option for verb in cli.VERBS for option in options(verb)}, {}
    for prefix, takes in [("data.", ImageData), ("model.", Classifier), *(("", function(v)) for v in cli.COMMANDS)]:
        for name, parameter in inspect.signature(takes, eval_str=True).parameters.items():
            values[f"--{prefix}{name}"] = choices(parameter.annotation)
    assert values["--data.cache"] == {"auto", "on", "off"}
    for file, text in itertools.chain.from_iterable(zip(itertools.repeat(file), texts(file)) for file in SOURCES):
        for verb, name, value in re.findall(rf"(?:(\w+) )?(?<![\w-])({OPTION})(?:[ =]([a-z]+)\b)?", text):
            spelled = name.replace("-", "_").replace("__", "--", 1)  # in verbs --batch-size is --batch_size
            pattern = re.sub(r"\\\{.*?\\\}", r"[\\w.]+", re.escape(spelled)) + r"(\..+)?"  # --data is a group
            assert name in FOREIGN or any(re.fullmatch(pattern, option) for option in known), (file, text)
            if verb in cli.VERBS:
                assert any(re.fullmatch(pattern, option) for option in options(verb)), (file, text)
            if value and values.get(name):
                assert value in values[name] | PROSE, (file, text)
    for file in [*ROOT.glob("project/**/*.html"), *ROOT.glob("project/**/*.md")]:
        for verb, option in re.findall(rf"(?<![\w/]){VERB} (--[a-z][\w.]*\w)", file.read_text(encoding="utf-8")):
            assert option in options(verb), (file, option)


def test_options_beside_a_verb_on_a_page_are_of_that_verb():
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
            words = code.removeprefix("python -m project.cli ").split()
            if words[0] in cli.VERBS:
                given = {word.partition("=")[0].removesuffix("+") for word in words if re.match(r"--[a-z]", word)}
                assert {word for word in given if not word.endswith(".help")} <= options(words[0]), (page, code)


# Links


def slug(heading):
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_links_lead_to_a_file_and_to_a_heading_in_it():
    headings = {}
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        headings[page] = {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    found = 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("https://", "http://", "mailto:")):
                name, _, anchor = target.partition("#")
                file = (page.parent / name).resolve() if name else page
                assert file.exists(), (page, target)
                assert not anchor or anchor in headings[file], (page, target)
                found += bool(anchor)
    assert found


# Recipes of benchmarks/


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", sorted(ROOT.glob("benchmarks/*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_fits_one_batch_on_every_data_set(file, workplace):
    content, short = yaml.safe_load(file.read_text(encoding="utf-8")), ["--trainer.limit_train_batches", "1"]
    short += ["--trainer.max_epochs", "1", "--trainer.limit_val_batches", "1", "--data.workers", "0"]
    for name in ("photos", "stamps"):
        make_images(workplace / name, {"a": 20, "b": 20})
    torch.save(models.build("timm/efficientnet_lite0", 1000)[1].state_dict(), "lite0.pth")
    first, *more = content["data"].items()
    pairs = [(first, recipe) for recipe in content["recipe"].items()]
    pairs += [(data, next(iter(content["recipe"].items()))) for data in more]
    for (data, words), (recipe, more) in pairs:
        os.environ.pop("PROJECT_RUN", None)
        assert cli.main(["fit", *words.split(), *more.split(), *short, "--name", "it"]) == 0, (data, recipe)
