"""The notebooks run from start to end, in a copy of the project's folder."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
BRIEF = ["--model.name", "squeezenet1_1", "--data.image_size", "64", "--trainer.max_epochs", "1"]


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # Jupyter's own
@pytest.mark.parametrize(
    "options", [pytest.param(BRIEF, marks=pytest.mark.slow), pytest.param([], marks=pytest.mark.full)]
)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_notebook_runs(notebook, options, workplace):
    folder = workplace / "notebooks"  # the notebook changes to the one above
    folder.mkdir()
    book = nbformat.read(notebook, as_version=4)
    for cell in book.cells:
        cell.source = cell.source.replace('main(["fit"])', f"main({['fit', *options]})")
    NotebookClient(book, timeout=500, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert (workplace / "runs" / "latest" / "test_metrics.json").exists()


def test_notebooks_are_kept_without_output_and_define_nothing():
    for notebook in NOTEBOOKS:
        for cell in nbformat.read(notebook, as_version=4).cells:
            assert not cell.get("outputs")
            assert "def " not in cell.source
            assert "class " not in cell.source or cell.cell_type == "markdown"
