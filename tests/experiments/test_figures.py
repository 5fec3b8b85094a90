"""The figures of a paper, from a run folder."""

import shutil
import subprocess
import sys

import pytest
from pcs import score_pcs

import dps_lens as dps
from figures.__main__ import FILES, NAMES


@pytest.fixture(scope="module")
def run(tinies, probe, tmp_path_factory):
    """What `dps-lens demo` leaves."""
    model, out = tinies("llama").hooked, tmp_path_factory.mktemp("run")
    config = dps.PromptConfig(items=2, profile_tokens=60, task_tokens=20, response_tokens=6)
    scores = score_pcs(model, probe[:6], max_examples=2, out=out, prompt_config=config)
    options = {"gammas": (0.5, 1.0), "ks": (1, 2), "max_new_tokens": 4, "max_users": 2, "k": 3}
    dps.explore(model, probe[:6], scores, out=out / "page", **options)
    return out


def test_one_command_draws_all(run, tmp_path, browser_path):
    done = subprocess.run(
        [sys.executable, "-m", "figures", "--run", run, "--out", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {file.name for file in tmp_path.iterdir()} == {f"{n}.{e}" for n in NAMES for e in (*FILES, "txt")}
    assert (tmp_path / "stability.txt").read_text(encoding="utf-8").startswith("How many users a stable top ten needs.")
    assert "warn" not in done.stderr.lower()


@pytest.mark.full
def test_what_a_run_lacks_is_named_and_the_rest_is_drawn(run, tmp_path, browser_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("page"))
    command = [sys.executable, "-m", "figures", "--run", tmp_path / "run", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("pareto", "k_sweep"):
        assert f"{name} is not drawn: " in done.stderr
    assert {file.stem for file in (tmp_path / "out").iterdir()} == {*NAMES} - {"pareto", "k_sweep"}


@pytest.mark.full
def test_a_script_alone_draws_one(run, tmp_path, browser_path):
    command = [sys.executable, "-m", "figures.stability", "--run", run, "--out", tmp_path, "--column", "neurips"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "stability.pdf").read_bytes().startswith(b"%PDF")
