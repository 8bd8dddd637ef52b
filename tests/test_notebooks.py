"""The notebooks run from start to end, in a copy of the project's folder, and are kept without what that leaves."""

import ast
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NAMES = sorted(notebook.stem for notebook in FOLDER.glob("*.ipynb"))
BRIEF = ["--model.name", "squeezenet1_1", "--data.image_size", "64", "--trainer.max_epochs", "1"]
# Of each notebook: the number of pictures in its outputs, patterns of files that it leaves, and words that it prints.
LEFT = {
    "01-quickstart": (2, ["runs/latest/test_metrics.json", "runs/latest/report.html"], ["report.html"]),
    "02-own-images": (
        3,
        ["data/notebook-02/leave-out.csv", "runs/notebook-02-*/*/test_metrics.json"],
        ["8/damaged.png", "9/copy.png", "--data.balance none", "--data.balance loss"],
    ),
    "03-transfer-learning": (
        1,
        ["data/notebook-03.csv", "runs/notebook-03-source/*/split.csv", "runs/notebook-03-*/*/test_metrics.json"],
        ["the head is new", "probe", "finetuned"],
    ),
    "04-explain": (
        6,
        ["runs/notebook-04/*/report.html", "runs/notebook-04/*/*/contact-sheet.png"],
        ["explained by gradcam", "explained by ig", "explained by occlusion", "temperature"],
    ),
    "05-ship": (
        0,
        ["runs/notebook-05/*/bundle/model.onnx", "runs/notebook-05/*/bundle/SHA256SUMS"],
        ["the same labels", "calibrated probabilities", '"ok"', " by resnet18-", "exit code 143"],
    ),
    "06-library": (
        1,
        ["runs/notebook-06-trainer/*/*/checkpoints/*.ckpt", "runs/latest/config.yaml"],
        ["val/loss", "test/f1"],
    ),
}


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # Jupyter's own
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("01-quickstart", BRIEF, marks=pytest.mark.slow, id="01-quickstart-brief"),
        *(pytest.param(name, [], marks=pytest.mark.full, id=name) for name in NAMES),
    ],
)
def test_notebook_runs_and_leaves_what_it_shows(name, options, workplace):
    folder = workplace / "notebooks"  # the notebook changes to the one above
    folder.mkdir()
    shutil.copytree(ROOT / "configs", workplace / "configs")
    book = read(name)
    for cell in book.cells if options else []:
        cell.source = cell.source.replace('["fit", "--trainer.max_epochs", "6"]', f"{['fit', *options]}")
    NotebookClient(book, timeout=500, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    pictures, patterns, words = LEFT[name]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == pictures
    for pattern in patterns:
        assert any(workplace.glob(pattern)), pattern
    printed = "".join(output.get("text", "") for output in outputs)
    assert [word for word in words if word not in printed] == []


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_kept_without_outputs_and_defines_nothing(name):
    book = read(name)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert book.metadata == {"kernelspec": kernel, "language_info": {"name": "python"}}
    assert (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8") == nbformat.writes(book, version=4) + "\n"
    for cell in book.cells:
        assert not cell.metadata
        if cell.cell_type == "code":
            assert cell.execution_count is None
            assert cell.outputs == []
            nodes = {type(node) for node in ast.walk(ast.parse(TransformerManager().transform_cell(cell.source)))}
            assert not nodes & {ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef}, cell.id
            assert len([line for line in cell.source.splitlines() if line]) <= 12, cell.id


@pytest.mark.parametrize("name", NAMES)
def test_notebook_says_which_chapter_of_the_article_it_does_and_names_files_that_exist(name):
    texts = [cell.source for cell in read(name).cells if cell.cell_type == "markdown"]
    assert re.match(r"# .+\n\nThis notebook does the article's chapters? on ", texts[0])
    for target in re.findall(r"\]\(([^)]+)\)", "\n".join(texts)):
        assert (FOLDER / target).exists(), target
    for file in re.findall(r"\b(?:docs|configs)/[\w-]+\.\w+", "\n".join(texts)):
        assert (ROOT / file).exists(), file
