"""Runs on disk: resume, refuse, recover."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from folders import digest

import dps_lens as dps
from dps_lens.errors import RunError
from dps_lens.runs import RunFolder
from dps_lens.scoring.sweep import Sweep


@pytest.fixture
def options(short):
    return {"max_examples": 2, "prompt_config": short}


def counting(monkeypatch, fail_after=None):
    calls = []
    real = Sweep.make

    def unit(self, key, given=None):
        if fail_after is not None and len(calls) == fail_after:
            raise KeyboardInterrupt
        calls.append(key)
        return real(self, key, given)

    monkeypatch.setattr(Sweep, "make", unit)
    return calls


def test_an_interrupted_run_resumes_and_equals_an_uninterrupted_one(llama, probe, options, tmp_path, monkeypatch):
    dps.score_heads(llama.hooked, probe[:3], out=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        counting(patch, fail_after=4)
        with pytest.raises(KeyboardInterrupt):
            dps.score_heads(llama.hooked, probe[:3], out=tmp_path / "cut", **options)
    assert not (tmp_path / "cut" / "scores.json").exists()
    calls = counting(monkeypatch)
    dps.score_heads(llama.hooked, probe[:3], out=tmp_path / "cut", **options)
    assert len(calls) == 2
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    dps.score_heads(llama.hooked, probe[:3], out=tmp_path / "cut", **options)
    assert len(calls) == 2
    dps.score_heads(llama.hooked, probe[:3], out=tmp_path / "cut", run_config=dps.RunConfig(force=True), **options)
    assert len(calls) == 8


def test_a_torn_unit_is_computed_again(llama, probe, options, tmp_path, monkeypatch):
    dps.score_heads(llama.hooked, probe[:2], out=tmp_path, **options)
    before = digest(tmp_path)
    torn = sorted((tmp_path / "units").iterdir())[1]
    torn.write_bytes(torn.read_bytes()[:40])
    calls = counting(monkeypatch)
    with pytest.warns(UserWarning, match="is not whole"):
        dps.score_heads(llama.hooked, probe[:2], out=tmp_path, **options)
    assert len(calls) == 1
    assert digest(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ablation": "uniform"}, 'ablation was "zero", now "uniform"'),
        ({"against": None}, "against was"),
        ({"max_examples": 1}, "examples"),
        ({"prompt_config": dps.PromptConfig(items=1)}, "prompt_config was"),
    ],
)
def test_a_folder_of_another_run_is_refused(llama, probe, options, tmp_path, change, named):
    dps.score_heads(llama.hooked, probe[:1], out=tmp_path, **options)
    before = digest(tmp_path)
    with pytest.raises(RunError, match=named):
        dps.score_heads(llama.hooked, probe[:1], out=tmp_path, **{**options, **change})
    assert digest(tmp_path) == before


def test_another_model_is_refused(llama, tiny_folders, probe, options, tmp_path):
    dps.score_heads(llama.hooked, probe[:1], out=tmp_path, **options)
    other = dps.load_model(str(tiny_folders["llama"]))
    with torch.no_grad():
        other.blocks[0].attn.o.original_component.weight.mul_(1.01)
    with pytest.raises(RunError, match="model was"):
        dps.score_heads(other, probe[:1], out=tmp_path, **options)


# Loads the model once; then starts a child for each line it reads, and says the child's process id.
NURSERY = """
import os, sys, torch
torch.set_num_threads(1)
import dps_lens as dps
from dps_lens.scoring.sweep import Sweep

model = dps.load_model(sys.argv[1])
users = dps.load_users("probe", max_users=6)
quiet = dps.RunConfig(progress=False)
config = dps.PromptConfig(items=3, profile_tokens=60, task_tokens=30, response_tokens=8)
real = Sweep.make

def unit(self, key, given=None):
    with open(log, "a") as file:
        file.write(key + os.linesep)
    return real(self, key, given)

Sweep.make = unit
print("ready", flush=True)
for line in sys.stdin:
    out = line.strip()
    log = out + ".log"
    child = os.fork()
    if child == 0:
        dps.score_heads(model, users, max_examples=3, prompt_config=config, out=out, run_config=quiet)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_ten_kills_at_random_moments(tiny_folders, tmp_path):
    """kill -9 ten times: the result is that of an uninterrupted run, and at most one unit is redone each time."""
    nursery = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(NURSERY), str(tiny_folders["llama"])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )

    def start(folder):
        nursery.stdin.write(f"{folder}\n")
        nursery.stdin.flush()
        return int(nursery.stdout.readline())

    try:
        assert nursery.stdout.readline() == "ready\n"
        begun = time.monotonic()
        start(tmp_path / "whole")
        assert nursery.stdout.readline() == "0\n"
        whole_run = time.monotonic() - begun
        rng, kills = random.Random(0), 0
        while kills < 10:
            child = start(tmp_path / "cut")
            time.sleep(rng.uniform(0, whole_run / 8))
            os.kill(child, signal.SIGKILL)
            assert nursery.stdout.readline() == f"{int(signal.SIGKILL)}\n", "finished before it was killed"
            kills += 1
        start(tmp_path / "cut")
        assert nursery.stdout.readline() == "0\n"
    finally:
        nursery.kill()
        nursery.wait()
    starts = (tmp_path / "cut.log").read_text().split()
    assert len(set(starts)) == 18
    assert len(starts) <= 18 + kills
    for path in [path for path in (tmp_path / "cut").rglob(".*") if path.is_file()]:
        assert path.suffix == ".tmp", "a kill leaves at most a temporary file, which nothing reads"
        path.unlink()
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_settings_that_are_not_json_are_compared_as_json(tmp_path):
    RunFolder(tmp_path, {"ks": (1, 2)})
    RunFolder(tmp_path, {"ks": [1, 2]})
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match="not valid JSON"):
        RunFolder(tmp_path, {"ks": [1, 2]})


def test_batch_size_may_change_and_force_drops_old_scores(llama, probe, options, tmp_path, monkeypatch):
    dps.score_heads(llama.hooked, probe[:1], out=tmp_path, run_config=dps.RunConfig(batch_size=4), **options)
    dps.score_heads(llama.hooked, probe[:1], out=tmp_path, run_config=dps.RunConfig(batch_size=2), **options)
    counting(monkeypatch, fail_after=1)
    with pytest.raises(KeyboardInterrupt):
        dps.score_heads(
            llama.hooked, probe[:1], out=tmp_path, ablation="uniform", run_config=dps.RunConfig(force=True), **options
        )
    with pytest.raises(dps.DPSLensError, match="holds no HeadScores"):
        dps.HeadScores.load(tmp_path)
