"""The notebooks run from start to end, in a copy of the project's folder."""

import os
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # Jupyter's own
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            ["--model.name", "squeezenet1_1", "--trainer.max_epochs", "1"], marks=pytest.mark.slow, id="brief"
        ),
        pytest.param([], marks=pytest.mark.full, id="unchanged"),
    ],
)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_notebook_runs(notebook, options, workplace):
    (workplace / "notebooks").mkdir()
    shutil.copy(notebook, workplace / "notebooks")
    book = nbformat.read(workplace / "notebooks" / notebook.name, as_version=4)
    for cell in book.cells:
        cell.source = cell.source.replace('main(["fit"])', f"main({['fit', *options]})")
    client = NotebookClient(book, timeout=500, resources={"metadata": {"path": str(workplace / "notebooks")}})
    client.execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert (workplace / "runs" / "latest" / "test_metrics.json").exists()
    if target := os.environ.get("KEEP_NOTEBOOKS"):  # to look at
        nbformat.write(book, Path(target) / notebook.name)


def test_notebooks_are_kept_without_output_and_define_nothing():
    for notebook in NOTEBOOKS:
        for cell in nbformat.read(notebook, as_version=4).cells:
            assert not cell.get("outputs")
            assert "def " not in cell.source
            assert "class " not in cell.source or cell.cell_type == "markdown"
