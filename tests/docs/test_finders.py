"""The tables of docs/finders.md are what benchmarks/planted.py prints."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import plants
import pytest

ROOT = Path(__file__).parents[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "finders.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("|")
]


@pytest.fixture(scope="module")
def benchmark():
    spec = spec_from_file_location("benchmark_planted", ROOT / "benchmarks" / "planted.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", plants.NAMES)
def test_the_effects_of_planted_heads(benchmark, planted, name):
    case = planted(name)
    told = [row[1:] for row in ROWS if row[0] == f"`{name}`"]
    printed = benchmark.effects(case, benchmark.sets_of(name, case.carriers))
    assert [row[0] for row in told] == [row[0] for row in printed]
    for of_docs, of_run in zip(told, printed, strict=True):
        numbers = [[float(cell.replace("−", "-")) for cell in row[1:]] for row in (of_docs, of_run)]
        # Two roundings, and the kernels of another machine.
        assert numbers[0] == pytest.approx(numbers[1], abs=0.011)


def test_what_scores_put_first(benchmark, planted):
    header = next(row for row in ROWS if row[0] == "method" and f"`{plants.NAMES[0]}`" in row)
    told = {row[0]: dict(zip(header, row, strict=True)) for row in ROWS if len(row) == len(header)}
    for label, settings in benchmark.SCORES[::3]:  # the paper's PCS and the default among them
        assert benchmark.scored(planted("redundant"), settings) == told[label]["`redundant`"]
