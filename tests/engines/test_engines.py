"""Units on Ray and in shards: the same results, whatever dies on the way."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch
from folders import digest
from pcs import score_pcs

import dps_lens as dps
from dps_lens.errors import DPSLensError, RunError
from dps_lens.extensions import load_object
from dps_lens.families import FunctionVector, Repeated, Retrieval
from dps_lens.runs import RunFolder
from dps_lens.scoring.sweep import Sweep
from dps_lens.work import Work, make_units

CONFIG = dps.PromptConfig(items=3, profile_tokens=60, task_tokens=30, response_tokens=8)
OPTIONS = {"max_examples": 3, "prompt_config": CONFIG}
PATIENCE = 900  # seconds until an event that does come is given up; a loaded machine is slow


def processes_at_home(home):
    """Processes that were started with this HOME, but for this one."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            environment = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if f"HOME={home}".encode() in environment and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def wait_for(condition, seconds=PATIENCE):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.002)


def gone(home, seconds=PATIENCE):
    wait_for(lambda: not processes_at_home(home), seconds)
    return not processes_at_home(home)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A HOME of its own, where Ray leaves its token."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def engine(home):
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with dps.RayEngine(workers=2) as engine:
        yield engine
    torch.set_num_threads(threads)
    assert gone(home), "Ray's processes end with the engine"


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The HOME of a driver that is killed; what Ray's own agents need a minute for is looked at in the end."""
    folder = tmp_path_factory.mktemp("killed")
    yield folder
    assert gone(folder), "the Ray of a killed driver ends by itself"


@pytest.fixture(scope="module")
def users(probe):
    return probe[:4]


@pytest.fixture(scope="module")
def whole(engine, tinies, users, tmp_path_factory):
    """The run without an engine, with as many threads as a worker has."""
    folder = tmp_path_factory.mktemp("whole")
    score_pcs(tinies("llama").hooked, users, out=folder, **OPTIONS)
    return folder


@dataclass
class Slow(Work):
    """Sleeps; fails for keys that say so."""

    model: object
    seconds: float = 0.0
    notes: str = ""

    def given(self, key):
        return len(key)

    def make(self, key, given=None):
        if self.notes:
            with open(self.notes, "a") as file:
                file.write(f"{key} {os.getpid()}\n")
        time.sleep(self.seconds)
        if key == "patient":
            wait_for(lambda: len({line.split()[-1] for line in Path(self.notes).read_text().splitlines()}) == 3)
        if key.startswith("poison"):
            raise ValueError(f"{key} is poison")
        if key.startswith("deadly"):
            os._exit(1)
        return {"length": torch.tensor(given)}


DRIVER = """
import sys
import torch
import dps_lens as dps

torch.set_num_threads(1)
config = dps.PromptConfig(items=3, profile_tokens=60, task_tokens=30, response_tokens=8)
model, users = dps.load_model(sys.argv[1]), dps.load_users("probe", max_users=4)
with dps.RayEngine(workers=2) as engine:
    pcs = {"ablation": "zero", "against": "no_profile", "method": "exact"}
    dps.score_heads(model, users, **pcs, max_examples=3, prompt_config=config, out=sys.argv[2], engine=engine)
"""


@pytest.mark.full
def test_a_killed_driver_is_started_again(engine, llama, tiny_folders, users, whole, killed, tmp_path):
    out = tmp_path / "run"
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(DRIVER), str(tiny_folders["llama"]), str(out)],
        env={**os.environ, "HOME": str(killed), "PYTHONWARNINGS": "ignore"},
    )
    wait_for(lambda: driver.poll() is not None or len(list(out.glob("units/*.safetensors"))) >= 4)
    assert driver.poll() is None
    driver.kill()
    driver.wait()
    kept = len(list(out.glob("units/*.safetensors")))
    assert 4 <= kept < 12
    assert not (out / "scores.json").exists()
    score_pcs(llama.hooked, users, out=out, engine=engine, **OPTIONS)
    assert engine.summary.units == 12 - kept
    for path in out.rglob("*.tmp"):
        path.unlink()
    assert digest(out) == digest(whole)


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_scores_are_those_of_a_run_without_an_engine(engine, llama, users, tmp_path, ablation):
    for name, where in (("here", None), ("ray", engine)):
        score_pcs(llama.hooked, users, ablation=ablation, engine=where, out=tmp_path / name, **OPTIONS)
    assert digest(tmp_path / "ray") == digest(tmp_path / "here")
    logs = "".join(path.read_text() for path in (tmp_path / "ray" / "logs").iterdir())
    assert all(f"{key}: " in logs for key in keys_of(tmp_path / "here")), "every unit is in the log of a worker"
    assert engine.summary.units == 12
    assert engine.summary.again == engine.summary.deaths == 0


def keys_of(folder):
    scores = dps.HeadScores.load(folder)
    return [f"{user}|{example}" for user, example in zip(scores.user_ids, scores.example_ids, strict=True)]


@pytest.mark.full
def test_curves_are_those_of_a_run_without_an_engine(engine, llama, users, tmp_path):
    families = {"one": dps.HeadSet.parse("L1H2,L0H1")}
    options = {"ks": (1, 2), "n_random": 3, "max_examples": 2, "prompt_config": CONFIG}
    for name, where in (("here", None), ("ray", engine)):
        dps.ablation_curve(llama.hooked, users[:3], families, engine=where, out=tmp_path / "a" / name, **options)
        dps.patch_heads(llama.hooked, users[:3], families, engine=where, out=tmp_path / "p" / name, **options)
    for call in "ap":
        assert digest(tmp_path / call / "ray") == digest(tmp_path / call / "here")


@pytest.mark.full
def test_families_are_those_of_a_run_without_an_engine(engine, llama, tmp_path):
    kinds = (Repeated("induction", n_prompts=3, length=8), Retrieval(lengths=(300,)), FunctionVector(n_trials=2))
    here = dps.reference_heads(llama.hooked, kinds, cache=tmp_path / "here")
    there = dps.reference_heads(llama.hooked, kinds, cache=tmp_path / "ray", engine=engine)
    for name, scores in here.items():
        torch.testing.assert_close(there[name].values, scores.values, rtol=0, atol=0, equal_nan=True)
    assert digest(tmp_path / "ray") == digest(tmp_path / "here")


def test_an_ablation_from_a_file_travels(engine, llama, users):
    file = Path(__file__).parents[2] / "examples" / "resample.py"
    ablation = load_object(f"{file}:Resample(seed=1)", dps.Ablation)
    here, there = (
        score_pcs(llama.hooked, users, ablation=ablation, engine=where, **OPTIONS) for where in (None, engine)
    )
    torch.testing.assert_close(there.values, here.values, rtol=0, atol=1e-5)


@pytest.mark.full
def test_an_evaluation_is_that_of_a_run_without_an_engine(engine, llama, users, tmp_path):
    methods = {"rag": "rag", "note": "prompt", "cad": "cad", "vector": "stylevector", "tuned": "lora"}
    options = {"strengths": (0.5, 1.0), "max_new_tokens": 6, "max_examples": 1, "prompt_config": CONFIG}
    options["evaluate_config"] = dps.EvaluateConfig(layers=(1,), vector_examples=1)
    found = {
        name: dps.evaluate(llama.hooked, users[:3], methods, engine=where, out=tmp_path / name, **options)
        for name, where in (("here", None), ("ray", engine))
    }
    pd.testing.assert_frame_equal(found["ray"].rows, found["here"].rows)
    pd.testing.assert_frame_equal(found["ray"].choices, found["here"].choices)
    units = {name: digest(tmp_path / name / "units") for name in found}
    differing = [unit for unit, value in units["here"].items() if units["ray"][unit] != value]
    assert len(differing) == 1, "all but the seconds that methods took"


def test_a_run_begins_here_and_ends_on_ray(engine, llama, users, whole, tmp_path, monkeypatch):
    real, calls = Sweep.make, []

    def make(self, key, given=None):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(key)
        return real(self, key, given)

    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "make", make)
        with pytest.raises(KeyboardInterrupt):
            score_pcs(llama.hooked, users, out=tmp_path, **OPTIONS)
    score_pcs(llama.hooked, users, out=tmp_path, engine=engine, **OPTIONS)
    assert engine.summary.units == 7
    assert digest(tmp_path) == digest(whole)


def test_the_caller_needs_no_weights(engine, tiny_folders, users, whole, tmp_path):
    empty = dps.load_model(str(tiny_folders["llama"]), device="meta")
    with pytest.raises(DPSLensError, match="no weights; give engine=RayEngine"):
        score_pcs(empty, users, **OPTIONS)
    score_pcs(empty, users, out=tmp_path, engine=engine, **OPTIONS)
    assert digest(tmp_path) == digest(whole)


def test_a_killed_worker_is_replaced(engine, llama, tmp_path):
    """kill -9 in mid-run: every unit once in the result, few are made again, and the new worker works."""
    engine.start(llama.hooked)
    notes = tmp_path / "notes"
    keys = [*(f"unit {number}" for number in range(8)), "patient", *(f"more {number}" for number in range(4))]

    def kill():
        wait_for(lambda: notes.exists() and len(notes.read_text().splitlines()) >= 4)
        os.kill(int(notes.read_text().split()[-1]), signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    folder = RunFolder(tmp_path / "run", {})
    found = make_units(Slow(llama.hooked, 0.3, str(notes)), keys, folder=folder, engine=engine, progress=False)
    killer.join()
    assert list(found.made) == keys
    assert not found.quarantined
    assert folder.n_units == len(keys)
    begun = [line.rsplit(maxsplit=1) for line in notes.read_text().splitlines()]
    assert {key for key, _ in begun} == {*keys}
    assert len(begun) - len(keys) <= engine.in_flight
    assert engine.summary.deaths == 1
    assert engine.summary.again <= engine.in_flight
    assert len({place for _, place in begun}) == 3, "the dead one, the other one, the new one"
    logs = [path.read_text() for path in sorted((tmp_path / "run" / "logs").iterdir())]
    assert sum("died: " in log for log in logs) == 1


def test_a_killed_worker_of_a_real_run(engine, llama, users, whole, tmp_path):
    def kill():
        wait_for(lambda: len(list(tmp_path.glob("units/*.safetensors"))) >= 3)
        log = next(tmp_path.glob("logs/worker-*.log")).read_text()
        os.kill(int(re.findall(r"process (\d+)", log)[-1]), signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    score_pcs(llama.hooked, users, out=tmp_path, engine=engine, **OPTIONS)
    killer.join()
    assert digest(tmp_path) == digest(whole)
    assert engine.summary.again <= engine.in_flight


@pytest.mark.full
def test_poison_is_put_in_quarantine(engine, llama, tmp_path):
    engine.start(llama.hooked)
    folder, notes = RunFolder(tmp_path / "run", {}), tmp_path / "notes"
    keys = ["a", "poison", "b", "deadly", "c", *(f"more {number}" for number in range(20))]
    with pytest.warns(UserWarning, match="was given up") as warned:
        found = make_units(Slow(llama.hooked, 0.05, str(notes)), keys, folder=folder, engine=engine, progress=False)
    assert list(found.made) == [key for key in keys if key not in ("poison", "deadly")]
    assert found.quarantined["poison"] == "ValueError: poison is poison"
    assert "the worker's process died in this unit" in found.quarantined["deadly"]
    begun = [line.rsplit(maxsplit=1)[0] for line in notes.read_text().splitlines()]
    assert begun.count("poison") == begun.count("deadly") == 3
    texts = [path.read_text() for path in sorted((tmp_path / "run" / "quarantine").iterdir())]
    assert len(texts) == 2
    assert any(text.startswith("poison\n") and 'raise ValueError(f"{key} is poison")' in text for text in texts)
    assert all("quarantine" in str(one.message) for one in warned if "was given up" in str(one.message))
    assert engine.summary.quarantined == 2
    assert "2 in quarantine" in str(engine.summary)
    folder.put("poison", {"length": torch.tensor(0)})
    assert len(list((tmp_path / "run" / "quarantine").iterdir())) == 1, "a unit that is made leaves the quarantine"


@pytest.mark.full
def test_nothing_made_is_an_error(engine, llama):
    engine.start(llama.hooked)
    with (
        pytest.warns(UserWarning, match="given up"),
        pytest.raises(RunError, match="every unit was given up.*poison 1 is poison"),
    ):
        make_units(Slow(llama.hooked), ["poison 1", "poison 2"], engine=engine, progress=False)


def test_workers_have_the_model_of_the_call(engine, llama, tiny_folders, users):
    other = dps.load_model(str(tiny_folders["llama"]))
    with torch.no_grad():
        other.blocks[0].attn.o.original_component.weight.mul_(1.01)
    with pytest.raises(RunError, match=r"workers have another model: weights is .* device='meta'"):
        score_pcs(other, users, engine=engine, **OPTIONS)


@pytest.mark.full
def test_models_that_no_worker_can_load(engine, llama, users, monkeypatch):
    other = dps.load_model(llama.folder)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "load", lambda: dps.load_model("no such model"))
        with (
            pytest.warns(UserWarning, match="cannot work"),
            pytest.raises(RunError, match=r"(?s)no worker can work.*cannot load 'no such model'"),
        ):
            score_pcs(other, users, engine=engine, **OPTIONS)
    object.__delattr__(other, "_dps_lens_loader")
    with pytest.raises(RunError, match="give load=, a function that does"):
        dps.RayEngine().start(other)


@pytest.mark.full
def test_scores_name_the_example_that_could_not_be_made(engine, llama, users, tmp_path, monkeypatch):
    folder = llama.folder

    def load():
        def make(self, key, given=None):
            if key == "asker-bread|asker-bread-5":
                raise ValueError("out of luck")
            return real(self, key, given)

        real, Sweep.make = Sweep.make, make
        return dps.load_model(folder)

    monkeypatch.setattr(engine, "load", load)
    with pytest.warns(UserWarning, match="'asker-bread|asker-bread-5' was given up: ValueError: out of luck"):
        scores = score_pcs(llama.hooked, users, out=tmp_path, engine=engine, **OPTIONS)
    assert scores.manifest["quarantined"] == {"asker-bread|asker-bread-5": "ValueError: out of luck"}
    assert len(scores.example_ids) == 11
    assert "asker-bread-5" not in scores.example_ids
    healed = score_pcs(llama.hooked, users, out=tmp_path, **OPTIONS)
    assert len(healed.example_ids) == 12
    assert "quarantined" not in healed.manifest


def test_engines_that_make_no_sense(monkeypatch):
    for options in ({"workers": 0}, {"cpus": 0}, {"gpus": -1.0}, {"in_flight": 0}):
        with pytest.raises(RunError, match="at least 1"):
            dps.RayEngine(**options)


def test_ray_is_an_extra(tinies, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match="pip install 'ray>="):
        dps.RayEngine().start(tinies("gpt2").hooked)


def test_shards_are_merged(llama, users, tmp_path):
    score_pcs(llama.hooked, users, out=tmp_path / "whole", **OPTIONS)
    parts = []
    for number in (1, 2, 3):
        parts.append(tmp_path / f"part-{number}")
        scores = score_pcs(llama.hooked, users, engine=dps.Shard(number, 3), out=parts[-1], **OPTIONS)
        assert scores.users == tuple(user.id for user in users[number - 1 :: 3])
        assert scores.manifest["shard"] == f"{number}/3"
    with pytest.raises(RunError, match="3 of 12 examples are missing; these are shards 1/3, 3/3"):
        dps.merge_runs([parts[0], parts[2]], tmp_path / "two")
    assert dps.merge_runs(parts, tmp_path / "merged") == 12
    assert digest(tmp_path / "merged") == digest(tmp_path / "whole")
    again = score_pcs(llama.hooked, users, out=tmp_path / "merged", **OPTIONS)
    assert torch.equal(again.values, dps.HeadScores.load(tmp_path / "whole").values)


@pytest.mark.full
def test_shards_of_curves_and_evaluations(llama, users, tmp_path):
    families = {"one": dps.HeadSet.parse("L1H2,L0H1")}
    curve = {"ks": (1,), "n_random": 3, "max_examples": 2, "prompt_config": CONFIG}
    table = {"strengths": (0.5, 1.0), "max_new_tokens": 6, "max_examples": 1, "prompt_config": CONFIG}
    methods = {"rag": "rag", "cad": "cad"}

    def run(place, engine=None):
        effects = dps.ablation_curve(llama.hooked, users, families, engine=engine, out=tmp_path / "c" / place, **curve)
        found = dps.evaluate(llama.hooked, users, methods, engine=engine, out=tmp_path / "e" / place, **table)
        return effects, found

    whole = run("whole")
    for number in (1, 2):
        part = run(f"part-{number}", dps.Shard(number, 2))
        mine = {user.id for user in users[number - 1 :: 2]}
        assert {*part[0].user_ids} == {*part[1].rows["user"]} == mine
        assert part[1].choices.equals(whole[1].choices), "settings are chosen on everybody"
    for call in "ce":
        dps.merge_runs([tmp_path / call / "part-1", tmp_path / call / "part-2"], tmp_path / call / "merged")
    merged = run("merged")
    pd.testing.assert_frame_equal(merged[0].to_frame(), whole[0].to_frame())
    pd.testing.assert_frame_equal(merged[1].rows, whole[1].rows)


def test_shards_of_different_runs_are_refused(llama, users, tmp_path):
    for number, ablation in ((1, "zero"), (2, "uniform")):
        options = OPTIONS | {"ablation": ablation, "out": tmp_path / str(number)}
        score_pcs(llama.hooked, users, engine=dps.Shard(number, 2), **options)
    with pytest.raises(RunError, match="is of another run than .*: ablation differ"):
        dps.merge_runs([tmp_path / "1", tmp_path / "2"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(RunError, match="is no run folder"):
        dps.merge_runs([tmp_path], tmp_path / "merged")
    for text in ("0/2", "3/2", "2", "a/b"):
        with pytest.raises(RunError, match="is none"):
            dps.Shard.parse(text)
    with pytest.raises(RunError, match="there are only 4 users; use fewer shards"):
        score_pcs(llama.hooked, users, engine=dps.Shard(5, 5), **OPTIONS)


@pytest.mark.full
def test_torn_units_are_left_out(llama, users, tmp_path):
    score_pcs(llama.hooked, users, out=tmp_path / "one", **OPTIONS)
    torn = next((tmp_path / "one" / "units").iterdir())
    torn.write_bytes(torn.read_bytes()[:50])
    with pytest.warns(UserWarning, match="is not a whole safetensors file.*it is left out"):
        assert dps.merge_runs([tmp_path / "one"], tmp_path / "two") == 11


@pytest.mark.full
def test_a_lost_node_without_spare_capacity(home, llama, tiny_folders, users, whole, tmp_path):
    """A script of its own, for a process has one Ray: two nodes of one CPU each, one is lost in mid-run."""
    script = """
    import sys, threading, time
    from pathlib import Path
    import torch
    import ray
    from ray.cluster_utils import Cluster
    import dps_lens as dps

    torch.set_num_threads(1)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    config = dps.PromptConfig(items=3, profile_tokens=60, task_tokens=30, response_tokens=8)
    model, users, out = dps.load_model(sys.argv[1]), dps.load_users("probe", max_users=4), Path(sys.argv[2])
    ray.init(address=cluster.address, log_to_driver=False)
    folder = sys.argv[1]

    def load():
        from dps_lens.scoring.sweep import Sweep

        def make(self, key, given=None):
            time.sleep(1)
            return real(self, key, given)

        real, Sweep.make = Sweep.make, make
        torch.set_num_threads(1)
        return dps.load_model(folder)

    engine = dps.RayEngine(workers=2, load=load)
    engine.start(model)
    while len(engine._pool.busy) < 2:
        for slot, _ in engine._pool.wait():
            if slot.ready is not None:
                engine._pool.admit(slot)

    def lose():
        while len(list(out.glob("units/*.safetensors"))) < 3:
            time.sleep(0.002)
        cluster.remove_node(second, allow_graceful=False)

    loser = threading.Thread(target=lose)
    loser.start()
    pcs = {"ablation": "zero", "against": "no_profile", "method": "exact"}
    dps.score_heads(model, users, **pcs, max_examples=3, prompt_config=config, out=out, engine=engine)
    loser.join()
    print("result:", engine.summary.units, engine.summary.deaths, engine.summary.again, engine.status)
    ray.shutdown()
    cluster.shutdown()
    """
    own = tmp_path / "home"
    own.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tiny_folders["llama"]), str(tmp_path / "run")],
        env={**os.environ, "HOME": str(own), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = re.findall("result: (.*)", done.stdout)
    units, deaths, again, *status = result.split()
    assert (units, deaths, status) == ("12", "1", ["1", "of", "2", "workers"])
    assert int(again) <= 2
    assert digest(tmp_path / "run") == digest(whole)
    assert gone(own)
