"""The notebooks run from a clean kernel, and hold what they give."""

import re
from pathlib import Path

import nbformat
import pytest

from notebooks.execute import executed

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
FIGURE, PICTURE = "application/vnd.plotly.v1+json", "image/png"
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def outputs(notebook: nbformat.NotebookNode) -> list[dict]:
    """What the cells show, by kind; texts of a stream as text/plain."""
    shown = [one for cell in notebook.cells for one in cell.get("outputs", [])]
    return [dict(one.data) if "data" in one else {"text/plain": one.text} for one in shown]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_there(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    shown = outputs(notebook)
    assert all(PICTURE in one for one in shown if FIGURE in one), "a figure is a picture, too"
    assert any(FIGURE in one for one in shown)
    assert path.stat().st_size < 3 * 10**6


@pytest.mark.full
@pytest.mark.real
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_small_settings_run(path, tmp_path):
    shown = [kind for one in outputs(executed(path, tmp_path, {"DPS_LENS_SMALL": "1"})) for kind in one]
    assert FIGURE in shown, "a figure is shown"
    assert "text/html" in shown, "a table is shown"


@pytest.mark.real
@pytest.mark.full
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_what_execution_gives(path, tmp_path):
    """Texts and tables with their numbers to a hundredth; figures by their traces."""
    kept, now = outputs(nbformat.read(path, as_version=4)), outputs(executed(path, tmp_path, {"DPS_LENS_QUIET": "1"}))
    assert len(kept) == len(now)
    for before, after in zip(kept, now, strict=True):
        assert {*before} - {PICTURE} == {*after} - {PICTURE}
        for kind in ("text/plain", "text/html"):
            if kind in before and FIGURE not in before:
                texts = ["".join(one[kind]) for one in (before, after)]
                assert _NUMBER.sub("#", texts[0]) == _NUMBER.sub("#", texts[1])
                numbers = [[*map(float, _NUMBER.findall(text))] for text in texts]
                assert numbers[1] == pytest.approx(numbers[0], rel=0.01, abs=0.003)
        if FIGURE in before:
            assert [one["type"] for one in before[FIGURE]["data"]] == [one["type"] for one in after[FIGURE]["data"]]
