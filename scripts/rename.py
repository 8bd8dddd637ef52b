"""Makes this template a project of your own: make rename NAME=flowers [WITHOUT=serving,benchmarks,export].

Renames the package, the distribution and the console script wherever they are written, and removes the parts that
WITHOUT names, with their verbs, extras, tests and pages. The changes are staged, not committed, so that git shows and
undoes them. WITHOUT works without NAME, too.
"""

import argparse
import importlib.metadata
import importlib.util
import io
import keyword
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import without

LEFT_ALONE = "tests/contracts/run/"  # files of an earlier release, with their checksums
CREDITS = ("LICENSE", "CITATION.cff", "CHANGELOG.md")  # name the template's authors and releases
TEMPLATE = "Template-Commit"  # a line of an upgrade's message: up to where the template was taken over
SHELL = {"Makefile", "Dockerfile", ".dockerignore"}  # with *.sh and *.yml: each word before a # may be the folder


class Mistake(Exception):
    """Something for the user to mend, in one sentence."""


def git(*words: str | Path, root: Path = Path()) -> str:
    """Runs git; returns what it prints."""
    done = subprocess.run(["git", "-C", root, *words], capture_output=True, text=True)
    if done.returncode:
        raise Mistake(f"git {words[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def tracked(root: Path) -> dict[str, str]:
    """The text files that git knows, by name."""
    texts = {}
    for name in filter(None, git("ls-files", "-z", root=root).split("\0")):
        file = root / name
        if file.is_file() and not name.startswith(LEFT_ALONE):
            try:
                texts[name] = file.read_bytes().decode()
            except UnicodeDecodeError:
                continue
    return texts


def names(root: Path) -> tuple[str, str]:
    """The names of the package and of the distribution, from pyproject.toml."""
    table = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    return table["scripts"][table["name"]].partition(".")[0], table["name"]


def require_name(name: str, root: Path) -> None:
    """Refuses what cannot be the package's name."""
    if not re.fullmatch("[a-z][a-z0-9_]{1,29}", name):
        raise Mistake(f"{name!r} cannot name a package; use 2 to 30 of a-z, 0-9 and _, a letter first.")
    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        raise Mistake(f"{name} is a keyword of Python; choose another name.")
    if name in sys.stdlib_module_names:
        raise Mistake(f"{name} is a module of Python's standard library; choose another name.")
    if name in importlib.metadata.packages_distributions() or (root / name).exists():
        raise Mistake(f"{name} is an installed package or a folder here; choose another name.")
    for file, text in tracked(root).items():
        if file.endswith(".py") and re.search(rf"\b{name}\b", text):
            for token in tokenize.generate_tokens(io.StringIO(text).readline):
                if (token.type, token.string) == (tokenize.NAME, name):
                    raise Mistake(f"{name} is a name in the code, {file}:{token.start[0]}; choose another name.")


def renamed(text: str, file: str, old: str, new: str) -> str:
    """The text with the new name where the word is the package, and not where it is a word of a sentence."""
    places = [
        rf"(?<![\w.[-]){old}(?=\\?\.[A-Za-z_{{*(]|/)",  # project.cli, project\.cli, project/cli.py
        rf"(?<!\)\[.)(?<=[\"'`]){old}(?=\*?[\"'`])",  # "project", but not ["project"], a table of pyproject.toml
        rf"(?<=\bfrom ){old}(?= import\b)|(?<=\bimport ){old}\b|(?<=\bimport sys, ){old}\b|(?<=-m ){old}\b",
    ]
    if Path(file).name in SHELL or Path(file).suffix in (".sh", ".yml"):
        places.append(rf"(?<![\w.#'-]){old}\b(?![-'])")
    for place in places:
        text = re.sub(place, new, text)
    return re.sub(rf"\b{old.upper()}_", f"{new.upper()}_", text)


def rename(root: Path, name: str) -> None:
    """Renames the package, the distribution and the console script."""
    (old, old_distribution), distribution = names(root), name.replace("_", "-")
    alone = re.escape(old_distribution)
    if old == old_distribution:  # of a fork: its name is also a word of sentences, and may be a part of the new one
        alone = rf"(?<=[`\"\[]){alone}(?=[ \[\]])|^{alone}(?= = )|(?<=^name = \"){alone}(?=\")"
    for file, text in tracked(root).items():
        changed = text if file in CREDITS else re.sub(alone, distribution, text, flags=re.MULTILINE)
        changed = renamed(changed, file, old, name)
        if changed != text:
            (root / file).write_bytes(changed.encode())
    git("mv", old, name, root=root)
    shutil.rmtree(root / old, ignore_errors=True)  # what git does not know: __pycache__
    shutil.rmtree(root / f"{old_distribution.replace('-', '_')}.egg-info", ignore_errors=True)


def tidy(root: Path, package: str) -> None:
    """Sorts imports, drops unused ones, wraps lines that have become too long, and measures the ceilings again."""
    for words in (["check", "--fix", "--select", "I,F401,F811"], ["format"]):
        if subprocess.run([sys.executable, "-m", "ruff", *words, "--quiet", "."], cwd=root).returncode:
            raise Mistake(f"ruff {words[0]} failed; its message is above.")
    sources = {name: text.splitlines() for name, text in tracked(root).items() if name.endswith(".py")}
    lengths = [len(lines) for name, lines in sources.items() if name.startswith(f"{package}/")]
    lines = sum(lengths) // 1000 * 1000 + 1000  # room for the fork's own
    file = root / "tests" / "test_architecture.py"
    ceilings = r"^(ENTRIES, LINES, FILE, .* = \d+, )[\d_]+, (\d+),"
    text = re.sub(
        ceilings,
        lambda match: f"{match[1]}{lines:_}, {max(int(match[2]), *lengths)},",
        file.read_text("utf-8"),
        flags=re.MULTILINE,
    )
    file.write_text(text, "utf-8")
    longest = max(len(line) for text in sources.values() for line in text)
    if longest > 120:  # texts and comments, which are not wrapped
        file = root / "pyproject.toml"
        rule = "[tool.ruff.lint.pycodestyle]\nmax-line-length = "
        text = re.sub(re.escape(rule) + r"\d+\n\n", "", file.read_text("utf-8"))
        before = "[tool.ruff.lint.pydocstyle]"
        file.write_text(text.replace(before, f"{rule}{longest}\n\n{before}"), "utf-8")


def apply(root: Path, name: str, parts: list[str]) -> None:
    """Removes the parts and renames, in a folder under git; commits nothing."""
    for part in parts:
        without.remove(root, part)
    git("add", "--all", root=root)
    if name != names(root)[0]:
        rename(root, name)
    tidy(root, name)
    git("add", "--all", root=root)


def upgrade(root: Path, address: str) -> None:
    """Adds what has changed in the template at an address since it was forked or last upgraded, as one commit.

    The template as it was then and as it is now are renamed as this fork is; the difference between the two is picked.
    """
    git("fetch", "--quiet", address, "HEAD", root=root)
    latest, package = git("rev-parse", "FETCH_HEAD", root=root), names(root)[0]
    taken = git("log", "-1", f"--grep=^{TEMPLATE}: ", f"--format=%(trailers:key={TEMPLATE},valueonly)", root=root)
    if not taken:
        related = subprocess.run(["git", "-C", root, "merge-base", "HEAD", latest], capture_output=True, text=True)
        # a fork made by GitHub's "Use this template" has a history of its own, which begins with the template's files
        taken = related.stdout.strip() or git("rev-list", "--max-parents=0", "HEAD", root=root).splitlines()[-1]
    if taken == latest:
        print("The template has not changed since.")
        return
    parts = [part for part, each in without.PARTS.items() if not (root / each.room).exists()]
    commit = None
    with tempfile.TemporaryDirectory() as folder:
        scripts = Path(folder, "scripts")
        scripts.mkdir()
        for file in ("rename.py", "without.py"):  # those of the template as it is now, for both
            (scripts / file).write_text(git("show", f"{latest}:scripts/{file}", root=root) + "\n", "utf-8")
        for number, version in enumerate((taken, latest)):
            tree = Path(folder, str(number))
            git("worktree", "add", "--quiet", "--detach", tree, version, root=root)
            try:
                words = [package, "--without", ",".join(parts), "--here"]
                subprocess.run([sys.executable, scripts / "rename.py", *words], cwd=tree, check=True)
                message = f"Template as of {version[:12]}\n\n{TEMPLATE}: {version}"
                parent = ["-p", commit] if commit else []
                commit = git("commit-tree", git("write-tree", root=tree), *parent, "-m", message, root=root)
            finally:
                git("worktree", "remove", "--force", tree, root=root)
    if subprocess.run(["git", "-C", root, "cherry-pick", "--allow-empty", commit]).returncode:
        raise Mistake(
            "both have changed the same lines; edit these files, git add them, then: git cherry-pick --continue"
        )


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", help="the package's new name")
    parser.add_argument("--without", default="", help=f"parts to remove, of {', '.join(without.PARTS)}")
    parser.add_argument(
        "--upgrade", nargs="?", const="", metavar="ADDRESS", help="take over what has changed in the template there"
    )
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # checked already, by --upgrade
    options, root = parser.parse_args(), Path.cwd()
    try:
        given = options.without.replace(",", " ").split()
        parts = [part for part in without.PARTS if part in given]  # what is cut depends on their order
        if unknown := {*given} - {*parts}:
            raise Mistake(f"there is no part {', '.join(sorted(unknown))}; the parts are {', '.join(without.PARTS)}.")
        for part in parts:
            if (
                (other := without.PARTS[part].before)
                and other not in parts
                and (root / without.PARTS[other].room).exists()
            ):
                raise Mistake(f"{other} needs {part}; remove both: WITHOUT={other},{options.without}")
        if options.here:
            apply(root, options.name, parts)
            return
        going = [path for part in parts for path in (without.PARTS[part].room, *without.PARTS[part].paths)]
        changed = git("status", "--porcelain", root=root).splitlines()
        if going:  # what git ignores there would be lost, too
            status = git("status", "--porcelain", "--ignored", "--", *going, root=root).splitlines()
            changed += [line for line in status if line.startswith("!!") and "__pycache__" not in line]
        if changed:
            found = ", ".join(line.split(maxsplit=1)[1] for line in changed[:3])
            raise Mistake(f"{found}: not committed; commit, stash or remove it first, then git can undo this.")
        if gone := [part for part in parts if not (root / without.PARTS[part].room).exists()]:
            raise Mistake(f"{', '.join(gone)}: not there any more; leave it out of WITHOUT.")
        if options.upgrade == "":
            raise Mistake("give the template's address: make upgrade FROM=https://github.com/OWNER/TEMPLATE")
        if options.upgrade:
            upgrade(root, options.upgrade)
            return
        if not options.name and not parts:
            raise Mistake("give the new name: make rename NAME=flowers")
        if importlib.util.find_spec("ruff") is None:
            raise Mistake("ruff is needed, which sorts and wraps what has become longer; run: make install")
        package, old = names(root)
        if options.name:
            require_name(options.name, root)
        try:
            apply(root, options.name or package, parts)
        except BaseException:
            git("reset", "--hard", "--quiet", root=root)
            raise
        if options.name and Path(sys.prefix) == root / ".venv":
            subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", old], check=False)
        print("Done. Look: git diff --cached --stat. Try: make test. Keep: git commit. Undo: git reset --hard")
    except Mistake as mistake:
        print(f"rename: {mistake}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
