"""The parts of the template that a fork may do without, and how each is taken out. rename.py calls this."""

import ast
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Part:
    """What belongs to a part. Its verb, extra and target are found where they are written."""

    room: str  # where this folder is missing, so is the part
    paths: tuple[str, ...]
    verb: str | None = None
    extra: str | None = None
    target: str | None = None
    fixture: str | None = None  # tests that use it need the part
    requirements: tuple[str, ...] = ()  # of the extra dev, for this part alone
    before: str | None = None  # the part that needs this one, and has to go with it
    cuts: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)  # by file: patterns, and what stays


SHIP = (r" \[05-ship\]\(05-ship\.ipynb\),", "")  # the notebook about a bundle that is served
DEPLOY = (r"(, |、)`serving/` \| 05-ship ", " |  ")
MESSAGES = (r" The messages of `export`( and `serve` are on their own\npages| are on its own page)\.", "")
PARTS = {
    "serving": Part(
        room="project/serving",
        paths=(
            "project/commands/serve.py",
            "tests/serving",
            "docs/serve.md",
            "docs/serve.png",
            "notebooks/05-ship.ipynb",
            "Dockerfile",
            ".dockerignore",
            "requirements-serve.txt",
            "benchmarks/serve.py",
            "benchmarks/litserve.py",
        ),
        verb="serve",
        extra="serve",
        requirements=("litserve", "schemathesis"),
        cuts={
            "README.md": (
                *((r" serving/(?=──▶)", ""), (r"^\| serving.*\n", ""), DEPLOY, (r"\bsix(?=, from 01)", "five")),
                ("explains, exports and serves the", "explains and exports the"),
            ),
            "README.zh-CN.md": (
                *((r" serving/(?=──▶)", ""), (r"^\| 在线服务.*\n", ""), DEPLOY, ("共六个", "共五个")),
                ("解释、导出模型并提供在线服务", "解释并导出模型"),
            ),
            "docs/install.md": ((r"^## Only to serve\n[\s\S]*?(?=^## )", ""),),
            "docs/troubleshooting.md": ((r"( and `serve`) are on their own\npages\.", " are on its own page."),),
            "docs/parts.md": ((r"predict, export and serve load it", "predict and export load it"),),
            "SECURITY.md": ((r"^## What `serve` limits\n(?:.*\n)*?(?=^## )", ""), (r"^- `serve` has no TLS.*\n", "")),
            "notebooks/01-quickstart.ipynb": (SHIP,),
            "benchmarks/__main__.py": ((r"^from benchmarks.serve .*\n", ""), (", serve", "")),
            "tests/test_architecture.py": ((', "serving"', ""),),
            "tests/test_readme.py": ((r'"serve", (?="validate")', ""),),
            "docs/article.md": ((r"^\| a server that answers one image at a time.*\n", ""),),
            "docs/benchmarks.md": ((r"^## Serving\n[\s\S]*?(?=^## |\Z)", ""),),
            "Makefile": ((", serve(?=, bundle)", ""),),
            "tests/test_cli.py": ((r'^ *\("serve run .*\n', ""),),
            "tests/inference/test_bundle.py": ((r', \["serve", [^]]*\]', ""), (r'^ *"[^"]*": \["serve", .*\n', "")),
        },
    ),
    "export": Part(  # bundles that were made elsewhere are read on, for which the extra stays
        room="project/export",
        paths=(
            "project/commands/export.py",
            "tests/export",
            "docs/export.md",
            "notebooks/05-ship.ipynb",
            "benchmarks/bundle.py",
        ),
        verb="export",
        before="serving",
        fixture="packed",
        cuts={
            "README.md": (
                *((" export/(?= serving/──▶|──▶)", ""), (r"^.*`export/`(.*05-ship)?.* \|\n", "")),
                (r"tests, explains(, exports and serves| and exports) the", "tests and explains the"),
                (r"`validate`, `report` and `export` use", "`validate` and `report` use"),
                (r"^\| predicting one image with the exported bundle.*\n", ""),
            ),
            "README.zh-CN.md": (
                *((" export/(?= serving/──▶|──▶)", ""), (r"^.*`export/`(.*05-ship)?.* \|\n", "")),
                (r"测试、解释(、导出模型并提供在线服务|并导出模型)", "测试并解释模型"),
                (r"^\| 用导出包预测一张图像.*\n", ""),
            ),
            "docs/troubleshooting.md": (MESSAGES,),
            "pyproject.toml": (
                (r'^  "onnx(script)?>.*\n', ""),
                (r'^  "format_difference", ', '  "seal", "git_commit", "export", "format_difference", '),  # of bundles
            ),
            "docs/parts.md": (
                (r"So `export` compares on generated images, `--quantize` is refused, and the", "So the"),
                (
                    r"predict(, export and serve| and export) load it alone, and need",
                    "predict loads it alone, and needs",
                ),
            ),
            "project/inference/hub.py": (
                (r"\n\n\ndef push\([\s\S]*\Z", "\n"),
                ("; give one that `export --push` has made", ""),
            ),
            "project/inference/bundle.py": ((r" by python -m project\.cli export", ""),),
            "project/inference/load.py": (("; make another bundle by export --calibrated", ""),),
            "notebooks/01-quickstart.ipynb": (SHIP,),
            "benchmarks/__main__.py": ((r"^from benchmarks.bundle .*\n", ""), (", bundle", "")),
            "docs/benchmarks.md": ((r"^## Bundles\n[\s\S]*?(?=^## |\Z)", ""),),
            "Makefile": ((", bundle(?=, accuracy)", ""),),
            "tests/test_architecture.py": ((', "export"', ""),),
            "tests/test_drills.py": ((r'^ *\["export", .*\n', ""), (r'^ *assert load\("bundle"\).*\n', "")),
        },
    ),
    "benchmarks": Part(
        room="benchmarks",
        paths=("docs/benchmarks.md", "tests/test_benchmarks.py"),
        target="bench",
        requirements=("litserve",),
        cuts={
            "pyproject.toml": ((', "benchmarks"', ""),),
            "README.md": ((r"\[docs/benchmarks\.md\]\(docs/benchmarks\.md\) and\n(.*) say how", r"\1 says how"),),
            "docs/data.md": (
                (r"\[benchmarks\.md\].* has the speed; to measure it on your", "To measure the speed on your"),
            ),
            "docs/training.md": ((r" Comparisons with other\nprograms are in \[benchmarks\.md\].*", ""),),
            "docs/article.md": ((r" \[benchmarks\.md\].* has the machine and the dates of the figures\.", ""),),
            "README.zh-CN.md": ((r"\[docs/benchmarks\.md\]\(docs/benchmarks\.md\) 和\s", ""),),
            "Makefile": ((" benchmarks scripts", " scripts"),),
            "project/cli.py": ((r"^MOVED_BENCHMARKS.*\n", ""), (r"^    if .* in MOVED_BENCHMARKS\).*\n.*\n", "")),
            "tests/test_cli.py": ((r'^ *\("bench accuracy .*\n', ""),),
        },
    ),
}


def remove(root: Path, name: str) -> None:
    """Removes a part: its files, and what other files say of it."""
    part = PARTS[name]
    gone = [file for path in (part.room, *part.paths) for file in _delete(root / path)]
    pages = [file.name for file in gone if file.parent.name == "docs"]
    for file, cuts in part.cuts.items():
        for pattern, rest in cuts:
            _edit(root / file, lambda text, p=pattern, r=rest: re.sub(p, r, text, flags=re.MULTILINE))
    for page in (*root.glob("*.md"), *root.glob("docs/**/*.md")):
        _edit(page, lambda text: _page(text, part, pages))
    _edit(root / "Makefile", lambda text: _makefile(text, part))
    _edit(root / "pyproject.toml", lambda text: _pyproject(text, part))
    _edit(root / "project" / "cli.py", lambda text: re.sub(rf'^    "{part.verb}": .*\n', "", text, flags=re.MULTILINE))
    options = root / "tests" / "contracts" / "options.json"
    kept = {verb: words for verb, words in json.loads(options.read_text()).items() if verb != part.verb}
    _edit(options, lambda text: text if part.verb is None else json.dumps(kept, indent=1) + "\n")
    _tests(root, part, {str(file.relative_to(root)) for file in gone})


def _delete(path: Path) -> list[Path]:
    """Deletes a file or folder; returns the files."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path] * path.exists()
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    return files


def _edit(file: Path, change: Callable[[str], str]) -> None:
    """Changes the text of a file, if it is there."""
    if file.exists():
        file.write_text(change(file.read_text("utf-8")), "utf-8")


def _page(text: str, part: Part, pages: list[str]) -> str:
    """A Markdown page without the rows, commands and paragraphs of the part, and without links to its pages."""
    verb = part.verb or "/"  # which no page has as a verb
    command = rf"\.cli {verb}\b|\bmake {part.target}\b"
    word = f"`{verb}`"  # among others, in English or Chinese
    named = rf",\s{word}(?=[\s,)])|{word},\s|\sand\s{word}|、{word}|{word}、|\s和\s{word}"
    row = rf"^\|[^\n]*({word}|\({'|'.join(map(re.escape, pages)) or '-'}\)|make {part.target}\b)[^\n]*\n"
    kept = []
    for number, block in enumerate(re.split(r"^(```.*?^```\n)", text, flags=re.DOTALL | re.MULTILINE)):
        if number % 2:  # code: without its commands, and without its folders in the tree
            lines = block.replace("\\\n", "\0").splitlines(keepends=True)
            lines = [line for line in lines if not re.search(command, line)]
            lines = [line for line in lines if not re.match(rf" *{Path(part.room).name}/ ", line)]
            kept.append("".join(lines).replace("\0", "\\\n") * (len(lines) > 2))
        else:
            block = re.sub(named, "", re.sub(row, "", block, flags=re.MULTILINE))
            paragraphs = re.split(r"(\n{2,})", block)
            kept += ["" if re.search(command, paragraph) else paragraph for paragraph in paragraphs]
    for page in pages:
        kept = [re.sub(rf"!?\[([^]]*)\]\((?:\.\./|docs/)*{re.escape(page)}(#[^)]*)?\)", r"\1", block) for block in kept]
    return re.sub(r"\n{3,}", "\n\n", "".join(kept)).rstrip("\n") + "\n"


def _makefile(text: str, part: Part) -> str:
    text = re.sub(rf"^{part.target}:.*\n(\t.*\n)*\n?", "", text, flags=re.MULTILINE)
    return re.sub(rf"^(\.PHONY:.*) {part.target}\b", r"\1", text, flags=re.MULTILINE)


def _pyproject(text: str, part: Part) -> str:
    text = re.sub(rf"^{part.extra} = \[\n(  .*\n)*\]\n", "", text, flags=re.MULTILINE)
    text = re.sub(rf'^"{part.room.replace("/", ".")}" = .*\n', "", text, flags=re.MULTILINE)
    text = re.sub(rf"(\[[\w,]*?)\b{part.extra},|,{part.extra}(?=\])", r"\1", text)
    for requirement in part.requirements:
        text = re.sub(rf'^  "{requirement}[^a-z-].*\n', "", text, flags=re.MULTILINE)
    return text


def _tests(root: Path, part: Part, gone: set[str]) -> None:
    """Removes the tests and fixtures that use what is gone, then the helpers and files that no test needs any more."""
    modules = {file.removesuffix(".py").replace("/", ".") for file in gone if file.endswith(".py")}
    modules |= {module.removesuffix(".__init__") for module in modules}
    files = {file: file.read_text("utf-8") for file in (root / "tests").rglob("*.py")}
    shared = {part.fixture} - {None}  # names of removed fixtures of conftest.py
    for file in sorted(files, key=lambda file: file.name != "conftest.py"):
        code = ast.parse(files[file])
        lost: dict[str, ast.stmt] = {}
        missing = shared | _imported(code, modules)
        functions = [node for node in code.body if isinstance(node, ast.FunctionDef)]
        while new := [
            n for n in functions if n.name not in lost and (_needs(n, part) or _used(n) & (missing | {*lost}))
        ]:
            lost |= {node.name: node for node in new}
        if file.name == "conftest.py":
            shared |= {*lost}
        remaining = [node.name for node in functions if node.name not in lost]
        if lost and not any(name.startswith("test_") for name in remaining) and file.name.startswith("test_"):
            file.unlink()
            continue
        is_shared = not file.name.startswith("test_")  # its functions are used elsewhere
        while unused := [
            n for n in functions if lost and not is_shared and n.name not in lost and not _is_used(n, code, lost)
        ]:
            lost |= {node.name: node for node in unused}
        lines = files[file].splitlines(keepends=True)
        for node in sorted(lost.values(), key=lambda node: -node.lineno):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            while first > 1 and lines[first - 2].startswith("#"):
                first -= 1
            del lines[first - 1 : node.end_lineno]
        if lost:
            file.write_text("".join(lines), "utf-8")


def _imported(code: ast.Module, modules: set[str]) -> set[str]:
    """The names that a file imports from the modules."""
    names = set()
    for node in code.body:
        if isinstance(node, ast.Import):
            names |= {(each.asname or each.name).partition(".")[0] for each in node.names if each.name in modules}
        elif isinstance(node, ast.ImportFrom):
            for each in node.names:
                if {node.module, f"{node.module}.{each.name}"} & modules:
                    names.add(each.asname or each.name)
    return names


def _used(node: ast.AST) -> set[str]:
    """Names, arguments and texts in a function; pytest.mark.usefixtures has a fixture's name as a text."""
    nodes = list(ast.walk(node))
    used = {each.id for each in nodes if isinstance(each, ast.Name)} | {n.arg for n in nodes if isinstance(n, ast.arg)}
    return used | {each.value for each in nodes if isinstance(each, ast.Constant) and isinstance(each.value, str)}


def _needs(node: ast.AST, part: Part) -> bool:
    """Whether a function runs the part's verb, or names the part's folder at the root."""
    words = {part.verb, part.room if "/" not in part.room else None} - {None}
    return any(text == word or text.startswith(f"{word} ") for text in _used(node) for word in words)


def _is_used(function: ast.FunctionDef, code: ast.Module, lost: dict[str, ast.stmt]) -> bool:
    """Whether pytest or another function of the file that stays calls the function."""
    others = [node for node in code.body if node is not function and node not in lost.values()]
    return function.name.startswith("test_") or any(function.name in _used(node) for node in others)
