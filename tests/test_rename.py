"""A fork: renamed, trimmed and upgraded copies of the template work, and what cannot be done is refused."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import rename
import without

from tests.conftest import require_no_dead_code

ROOT = Path(__file__).parent.parent
PACKAGE, DISTRIBUTION = rename.names(ROOT)
NEW = f"z{PACKAGE}"  # in imports it comes after all others
QUICK = ["--model.name", "squeezenet1_1", "--data.image_size", "32", "--trainer.max_epochs", "1"]
QUICK += ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "2"]
TWENTY = [
    "tests/test_contracts.py",
    "tests/data/test_workers.py",
    "-m",
    "not full",
    "-k",
    "not columns and not verbs_take",
]


def git(folder, *words):
    identity = ["-c", "user.name=Someone", "-c", "user.email=someone@example.com"]
    done = subprocess.run(["git", "-C", folder, *identity, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python(folder, *words, code=0):
    """Runs Python in a copy, which imports its own package and none of this one."""
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "GIT_AUTHOR_NAME": "Someone",
        "GIT_COMMITTER_NAME": "Someone",
    }
    environment |= {"GIT_AUTHOR_EMAIL": "someone@example.com", "GIT_COMMITTER_EMAIL": "someone@example.com"}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def template(tmp_path):
    """A repository with the tracked files as they are now."""
    folder = tmp_path / "template"
    for name in git(ROOT, "ls-files").splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git(tmp_path, "init", "-q", folder)
    git(folder, "add", "--all")
    git(folder, "commit", "-q", "-m", "Template")
    return folder


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Flowers", "'Flowers' cannot name a package"),
        ("1flower", "cannot name a package"),
        ("my-flowers", "cannot name a package"),
        ("f" * 31, "2 to 30 of a-z"),
        ("lambda", "keyword"),
        ("match", "keyword"),
        ("statistics", "standard library"),
        ("torch", "installed package"),
        ("tests", "a folder here"),
        ("logits", r"logits is a name in the code, [\w/]+\.py:\d+"),
    ],
)
def test_name_that_would_break_the_code_is_refused(name, why):
    with pytest.raises(rename.Mistake, match=why):
        rename.require_name(name, ROOT)


def test_name_that_nothing_uses_is_allowed():
    assert rename.require_name(NEW, ROOT) is None


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("from {0} import cli", "a.py"),
        ("import sys, {0}.cli; {0}.cli.main()", "a.py"),
        ('PACKAGE = ROOT / "{0}"', "a.py"),
        (r'match=r"python -m {0}\.cli fit"', "a.py"),
        ("class_path: {0}.models.nets.Tiny", "a.yaml"),
        ("COPY {0} {0}", "Dockerfile"),
        ("\tfind {0} tests -name x", "Makefile"),
        ('include = ["{0}*"]', "pyproject.toml"),
    ],
)
def test_word_is_replaced_where_it_is_the_package(line, file):
    assert rename.renamed(line.format(PACKAGE), file, PACKAGE, NEW) == line.format(NEW)


def test_fork_is_renamed_again_though_the_old_name_is_a_part_of_the_new(template):
    for name in (f"{NEW}s", f"{NEW}s_2"):
        python(template, "scripts/rename.py", name)
        git(template, "commit", "-q", "-m", name)
        distribution = name.replace("_", "-")
        assert rename.names(template) == (name, distribution)
        assert f"{name}.cli" in python(template, "-m", f"{name}.cli", "--help")
        assert f"`{distribution} VERB` is `python -m {name}.cli VERB`" in (template / "README.md").read_text()
        assert f'"{distribution}[explain' in (template / "pyproject.toml").read_text()


@pytest.mark.parametrize("line", ["[{0}.scripts]", 'load(text)["{0}"]', "This {0} has no such class. The {0}'s own."])
def test_word_stays_where_it_is_a_table_or_a_word_of_a_sentence(line):
    assert rename.renamed(line.format(PACKAGE), "pyproject.toml", PACKAGE, NEW) == line.format(PACKAGE)


@pytest.mark.parametrize("name", without.PARTS)
def test_what_a_part_removes_is_there(name):
    part = without.PARTS[name]
    if not all((ROOT / each.room).exists() for each in without.PARTS.values()):
        pytest.skip("this is a fork without some of the parts")
    assert [path for path in (part.room, *part.paths) if not (ROOT / path).exists()] == []
    for file, cuts in part.cuts.items():
        for pattern, _ in cuts:
            assert re.search(pattern, (ROOT / file).read_text(), re.MULTILINE), (file, pattern)


@pytest.mark.slow
def test_renamed_copy_passes_its_checks_fits_and_is_undone_by_git(template):
    (template / "new.py").touch()
    assert "new.py: not committed" in python(template, "scripts/rename.py", NEW, code=2)
    (template / "new.py").unlink()
    (template / ".git" / "info" / "exclude").write_text("*.parquet\n")
    for part in (name for name, each in without.PARTS.items() if (template / each.room).exists() and not each.before):
        (kept := template / without.PARTS[part].room / "mine.parquet").touch()
        assert "mine.parquet: not committed" in python(template, "scripts/rename.py", "--without", part, code=2)
        kept.unlink()
    (template / "tests" / "größe.py").write_text(f"from {PACKAGE} import load\n\nload()\n")
    git(template, "add", "--all")
    git(template, "commit", "-q", "-m", "Own")
    before = git(template, "rev-parse", "HEAD^{tree}")
    python(template, "scripts/rename.py", NEW)
    assert mentions(template) == []
    assert NEW in (template / "tests" / "größe.py").read_text()
    python(template, "-m", "ruff", "check", ".")
    python(template, "-m", "ruff", "format", "--check", ".")
    assert NEW in python(template, "-m", f"{NEW}.cli", "--version")
    python(template, "-m", f"{NEW}.cli", "fit", *QUICK)
    python(template, "-m", "pytest", "-q", *TWENTY)
    git(template, "reset", "-q", "--hard")
    assert git(template, "write-tree") == before
    assert not (template / NEW).is_dir() or list((template / NEW).rglob("*.py")) == []


def mentions(folder):
    """Lines where an old name is left as code: in an import, a path or a command."""
    code = rf"-m {PACKAGE}\b|from {PACKAGE}[. ]|import {PACKAGE}\b|\b{PACKAGE}(/[a-z]|\.cli)"
    code += "" if DISTRIBUTION == PACKAGE else f"|{DISTRIBUTION}"
    texts = {file: text for file, text in rename.tracked(folder).items() if file not in rename.CREDITS}
    return [(file, line) for file, text in texts.items() for line in text.splitlines() if re.search(code, line)]


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "words",
    [
        ["flower_classification"],
        [NEW, "--without", "serving"],
        [NEW, "--without", "serving,export"],
        [NEW, "--without", "benchmarks"],
        [NEW, "--without", "serving,benchmarks,export"],
    ],
    ids=" ".join,
)
def test_whole_suite_of_a_copy_passes(words, template, tmp_path):
    python(template, "scripts/rename.py", *words)
    git(template, "commit", "-q", "-m", "Rename")
    for room in (without.PARTS[part].room for part in (words[-1].split(",") if words[1:] else [])):
        assert not (template / room.replace(PACKAGE, words[0])).exists()
    assert mentions(template) == []
    python(template, "-m", "ruff", "check", ".")
    python(template, "-m", "mypy")
    require_no_dead_code(template)
    python(template, "-m", "pytest", "-q", "-m", "not full", "-n", "2", "--dist", "loadfile", "-k", "not set_up_says")


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / without.PARTS["serving"].room).exists(), reason="this fork has no serving to remove")
def test_later_changes_of_the_template_are_taken_over_and_own_ones_stay(template, tmp_path):
    fork = tmp_path / "fork"
    git(tmp_path, "clone", "-q", template, fork)
    python(fork, "scripts/rename.py", NEW, "--without", "serving")
    git(fork, "commit", "-q", "-m", "Rename")
    losses, optim = f"{PACKAGE}/losses.py", f"{PACKAGE}/optim.py"
    append(fork / NEW / "losses.py", "OURS = 1")
    git(fork, "commit", "-q", "-a", "-m", "Own loss")
    append(template / optim, f"from {PACKAGE} import losses  # noqa: E402, F401")
    append(template / PACKAGE / "serving" / "app.py", "UPSTREAM = 1")
    git(template, "commit", "-q", "-a", "-m", "Mend")
    python(fork, "scripts/rename.py", "--upgrade", str(template))
    assert f"from {NEW} import losses" in (fork / NEW / "optim.py").read_text()
    assert "OURS = 1" in (fork / NEW / "losses.py").read_text()
    assert not (fork / NEW / "serving").exists()
    assert git(template, "rev-parse", "HEAD").strip() in git(fork, "log", "-1", "--format=%B")
    assert "not changed" in python(fork, "scripts/rename.py", "--upgrade", str(template))
    append(template / PACKAGE / "serving" / "app.py", "UPSTREAM = 2")  # what the fork has not
    git(template, "commit", "-q", "-a", "-m", "Server")
    python(fork, "scripts/rename.py", "--upgrade", str(template))
    assert "not changed" in python(fork, "scripts/rename.py", "--upgrade", str(template))

    append(template / losses, "THEIRS = 1")  # where the fork has a line of its own
    git(template, "commit", "-q", "-a", "-m", "Loss")
    assert "git cherry-pick --continue" in python(fork, "scripts/rename.py", "--upgrade", str(template), code=2)
    assert "<<<<<<<" in (fork / NEW / "losses.py").read_text()


def append(file, line):
    file.write_text(f"{file.read_text()}\n{line}\n")
