"""Runs on disk: resume, refuse, recover."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from folders import digest
from pcs import score_pcs

import dps_lens as dps
from dps_lens.data.examples import key_of
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
    score_pcs(llama.hooked, probe[:3], out=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        counting(patch, fail_after=4)
        with pytest.raises(KeyboardInterrupt):
            score_pcs(llama.hooked, probe[:3], out=tmp_path / "cut", **options)
    assert not (tmp_path / "cut" / "scores.json").exists()
    calls = counting(monkeypatch)
    score_pcs(llama.hooked, probe[:3], out=tmp_path / "cut", **options)
    assert len(calls) == 2
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    score_pcs(llama.hooked, probe[:3], out=tmp_path / "cut", **options)
    assert len(calls) == 2
    score_pcs(llama.hooked, probe[:3], out=tmp_path / "cut", run_config=dps.RunConfig(force=True), **options)
    assert len(calls) == 8


def test_a_torn_unit_is_computed_again(llama, probe, options, tmp_path, monkeypatch):
    score_pcs(llama.hooked, probe[:2], out=tmp_path, **options)
    before = digest(tmp_path)
    torn = sorted((tmp_path / "units").iterdir())[1]
    torn.write_bytes(torn.read_bytes()[:40])
    calls = counting(monkeypatch)
    with pytest.warns(UserWarning, match="is not a whole safetensors file"):
        score_pcs(llama.hooked, probe[:2], out=tmp_path, **options)
    assert len(calls) == 1
    assert digest(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ablation": "uniform"}, 'ablation was "zero", now "uniform"'),
        ({"against": None}, "against was"),
        ({"max_examples": 1}, "data was .*also examples"),
        ({"prompt_config": dps.PromptConfig(items=1)}, "prompt_config.items was 3, now 1"),
    ],
)
def test_a_folder_of_another_run_is_refused(llama, probe, options, tmp_path, change, named):
    score_pcs(llama.hooked, probe[:1], out=tmp_path, **options)
    before = digest(tmp_path)
    with pytest.raises(RunError, match=named):
        score_pcs(llama.hooked, probe[:1], out=tmp_path, **{**options, **change})
    assert digest(tmp_path) == before


def test_another_model_is_refused(llama, tiny_folders, probe, options, tmp_path):
    score_pcs(llama.hooked, probe[:1], out=tmp_path, **options)
    other = dps.load_model(str(tiny_folders["llama"]))
    with torch.no_grad():
        other.blocks[0].attn.o.original_component.weight.mul_(1.01)
    with pytest.raises(RunError, match="model.weights was"):
        score_pcs(other, probe[:1], out=tmp_path, **options)


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
        pcs = {"ablation": "zero", "against": "no_profile", "method": "exact"}
        dps.score_heads(model, users, **pcs, max_examples=3, prompt_config=config, out=out, run_config=quiet)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.full
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
    score_pcs(llama.hooked, probe[:1], out=tmp_path, run_config=dps.RunConfig(batch_size=4), **options)
    score_pcs(llama.hooked, probe[:1], out=tmp_path, run_config=dps.RunConfig(batch_size=2), **options)
    counting(monkeypatch, fail_after=1)
    with pytest.raises(KeyboardInterrupt):
        score_pcs(
            llama.hooked, probe[:1], out=tmp_path, ablation="uniform", run_config=dps.RunConfig(force=True), **options
        )
    with pytest.raises(dps.DPSLensError, match="holds no HeadScores"):
        dps.HeadScores.load(tmp_path)


def start_at_once(folder, settings, rounds):
    """Begin a run in each of many folders in two processes at the same moment; whether each of the two was let in."""
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(2), context.SimpleQueue()

    def begin(number):
        accepted = []
        for turn in range(rounds):
            barrier.wait(60)
            try:
                RunFolder(folder / str(turn), settings[number]).put("a", {"x": torch.zeros(3)})
                accepted.append(True)
            except RunError:
                accepted.append(False)
        answers.put((number, accepted))

    children = [context.Process(target=begin, args=(number,)) for number in range(2)]
    for child in children:
        child.start()
    found = dict(answers.get() for _ in children)
    for child in children:
        child.join(60)
    return list(zip(found[0], found[1], strict=True))


def test_of_two_starts_at_once_with_other_settings_one_is_refused(tmp_path):
    settings = ({"ablation": "zero"}, {"ablation": "uniform"})
    found = start_at_once(tmp_path, settings, 200)
    assert all(one != two for one, two in found)
    for turn, (first, _) in enumerate(found):
        folder = RunFolder(tmp_path / str(turn), settings[not first])
        assert folder.get("a") is not None, "the unit is of the run that was let in"
        assert not list(folder.path.rglob("*.tmp"))


def test_two_starts_at_once_with_the_same_settings_are_one_run(tmp_path):
    assert start_at_once(tmp_path, ({"ks": [1]}, {"ks": [1]}), 50) == [(True, True)] * 50
    assert all(RunFolder(tmp_path / str(turn), {"ks": [1]}).get("a") is not None for turn in range(50))


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def link(source, target):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", link)
    RunFolder(tmp_path, {"ks": [1]})
    RunFolder(tmp_path, {"ks": [1]})
    with pytest.raises(RunError, match=r"ks was \[1\], now \[2\]"):
        RunFolder(tmp_path, {"ks": [2]})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["made.json", "run.json"]


def test_a_run_that_was_begun_anew_meanwhile_does_not_save(llama, probe, options, tmp_path, monkeypatch):
    real = Sweep.make

    def make(self, key, given=None):
        monkeypatch.setattr(Sweep, "make", real)
        score_pcs(
            llama.hooked, probe[:1], out=tmp_path, ablation="uniform", run_config=dps.RunConfig(force=True), **options
        )
        return real(self, key, given)

    monkeypatch.setattr(Sweep, "make", make)
    with pytest.raises(RunError, match="was begun anew with other settings"):
        score_pcs(llama.hooked, probe[:1], out=tmp_path, **options)
    assert dps.HeadScores.load(tmp_path).manifest["ablation"] == "uniform"


def test_foreign_manifests_are_not_touched(tmp_path):
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(RunError, match="expected an object, found list"):
        RunFolder(tmp_path, {})
    assert (tmp_path / "run.json").read_text() == "[1]"


def test_a_save_that_fails_leaves_what_was_there(llama, probe, options, tmp_path, monkeypatch):
    scores = score_pcs(llama.hooked, probe[:1], **options)
    scores.save(tmp_path)
    before = digest(tmp_path)

    def full(*arguments):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dps_lens.files.save_file", full)
        with pytest.raises(dps.DPSLensError, match="no space"):
            scores.save(tmp_path)
    assert digest(tmp_path) == before
    assert torch.equal(dps.HeadScores.load(tmp_path).values, scores.values)


def test_merging_takes_only_units_and_scores_of_the_run(llama, tiny_folders, probe, options, tmp_path):
    for place, ablation in (("run", "zero"), ("other", "uniform")):
        score_pcs(llama.hooked, probe[:1], out=tmp_path / place, ablation=ablation, **options)
    mine, foreign = (sorted((tmp_path / place / "units").iterdir()) for place in ("run", "other"))
    content = mine[0].read_bytes()
    for bad, said in ((foreign[0], "is not of this run"), (mine[1], "is another unit")):
        mine[0].write_bytes(bad.read_bytes())
        with pytest.warns(UserWarning, match=f"{said}.*it is left out"):
            assert dps.merge_runs([tmp_path / "run"], tmp_path / said) == 1
    mine[0].write_bytes(content)
    assert dps.merge_runs([tmp_path / "run"], tmp_path / "merged") == 2
    for name in ("scores.json", "scores.safetensors"):
        shutil.copy(tmp_path / "other" / name, tmp_path / "run" / name)
    with pytest.raises(RunError, match="scores in .* are of another run than its units: ablation differs"):
        dps.merge_runs([tmp_path / "run"], tmp_path / "again")


def test_keys_are_told_apart_whatever_ids_hold():
    parts = ["a", "b", "|", "\\", "a|b", "a\\", "\\|", ""]
    assert len({key_of(one, two) for one in parts for two in parts}) == len(parts) ** 2
    assert key_of("style", "u1", "7") == "style|u1|7"
