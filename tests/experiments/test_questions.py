"""Every experiment, end to end on a small random model and probe users."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
import yaml

from experiments.lib.harness import main
from figures.__main__ import EXPERIMENTS, FILES

CONFIGS = Path(__file__).parents[2] / "experiments" / "configs"
QUESTIONS = sorted(file.stem for file in CONFIGS.parent.glob("q*.py"))
NAMES = {
    name.partition("_")[2]: name for name in QUESTIONS if (CONFIGS / f"{name.partition('_')[2]}_smoke.yaml").is_file()
}
LONG = {
    "artefact",
    "benchmark",
    "factors",
    "families",
    "finders",
    "integration",
    "mechanism",
    "pairs",
    "race",
    "rules",
    "steering",
}


@pytest.fixture
def smoke(tiny_folders, tmp_path):
    """Runs a smoke config on a small model; gives its run folder."""

    def run(name: str, out: str = "run", **changes) -> Path:
        module = import_module(f"experiments.{NAMES[name]}")
        values = yaml.safe_load((CONFIGS / f"{name}_smoke.yaml").read_text(encoding="utf-8"))
        values |= {"model": str(tiny_folders["llama"]), "scores": str(tmp_path / "scores"), **changes}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
        options = ["--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / out)]
        main(name, module.__doc__, getattr(module, name.capitalize()), module.measure, options)
        return tmp_path / out

    return run


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] * (name in LONG), id=name) for name in NAMES]
)
def test_an_experiment_runs_decides_and_repeats_itself(name, smoke):
    out = smoke(name)
    claims = json.loads((out / "verdict.json").read_text())
    assert claims
    assert {claim["outcome"] for claim in claims} <= {"supported", "not supported", "undecided"}
    tables = {file.name: file.read_bytes() for file in (out / "tables").iterdir()}
    assert all(len(pd.read_csv(out / "tables" / name)) for name in tables)
    assert (
        import_module(f"experiments.{NAMES[name]}").__doc__.strip().splitlines()[0] in (out / "results.md").read_text()
    )
    for script in (script for script, folder in EXPERIMENTS.items() if folder.removesuffix("_kl") == name):
        assert import_module(f"figures.{script}").draw(out).data
    again = smoke(name, "again")
    assert {file.name: file.read_bytes() for file in (again / "tables").iterdir()} == tables
    assert (again / "verdict.json").read_bytes() == (out / "verdict.json").read_bytes()


def test_a_docstring_says_beforehand_what_decides():
    for name, module in NAMES.items():
        about = import_module(f"experiments.{module}").__doc__
        for part in ("Question.", "Hypothes", "Measure.", "Control.", "Decision rule"):
            assert part in about, (name, part)


def test_a_second_model_is_compared(smoke, tiny_folders):
    out = smoke("transfer", second=str(tiny_folders["gpt2"]))
    claims = json.loads((out / "verdict.json").read_text())
    assert [claim["hypothesis"] for claim in claims][2:] == ["the same relative depth", "the same users are alike"]
    names = [tiny_folders[architecture].name for architecture in ("llama", "gpt2")]
    assert pd.read_csv(out / "tables" / "depth.csv")["model"].tolist() == names


@pytest.mark.full
def test_one_command_draws_what_was_run(smoke, tmp_path, browser_path):
    smoke("existence", "runs/existence")
    command = [sys.executable, "-m", "figures", "--experiments", tmp_path / "runs", "--out", tmp_path / "drawn"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {file.name for file in (tmp_path / "drawn").iterdir()} == {f"existence.{end}" for end in (*FILES, "txt")}
