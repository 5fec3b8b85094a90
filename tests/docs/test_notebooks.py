"""The notebooks run from a clean kernel, and carry no outputs."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def executed(path: Path, tmp_path: Path, small: bool) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    environment = {name: value for name, value in os.environ.items() if name != "DPS_LENS_SMALL"}
    environment |= {"DPS_LENS_SMALL": "1"} if small else {}
    client = NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}})
    return client.execute(env=environment)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.real
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.full] * (path.stem != "quickstart"), id=path.stem) for path in NOTEBOOKS],
)
def test_small_settings_run(path, tmp_path):
    done = executed(path, tmp_path, small=True)
    shown = [kind for cell in done.cells for one in cell.get("outputs", []) for kind in one.get("data", {})]
    assert "application/vnd.plotly.v1+json" in shown, "a figure is shown"
    assert "text/html" in shown, "a table is shown"


@pytest.mark.real
@pytest.mark.full
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_full_settings_run(path, tmp_path):
    executed(path, tmp_path, small=False)
