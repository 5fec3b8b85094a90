"""The command line, as a user types it."""

import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
import warnings
from pathlib import Path

import pandas
import pytest
import torch
import toy
from conftest import write_jsonl

import dps_lens as dps
from dps_lens.cli import main
from dps_lens.cli.report import _of_demo
from dps_lens.cli.sizes import QUICK
from dps_lens.cli.stages import Stages
from dps_lens.evaluation import Evaluation

pytestmark = pytest.mark.usefixtures("unchecked")

COMMAND = (sys.executable, "-m", "dps_lens")
ENVIRONMENT = {"COLUMNS": "120", "NO_COLOR": "1"}


def spawn(*arguments, cwd=None, said=None):
    """Run a command as a process of its own."""
    environment = {**os.environ, **ENVIRONMENT, "PYTHONWARNINGS": "ignore"}
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, input=said, check=False)


def run(*arguments, cwd=None):
    """Run a command in this process, which has loaded the libraries that a process of its own takes seconds to load."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["dps-lens", *map(str, arguments)])
        if cwd:
            patch.chdir(cwd)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as end:
                code = end.code or 0
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def model(tiny_folders):
    return str(tiny_folders["llama"])


def test_the_command_says_what_it_is():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"dps-lens {dps.__version__}\n")
    assert run("-h").stdout == run("--help").stdout
    assert "--show-completion" in run("-h").stdout
    assert "--max-neutral-cost" in spawn("find", "-h").stdout


def test_names_of_options_are_whole_in_a_narrow_terminal(monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "COLUMNS", "60")
    for command in ("find", "steer", "demo"):
        assert not re.search(r"--[\w-]*…", run(command, "--help").stdout)
    assert "--chat-template-kwargs" in run("find", "--help").stdout


def test_what_cannot_be_is_refused_in_a_line_and_at_once(tmp_path, model, monkeypatch):
    out = ("--out", tmp_path / "run", "--users", "probe")
    refused = run("score", *out, "--model", model, "--device", "mps")
    assert refused.stderr == "error: load_model: torch finds no mps device here; leave device out, or give 'cpu'\n"
    refused = run("score", *out, "--model", model, "--device", "gpu")
    assert "'gpu' is no device of torch" in refused.stderr
    assert not (tmp_path / "run").exists()

    def nobody_knows(*arguments, **options):
        raise OSError("no address")

    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("socket.getaddrinfo", nobody_knows)
    begun = time.monotonic()
    refused = run("score", *out, "--model", "nobody/nothing")
    assert time.monotonic() - begun < 15, "transformers alone tries for a minute"
    assert "cannot load 'nobody/nothing'" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.fixture(scope="module")
def scored(tmp_path_factory, model):
    out = tmp_path_factory.mktemp("run")
    return out, run("score", "--out", out, "--model", model, "--max-users", 3, "--max-examples", 1, "--top", 4)


def test_help_answers_at_once_and_names_every_command():
    done = spawn("--help")
    assert done.returncode == 0
    for command in (
        "score",
        "find",
        "steer",
        "demo",
        "compare",
        "ablate",
        "faithfulness",
        "evaluate",
        "fetch",
        "report",
        "explore",
        "merge",
        "vectors",
        "describe",
        "paths",
        "publish",
        "answers",
    ):
        assert command in done.stdout
        assert run(command, "--help").returncode == 0
    loaded = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, dps_lens, dps_lens.cli; print('torch' in sys.modules, 'plotly' in sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout.strip() == "False False"


def test_score_writes_a_run_and_resumes(scored, model):
    out, done = scored
    assert done.returncode == 0, done.stderr
    scores = dps.HeadScores.load(out)
    assert scores.users == ("asker-bread", "asker-bicycles", "asker-birds")
    for head in scores.top(4):
        assert str(head) in done.stdout
    assert (out / "heatmap.html").stat().st_size > 1_000_000
    again = run("score", "--out", out, "--model", model, "--max-users", 3, "--max-examples", 1)
    assert again.returncode == 0
    other = run("score", "--out", out, "--model", model, "--max-users", 3, "--max-examples", 1, "--ablation", "mean")
    assert other.returncode == 2
    assert other.stderr.strip().endswith("use another folder, or --force to start anew")
    assert "Traceback" not in other.stderr


def test_pairs_are_ranked_scored_and_tested(model, tmp_path):
    shared = ("--model", model, "--max-users", 3, "--max-examples", 1, "--pairs", "any")
    done = run("answers", "--out", tmp_path / "answers", *shared, "--summed")
    assert done.returncode == 0, done.stderr
    frame = dps.AnswerRanks.load(tmp_path / "answers").to_frame(per_token=False)
    margin = frame.query("condition == 'own' and measure == 'margin'").iloc[0]
    line = next(line for line in done.stdout.splitlines() if "margin, nats" in line)
    assert f"{margin['mean']:.3f}" in line
    assert f"{margin['low']:.3f} to {margin['high']:.3f}" in line
    done = run("score", "--out", tmp_path / "scores", *shared, "--objective", "pair")
    assert done.returncode == 0, done.stderr
    assert dps.HeadScores.load(tmp_path / "scores").manifest["objective"] == "pair"
    command = ["ablate", "--run", tmp_path / "scores", "--out", tmp_path / "a", *KINDS, "--ks", "1", "--n-random", 0]
    done = run(*command, *shared)
    assert done.returncode == 0, done.stderr
    assert dps.SetEffects.load(tmp_path / "a").loss == "pair"
    bare = run("ablate", "--run", tmp_path / "scores", "--out", tmp_path / "b", *KINDS, *shared[:-2], "--ks", "1")
    assert bare.returncode == 2
    assert "make_pairs(users)" in bare.stderr
    assert "--pairs" in bare.stderr
    wrong = run("score", "--out", tmp_path / "c", *shared, "--objective", "margin")
    assert "use one of nll, pair, choice" in wrong.stderr


def test_find_prints_the_set_with_its_inclusion_and_costs(model, tmp_path):
    options = ("--model", model, "--max-users", 3, "--max-examples", 1, "--n-donors", 1, "--k", 2)
    done = run("find", "--out", tmp_path / "a", *options, "--method", "rank", "--n-bootstraps", 4, "--max-task-cost", 9)
    assert done.returncode == 0, done.stderr
    found = dps.FoundHeads.load(tmp_path / "a")
    assert len(found.heads) == 2
    assert (len(found.resampled), len(found.folds)) == (4, 3)
    table = found.to_frame().set_index("name")
    for head in found.heads:
        (line,) = (line for line in done.stdout.splitlines() if f" {head} " in line)
        assert f"{table.loc[str(head), 'inclusion']:.0%}" in line
    for row in found.evidence().to_dict("records"):
        assert any(row["measure"] in line and f"{row['mean']:.3f}" in line for line in done.stdout.splitlines())
    assert (tmp_path / "a" / "found.csv").is_file()
    again = run(
        "find", "--out", tmp_path / "a", *options, "--method", "rank", "--n-bootstraps", 4, "--max-task-cost", 9
    )
    assert again.stdout == done.stdout
    own = tmp_path / "mine.py"
    own.write_text("import dps_lens as dps\nclass Few(dps.Greedy):\n    name = 'few'\n")
    done = run("find", "--out", tmp_path / "b", *options, "--method", f"{own}:Few(candidates=3)", "--n-bootstraps", 0)
    assert done.returncode == 0, done.stderr
    assert dps.FoundHeads.load(tmp_path / "b").manifest["method"] == {"name": "few", "candidates": 3, "least": 1e-4}
    done = run("find", "--out", tmp_path / "c", *options, "--method", "best")
    assert done.returncode == 2
    assert "find_heads: method 'best' is unknown; use one of rank, greedy, conditional" in done.stderr


def test_a_run_is_published_and_compared(scored, tmp_path):
    out, _ = scored
    done = run("publish", out, "--out", tmp_path / "a", "--k", 3)
    assert done.returncode == 0, done.stderr
    assert len(dps.load_atlas(tmp_path / "a").heads) == 3
    done = run("publish", out, "--out", tmp_path / "b", "--k", 3, "--compare", tmp_path / "a")
    assert "Jaccard 1.00" in done.stdout
    done = run("publish", out, "--out", tmp_path / "b", "--compare", "nobody")
    assert done.returncode == 2
    assert "load_atlas: there is no folder 'nobody'" in done.stderr


def test_a_head_is_described_and_its_paths_are_drawn(model, tmp_path):
    options = ("--model", model, "--max-users", 2)
    done = run("describe", "L1H2", "--out", tmp_path / "d", *options, "--n-random", 2)
    assert done.returncode == 0, done.stderr
    assert "token that is written" in done.stdout
    found = dps.Dossier.load(tmp_path / "d")
    assert str(found.head) == "L1H2"
    assert len(found.controls) == 2
    assert {"dossier.csv", "tokens.csv", "dossier.html"} <= {file.name for file in (tmp_path / "d").iterdir()}
    done = run(
        "paths", "--out", tmp_path / "p", "--receivers", "L2H1", "--senders", "L0H1,L1H2", "--into", "q,v", *options
    )
    assert done.returncode == 0, done.stderr
    assert "no claim about any" in done.stdout
    effects = dps.PathEffects.load(tmp_path / "p")
    assert effects.into == ("q", "v")
    assert [str(head) for head in effects.senders] == ["L0H1", "L1H2"]
    assert {"edges.csv", "heads.csv", "paths.html"} <= {file.name for file in (tmp_path / "p").iterdir()}
    for wrong, message in (
        (("describe", "head 3", "--out", tmp_path / "x", *options), "write it like 'L12H3'"),
        (("paths", "--out", tmp_path / "x", *options), "give either --run"),
        (("paths", "--out", tmp_path / "x", "--receivers", "L1H0", "--into", "z", *options), "into 'z' is unknown"),
    ):
        done = run(*wrong)
        assert done.returncode == 2
        assert message in done.stderr


def test_vectors_are_made_and_steered_with(model, tmp_path):
    options = ("--model", model, "--max-users", 3)
    made = ("vectors", "--out", tmp_path / "v", "--heads", "L1H2,L0H1", *options, "--max-examples", 1)
    done = run(*made)
    assert done.returncode == 0, done.stderr
    assert "difference vectors of 2 heads, 3 users" in done.stdout
    assert "of 3 pairs lie above" in done.stdout
    vectors = dps.HeadVectors.load(tmp_path / "v")
    rule = ("steer", "--rule", "head_vector", "--vectors", tmp_path / "v", "--model", model, "--max-new-tokens", 3)
    done = run(*rule, "--max-users", 2, "--gamma", 4)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["vector_of"] for line in lines] == [line["user"] for line in lines]
    loaded = dps.load_model(model)
    for line, user in zip(lines, dps.load_users("probe", max_users=2), strict=True):
        prompt = dps.build_prompt(loaded, user.examples[-1])
        asked = {"rule": "head_vector", "vectors": vectors[user.id], "gamma": 4.0, "max_new_tokens": 3}
        assert dps.generate(loaded, prompt, **asked).texts[0] == line["steered"]
    one, other = vectors.users[:2]
    requests = [{"user": one}, {"user": one, "vector_of": other}, {"prompt": "hello", "vector_of": other}]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in requests))
    done = run(*rule, "--requests", tmp_path / "asked.jsonl", "--gamma", 4)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["vector_of"] for line in done.stdout.splitlines()] == [one, other, other]
    done = run(*rule, "hello")
    assert done.returncode == 2
    assert "say whose with --vector-of USER" in done.stderr
    vectors.mean().save(tmp_path / "mean")
    mean = [tmp_path / "mean" if one == tmp_path / "v" else one for one in rule]
    done = run(*mean, "hello")
    assert done.returncode == 0, done.stderr
    for wrong, message in (
        (("steer", "hello", "--rule", "head_vector", "--model", model), "needs --vectors"),
        (("steer", "hello", "--rule", "cad", "--vectors", tmp_path / "v", "--model", model), "adds no --vectors"),
        ((*rule, "hello", "--vector-of", "nobody"), "user 'nobody' has no vector"),
        (("vectors", "--out", tmp_path / "w", *options), "give either --run"),
    ):
        done = run(*wrong)
        assert done.returncode == 2
        assert message in done.stderr


def test_a_found_set_is_tested_and_steered_with(model, tmp_path):
    options = ("--model", model, "--max-users", 3, "--max-examples", 1)
    done = run(
        "find",
        "--out",
        tmp_path / "found",
        *options,
        "--method",
        "rank",
        "--n-donors",
        1,
        "--k",
        2,
        "--n-bootstraps",
        0,
    )
    assert done.returncode == 0, done.stderr
    found = dps.FoundHeads.load(tmp_path / "found")
    tested = ("--run", tmp_path / "found", *options, "--kinds", "induction", "--n-random", 2)
    done = run("ablate", "--out", tmp_path / "effects", *tested, "--ks", 2)
    assert done.returncode == 0, done.stderr
    sets = dps.SetEffects.load(tmp_path / "effects").sets("preference")
    assert {user: heads.heads for user, heads in sets.items()} == {u: found.of_user(u).heads for u in found.users}
    done = run("faithfulness", "--out", tmp_path / "curves", *tested, "--sizes", "0.1,0.2")
    assert done.returncode == 0, done.stderr
    done = run(
        "steer", "--run", tmp_path / "found", "--k", 2, "--model", model, "--max-users", 1, "--max-new-tokens", 2
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0])["heads"] == str(found.heads)
    compare = ("compare", "--run", tmp_path / "found", "--model", model, "--kinds", "induction")
    done = run(*compare)
    assert done.returncode == 0, done.stderr
    assert "Top 2 heads of each family" in done.stdout
    assert "Between users" not in done.stdout
    done = run(*compare, "--exclude", 0.02)
    assert done.returncode == 2
    assert "--exclude is for rankings by scores" in done.stderr
    done = run("report", tmp_path / "found", "--model", model)
    assert done.returncode == 2
    assert "is a run of 'find', which has no map for each user" in done.stderr


@pytest.mark.full
def test_score_on_workers_and_in_shards_is_the_same(scored, model, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    options = ("--model", model, "--max-users", 3, "--max-examples", 1)
    done = spawn("score", "--out", tmp_path / "ray", *options, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "last step: 3 units on " in done.stderr
    for shard in ("1/2", "2/2"):
        done = run("score", "--out", tmp_path / shard[0], *options, "--shard", shard)
        assert f"these are the users of shard {shard}; when all are done: dps-lens merge" in done.stdout
    done = run("merge", tmp_path / "1", tmp_path / "2", "--out", tmp_path / "merged")
    assert "3 units are in" in done.stdout
    expected = dps.HeadScores.load(scored[0])
    for place in ("ray", "merged"):
        found = dps.HeadScores.load(tmp_path / place)
        assert found.example_ids == expected.example_ids
        assert found.values == pytest.approx(expected.values, abs=1e-5)
        assert {**found.manifest, "made": 0} == {**expected.manifest, "made": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workers", 2, "--shard", "1/2"), "--shard is for sites without Ray"),
        (("--shard", "half"), "Shard: 'half' is none; write the second of eight as 2/8"),
        (("--workers", 1, "--device", "cpu"), "workers take GPUs with --gpus"),
    ],
)
def test_engines_that_do_not_fit(model, tmp_path, arguments, message):
    done = run("score", "--out", tmp_path, "--model", model, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_steer_prints_json_lines(scored, model):
    out, _ = scored
    done = run(
        "steer", "--run", out, "--k", 3, "--model", model, "--max-users", 2, "--max-new-tokens", 5, "--gamma", 1.5
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["user"] for line in lines] == ["asker-bread", "asker-bicycles"]
    assert lines[0]["heads"] == str(dps.HeadScores.load(out).top(3))
    assert lines[0]["gamma"] == 1.5
    one = run("steer", "a loaf", "--heads", "L0H1,L2H3", "--model", model, "--max-new-tokens", 3)
    assert json.loads(one.stdout)["prompt"] == "a loaf"


def test_requests_from_a_file_resume(scored, model, tmp_path):
    out, _ = scored
    records = [
        {"id": "a", "prompt": "a loaf", "heads": "L0H1", "gamma": 2},
        {"user": "asker-bread", "gamma": -1.0},
        {"prompt": "a bird", "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 3},
    ]
    file = write_jsonl(tmp_path / "requests.jsonl", records)
    common = ("steer", "--requests", file, "--run", out, "--k", 3, "--model", model, "--max-new-tokens", 4)
    printed = run(*common, "--batch-size", 2)
    assert printed.returncode == 0, printed.stderr
    lines = [json.loads(line) for line in printed.stdout.splitlines()]
    top = str(dps.HeadScores.load(out).top(3))
    assert [line["line"] for line in lines] == [1, 2, 3]
    assert [line["heads"] for line in lines] == ["L0H1", top, top]
    assert [line["gamma"] for line in lines] == [2, -1.0, 1.0]
    assert (lines[0]["id"], lines[1]["user"], lines[2]["top_k"]) == ("a", "asker-bread", 20)
    assert lines[1]["kl"] is None, "the full model did not run"
    assert lines[1]["reference"]
    assert lines[1]["model"] == model

    # One at a time gives the same texts: neither the batch nor the sampling of others matters.
    kept = tmp_path / "out" / "steered.jsonl"
    assert run(*common, "--batch-size", 1, "--out", kept).returncode == 0
    whole = kept.read_text()
    again = [json.loads(line) for line in whole.splitlines()]
    assert [(line["plain"], line["steered"]) for line in again] == [(line["plain"], line["steered"]) for line in lines]
    kept.write_text(whole[: whole.index("\n") + 20])
    assert run(*common, "--out", kept).returncode == 0
    resumed = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [(line["line"], line["steered"]) for line in resumed] == [(line["line"], line["steered"]) for line in lines]
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text("not of this command\n")
    assert "was not written by this command" in run(*common, "--out", foreign).stderr.replace("\n", " ")
    other = run(*common, "--gamma", 3, "--out", kept)
    assert other.returncode == 2
    assert "line 2" not in other.stderr
    assert "line 3: gamma was 1.0, now 3.0" in other.stderr.replace("\n", " ")
    assert run(*common, "--gamma", 3, "--out", kept, "--force").returncode == 0
    assert json.loads(kept.read_text().splitlines()[2])["gamma"] == 3.0


@pytest.fixture
def requests(tmp_path):
    """Ten requests of unequal length, the last of which asks for a user's example."""
    records = [{"prompt": ("word " * (7 * number + 1)).strip(), "gamma": 0.5 + 0.1 * number} for number in range(9)]
    return write_jsonl(tmp_path / "requests.jsonl", [*records, {"user": "asker-bread"}])


@pytest.fixture
def steering(model, requests):
    return ("steer", "--requests", requests, "--heads", "L1H2,L0H1", "--max-new-tokens", 4, "--batch-size", 4)


def test_steering_resumes_byte_for_byte_at_every_line(steering, model, tmp_path):
    whole = tmp_path / "whole.jsonl"
    assert run(*steering, "--model", model, "--out", whole).returncode == 0
    expected = whole.read_bytes()
    lines = expected.splitlines(keepends=True)
    assert len(lines) == 10
    for stopped in (0, 1, 4, 7, 9, 10):
        torn = lines[stopped][:30] if stopped < 10 else b""
        whole.write_bytes(b"".join(lines[:stopped]) + torn)
        done = run(*steering, "--model", model, "--out", whole)
        assert done.returncode == 0, done.stderr
        assert whole.read_bytes() == expected, f"stopped in line {stopped + 1}"


def edited(tiny_folders, tmp_path, change):
    """A copy of the model's folder, of the same name."""
    import shutil

    folder = tmp_path / "edited" / tiny_folders["llama"].name
    shutil.copytree(tiny_folders["llama"], folder)
    change(folder)
    return folder


def other_weights(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][:, 16:24] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def in_file(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_weights, "model.weights was"),
        (in_file("chat_template.jinja", "<|im_end|>", "<|im_end|> "), "tokenizer was"),
        (in_file("config.json", "10000.0", "500.0"), "model.config.rope_parameters.rope_theta was 10000.0, now 500.0"),
        (
            in_file("generation_config.json", '"eos_token_id": 3', '"eos_token_id": 7'),
            "model.generation.eos_token_id was",
        ),
    ],
)
def test_steering_with_another_model_of_the_name_is_refused(steering, model, tiny_folders, tmp_path, change, named):
    out, folder = tmp_path / "out.jsonl", edited(tiny_folders, tmp_path, change)
    # The name of the model is that of its folder, seen from where the command runs.
    assert run(*steering, "--model", folder.name, "--out", out, cwd=tiny_folders["llama"].parent).returncode == 0
    kept = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(kept[:6]))
    done = run(*steering, "--model", folder.name, "--out", out, cwd=folder.parent)
    assert done.returncode == 2
    assert named in " ".join(done.stderr.split())
    assert out.read_bytes() == b"".join(kept[:6])


def test_steering_with_other_texts_of_a_user_is_refused(model, tmp_path):
    users = dps.load_users("probe")
    records = [
        {"user_id": user.id, "id": document.id, "date": document.date, **document.fields}
        for user in users[:2]
        for document in user.history
    ]
    file = write_jsonl(tmp_path / "users.jsonl", records)
    asked = [{"user": user.id} for user in users[:2]]
    common = (
        "steer", "--requests", write_jsonl(tmp_path / "r.jsonl", asked), "--heads", "L1H2", "--users", file,
        "--model", model, "--max-new-tokens", 3, "--out", tmp_path / "out.jsonl",
    )  # fmt: skip
    assert run(*common).returncode == 0
    records[0]["text"] += " and rain"
    write_jsonl(file, records)
    done = run(*common)
    assert done.returncode == 2
    assert "line 1: data was" in " ".join(done.stderr.split())


def test_steering_keeps_what_it_cannot_replace(steering, requests, model, tmp_path):
    out = tmp_path / "out.jsonl"
    assert run(*steering, "--model", model, "--out", out).returncode == 0
    before = out.read_bytes()
    assert run(*steering, "--model", tmp_path / "typo", "--out", out, "--force").returncode == 2
    requests.write_text("no JSON")
    assert run(*steering, "--model", model, "--out", out, "--force").returncode == 2
    assert out.read_bytes() == before
    (tmp_path / "out.jsonl.run.json").unlink()
    write_jsonl(requests, [{"prompt": "word", "gamma": 0.5}])
    out.write_bytes(before.splitlines(keepends=True)[0])
    assert "there is no out.jsonl.run.json beside it" in " ".join(
        run(*steering, "--model", model, "--out", out).stderr.split()
    )
    notes = tmp_path / "notes.txt"
    notes.write_text("dear diary")
    for more in ((), ("--chat",)):
        done = run("steer", *(steering[1:] if not more else steering[3:]), *more, "--model", model, "--out", notes)
        assert done.returncode == 2
        assert "use another file" in done.stderr
    assert notes.read_text() == "dear diary"


def test_a_report_does_not_replace_another_file(scored, model, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<p>mine</p>")
    done = run("report", scored[0], "--out", page, "--model", model)
    assert done.returncode == 2
    assert "is no page of dps_lens" in " ".join(done.stderr.split())
    assert page.read_text() == "<p>mine</p>"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "x", "gama": 1}, "line 1: field 'gama' is unknown"),
        ({"prompt": "x", "gamma": "2"}, "line 1: field 'gamma' is '2': Input should be a valid number"),
        ({"prompt": "x", "seed": True}, "line 1: field 'seed' is True: Input should be a valid integer"),
        ({"prompt": "x", "do_sample": 1}, "line 1: field 'do_sample' is 1: Input should be a valid boolean"),
        ({"gamma": 1}, "line 1: give either 'prompt' or 'user'"),
        ({"user": "nobody"}, "line 1: field 'user' is 'nobody', who is not among --users"),
        ({"user": "asker-bread", "example": "none"}, "line 1: field 'example' is 'none'; the user has"),
        ({"prompt": "x", "example": "e"}, "line 1: field 'example' needs 'user'"),
        ({"prompt": "x", "heads": "L0X"}, "line 1: Head.parse: 'L0X' is not a head"),
        ({"prompt": "x", "gamma": -2}, "line 1: gamma -2.0 is not a number from -1 up"),
        ({"prompt": "x", "do_sample": True, "top_k": 0}, "line 1: Sampling: top_k 0 is not a whole number from 1 up"),
        ({"prompt": "x", "gamma": float("nan")}, "line 1: field 'gamma' is nan: Input should be a finite number"),
        ({"prompt": "x", "temperature": float("inf")}, "line 1: field 'temperature' is inf: Input should be a finite"),
        ({"prompt": "x", "gamma": None}, "line 1: field 'gamma' is None: Input should be a valid number"),
        ({"prompt": "x", "heads": None}, "line 1: field 'heads' is None: Input should be a valid string"),
        ({"prompt": "x", "seed": 2**70}, "line 1: field 'seed' is 1180591620717411303424: Input should be less"),
        ({"prompt": "\ud800"}, "line 1: a text holds half of a character"),
        (["x"], "line 1: Input should be a valid dictionary"),
    ],
)
def test_a_malformed_request_names_its_field(record, message, tmp_path):
    done = run("steer", "--requests", write_jsonl(tmp_path / "r.jsonl", [record]), "--heads", "L0H1")
    assert done.returncode == 2
    assert f"r.jsonl, {message}" in done.stderr


def test_chat_answers_turn_by_turn(model, tmp_path):
    said = "hello there\n/gamma 0\n/gamma x\nmore of it\n/plain\n/new\nhello there\n/what\n/quit\nnever read\n"
    common = ("steer", "--chat", "--heads", "L0H1,L2H3", "--model", model, "--max-new-tokens", 5, "--gamma", 2)
    out = tmp_path / "said.jsonl"
    done = spawn(*common, "--out", out, said=said)
    assert done.returncode == 0, done.stderr
    noted = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["prompt"], line["gamma"]) for line in noted] == [
        ("hello there", 2.0),
        ("more of it", 0.0),
        ("more of it", 0.0),
        ("hello there", 0.0),
    ]
    assert "never read" not in done.stdout
    assert "needs a number" in done.stderr
    one = json.loads(run("steer", "hello there", *common[2:]).stdout)
    answers = [" ".join(answer.split()) for answer in done.stdout.split("> ")]
    assert answers[1] == " ".join(one["steered"].split())
    assert answers[4] == answers[5], "after /gamma 0 the second answer is the model's own, as /plain is"
    assert answers[7] == " ".join(one["plain"].split()), "after /new nothing is left of the turns before"


def test_demo_writes_its_report(tmp_path, model):
    done = run(
        "demo",
        "--model",
        model,
        "--out",
        tmp_path / "demo",
        "--max-users",
        3,
        "--max-examples",
        1,
        "--held-out",
        1,
        "--k",
        3,
        "--n-random",
        2,
    )
    assert done.returncode == 0, done.stderr
    assert "minutes" in done.stderr
    assert "Held-out examples: nats per token" in done.stdout
    assert "3 heads, chosen on 3 users" in done.stdout
    assert "in resamples" not in done.stdout
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    for user in ("asker-bread", "asker-bicycles", "asker-birds"):
        assert user in page
    found = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert found["grid"]["gammas"] == [1.0, 2.0]
    assert found["grid"]["ks"] == [1, 3]
    chosen = dps.FoundHeads.load(tmp_path / "demo" / "found")
    assert found["tops"] == [str(head) for head in chosen.heads]
    assert found["outlined"].startswith("the 3 heads that find_heads found; each user is tested with those that others")
    assert found["cost"]
    # Each user is tested, and steered, with the set of a fit without the user.
    tested = dps.SetEffects.load(tmp_path / "demo" / "ablation").sets()
    assert {*map(str, tested.values())} == {str(chosen.of_user(user)) for user in chosen.users}
    steered = {(text["user"], text["heads"]) for text in found["grid"]["texts"] if text["k"] == 3 and text["gamma"]}
    assert steered == {(user, str(chosen.of_user(user))) for user in chosen.users}
    # A report of the run shows what the demo measured, and writes no text anew.
    again = run("report", tmp_path / "demo", "--out", tmp_path / "again.html", "--model", model)
    assert again.returncode == 0, again.stderr
    shown = (tmp_path / "again.html").read_text(encoding="utf-8")
    of_run = json.loads(re.search(r'id="data">(.*?)</script>', shown, re.DOTALL)[1])
    assert of_run["cost"] == found["cost"]
    assert (of_run["tops"], of_run["outlined"]) == (found["tops"], found["outlined"])
    assert [*of_run["maps"]][1:] == [*found["maps"]][1:]
    assert of_run["grid"] == found["grid"]
    assert not [*(tmp_path / "demo").glob("page-*")]
    assert ('class="verdict"' in shown) == ('class="verdict"' in page)


def test_demo_grows_its_page_and_keeps_more_apart(tmp_path, model):
    out = ("--model", model, "--out", tmp_path / "demo")
    few = ("--k", 2, "--n-random", 1)
    quick = run("demo", *out, *few, "--max-users", 6)
    assert quick.returncode == 0, quick.stderr
    said = [line.split(": ", 1)[1] for line in quick.stderr.splitlines() if "report.html, " in line]
    assert said[0] == "2 of 6 users so far; no set is found yet."
    assert len(said) == 5
    assert said[-1] == "everything"

    def page_now():
        """Without who made it, and when."""
        text = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
        return re.sub(r"20\d\d-\d\d-\d\dT\d\d:\d\dZ with: [^<]*", "", text)

    before = page_now()
    assert "so far" not in before
    assert "on their way" not in before
    # What is finished is not replaced by less while the same command runs again.
    again = run("demo", *out, *few, "--max-users", 6)
    pages = [line for line in again.stderr.splitlines() if "report.html, " in line]
    assert len(pages) == 1
    assert pages[0].endswith("everything")
    assert page_now() == before
    full = run("demo", *out, *few, "--full", "--max-users", 8, "--max-examples", 1, "--held-out", 1)
    assert full.returncode == 0, full.stderr
    shown = json.loads(re.search(r'id="data">(.*?)</script>', page_now(), re.DOTALL)[1])
    maps = ["the paper's PCS, the largest of them measured", "styles, by pairs", "topics, by pairs"]
    assert [*shown["maps"]][1:] == maps
    assert (tmp_path / "demo" / "full" / "scores.json").is_file()
    again = run("demo", *out, *few, "--max-users", 6, "--force")
    assert again.returncode == 0, again.stderr
    assert page_now() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.html").write_text("mine", encoding="utf-8")
    refused = run("demo", "--model", model, "--out", tmp_path / "other", *few)
    assert refused.returncode == 2
    assert "is no page of dps_lens" in refused.stderr
    assert not (tmp_path / "other" / "run.json").exists()


def test_a_page_of_part_of_a_run_says_so(tmp_path, model):
    scored = ("score", "--out", tmp_path / "run", "--model", model, "--max-users", 3, "--max-examples", 1)
    assert run(*scored, "--shard", "1/3").returncode == 0
    shown = ("report", tmp_path / "run", "--out", tmp_path / "page.html", "--ks", "1", "--model", model)
    done = run(*shown, "--gammas", 1, "--max-new-tokens", 2)
    assert done.returncode == 0, done.stderr
    assert "holds the scores of part 1/3 of its users" in done.stderr


def test_a_finished_page_comes_with_the_package(tmp_path):
    environment = {**os.environ, "BROWSER": "true"}
    code = "import sys; from dps_lens.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "demo", "--show", "--out", str(tmp_path / "runs")],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    page, torch_was_loaded = done.stdout.split()
    assert torch_was_loaded == "False"
    assert "with: dps-lens demo" in Path(page).read_text(encoding="utf-8")


def test_report_shows_a_run(scored, model, tmp_path):
    """With an ablation run beside it; a second call reads what the first one wrote."""
    out, _ = scored
    common = ["--max-users", 2, "--ks", "1,2", "--n-random", 2, "--kinds", "induction", "--model", model]
    assert run("ablate", "--run", out, "--out", tmp_path / "ablation", *common).returncode == 0
    arguments = ["report", out, "--out", tmp_path / "report.html", "--ablation", tmp_path / "ablation"]
    arguments += ["--k", 3, "--ks", "1,2", "--gammas", "0.5,2", "--max-new-tokens", 4, "--kinds", "induction"]
    few = ["--max-users", 2, "--n-random", 1, "--model", model]
    assert run("describe", "L1H2", "--out", tmp_path / "dossier", *few).returncode == 0
    done = run(*arguments, "--model", model, "--with", tmp_path / "dossier")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    figures = found["figures"]["ablation"]
    assert {*figures} >= {"gain_removed", "task_cost", "neutral_cost", "necessity_other"}
    assert next(iter(figures)) == "gain beside costs"
    assert [*found["families"]] == ["induction"]
    assert found["grid"]["gammas"] == [0.5, 2.0]
    assert [*found["figures"]["mechanism"]] == ["L1H2"]
    units = [unit for folder in out.glob("page-*") for unit in folder.rglob("*.safetensors")]
    assert units
    before = [unit.stat().st_mtime_ns for unit in units]
    assert run(*arguments, "--model", model).returncode == 0
    assert [unit.stat().st_mtime_ns for unit in units] == before
    other = ["--gammas", 1, "--ks", 2, "--max-new-tokens", 2, "--k", 2, "--out", tmp_path / "other.html"]
    assert run("report", out, *other, "--model", model).returncode == 0, "other settings lie beside these"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gammas", "x"], "write 0.5,1,2"),
        (["--ks", "a"], "write 1,5,10"),
        (["--users", "docs.jsonl"], "name their file"),
        (["--ablation", "nowhere"], "nowhere"),
    ],
)
def test_report_says_what_is_wrong(scored, model, arguments, message, tmp_path):
    write_jsonl(tmp_path / "docs.jsonl", [{"user_id": "x", "title": "a", "text": f"b {n}"} for n in range(6)])
    done = run("report", scored[0], *arguments, "--model", model, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "report.html").exists()


@pytest.fixture
def interruptible():
    """Children end by Ctrl-C also where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_explore_serves_the_page_here_only(scored, model, interruptible, tmp_path):
    out, _ = scored
    arguments = ["explore", out, "--port", 0, "--k", 3, "--ks", "1,2", "--gammas", 1, "--max-new-tokens", 4]
    command = [*COMMAND, *map(str, arguments), "--model", model]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    ) as server:
        try:
            url = server.stdout.readline().split()[0]
            assert url.startswith("http://127.0.0.1:")
            with urllib.request.urlopen(url) as reply:
                assert b'id="tab-ask"' in reply.read()
            example = dps.load_users("probe")[1].examples[-1]
            shown = {"user": example.user_id, "prompt": example.input, "text": example.reference, "documents": ""}
            shown |= {"heads": "L1H2,L0H0", "rule": "dps-js", "gamma": 1.5, "length": 5}
            measured = {one: posted(url + "ask", shown | {"ablation": one}) for one in ("zero", "uniform")}
            written = posted(url + "write", shown)
            anew = posted(url + "steer", {"user": example.user_id, "example": example.id, "gamma": 2, "k": 3})
            own = posted(url + "write", shown | {"prompt": "Something else."})
            described = posted(url + "describe", {"user": example.user_id, "head": "L1H2"})
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait(timeout=900) == 0, "Ctrl-C is how it ends"
    # What is offered as Python and as a command answers the same.
    for found in measured.values():
        done = run(*shlex.split(found["command"])[1:], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        out = tmp_path / shlex.split(found["command"].split("--out ")[1])[0]
        frame = pandas.read_csv(out / "effects.csv").set_index(["family", "measure"])["mean"]
        left = {"gain": "gain_left", "gain_other": "gain_left_other"}
        for row in found["rows"]:
            name = row["measure"]
            assert frame["heads", left.get(name, name)] == pytest.approx(row.get("edited", row.get("value")), abs=1e-6)
    assert measured["zero"]["rows"] != measured["uniform"]["rows"]
    for found in (written, anew):
        done = run(*shlex.split(found["command"])[1:], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        (said,) = map(json.loads, done.stdout.splitlines())
        assert said["steered"] == found["said"]
        names = {}
        with contextlib.redirect_stdout(io.StringIO()):
            exec(found["python"], names)
        assert names["written"].texts[0] == found["said"]
    assert written["said"] != anew["said"]
    done = run(*shlex.split(described["command"])[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (out,) = (tmp_path / "runs").glob("L1H2-*")
    assert json.loads(dps.Dossier.load(out).plot().to_json()) == described["figure"]
    assert own["python"]
    assert not own["command"], "no command knows somebody's own question"
    refused = run(*shlex.split(written["command"].replace(example.user_id, "nobody"))[1:])
    assert refused.returncode == 2
    assert "--only nobody is not among the users" in refused.stderr


def posted(url, asked):
    """The lines of an answer as one, and the whole text that they write as `said`."""
    request = urllib.request.Request(url, json.dumps(asked).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        lines = [json.loads(line) for line in reply]
    whole = {name: value for line in lines for name, value in line.items()}
    assert "error" not in whole, whole
    return whole | {"said": "".join(line.get("text", "") for line in lines)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: true", "seed: Input should be a valid integer, found True"),
        ("seed: '1'", "seed: Input should be a valid integer, found '1'"),
        ("strengths: [.nan]", "strengths.0: Input should be a finite number, found nan"),
        ("strengths: [.inf]", "strengths.0: Input should be a finite number, found inf"),
        ("strengths: [true]", "strengths.0: Input should be a valid number, found True"),
        ("strengths: ['0.5']", "strengths.0: Input should be a valid number, found '0.5'"),
        ("ks: 3.0,5", "ks.0: Input should be a valid integer, found 3.0"),
        ("ks: [" + "9" * 5000 + "]", "holds what no setting is"),
        ("seed: 1\nseed: 2", "not valid YAML (line 1: a name stands twice)"),
        ("seed: 2001-99-99", "holds what no setting is"),
        ("users: &a [x]\nmethods: [*a, *a]", "not valid YAML (line 2: aliases (*name) are not read)"),
        ("users: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("[" * 3000, "config.yaml: "),
        ("- a", "expected fields such as"),
        ("\x00", "not valid YAML"),
    ],
)
def test_a_config_that_is_none_is_named(text, message, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(text)
    done = run("evaluate", "--config", config, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "config.yaml: " in done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    config.write_bytes("seed: 1".encode("utf-16"))
    assert "UTF-16 text; save it as UTF-8" in run("evaluate", "--config", config, "--out", tmp_path / "out").stderr
    assert "cannot be read (Is a directory)" in run("evaluate", "--config", tmp_path, "--out", tmp_path / "out").stderr


def test_ctrl_c_says_how_to_go_on(scored, model, tmp_path, monkeypatch):
    from dps_lens.scoring import sweep

    out, measured, real = tmp_path / "it's a run", [], sweep.Sweep.make

    def make(self, key, given=None):
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(key)
        return real(self, key, given)

    command = ["score", "--out", out, "--model", model, "--max-users", 3, "--max-examples", 1, "--top", 4]
    with monkeypatch.context() as patch:
        patch.setattr(sweep.Sweep, "make", make)
        done = run(*command, "--force")
    assert done.returncode == 130
    said = " ".join(done.stderr.split())
    assert f"interrupted; what is finished is in {out}; the same command goes on" in said
    assert "without --force" in said
    again = shlex.split(done.stderr.strip().splitlines()[-1])
    assert again == ["dps-lens", *map(str, command)]
    assert "Traceback" not in done.stderr
    kept = sorted((out / "units").iterdir())
    assert len(kept) == 1
    written = kept[0].stat().st_mtime_ns
    assert run(*again[1:]).returncode == 0
    assert kept[0].stat().st_mtime_ns == written, "what was finished is read"
    whole, found = (dps.HeadScores.load(folder) for folder in (scored[0], out))
    assert torch.equal(found.values, whole.values)


def test_a_full_disk_gets_one_line(model, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dps_lens.files.save_file", full)
    done = run("score", "--out", tmp_path, "--model", model, "--max-users", 2, "--max-examples", 1)
    assert done.returncode == 2
    assert "could not be written (No space left on device); what was there before is kept; make room" in done.stderr
    assert "Traceback" not in done.stderr


def test_names_are_no_markup_on_the_terminal(capsys):
    from dps_lens.cli.tables import print_overlap, print_top, printable

    evil = "[bold]u[/nothing] :smile: \x1b[2J"
    values = torch.randn(4, 2, 3)
    scores = dps.HeadScores(
        values,
        example_ids=list("abcd"),
        user_ids=[evil, evil, "v", "v"],
        components={evil: values},
        manifest={"unit": evil},
    )
    print_top(scores, 2)
    print_overlap(dps.overlap(scores, k=2, n_null=5, n_splits=2), evil)
    shown = "".join(capsys.readouterr().out.split())
    assert shown.count("[bold]u[/nothing]:smile:\\x1b[2J") >= 2
    assert "\x1b[2J" not in shown
    assert printable("a\u202eb") == "a\\u202eb"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "--out", "x", "--users", "nowhere.json"], "there is no file 'nowhere.json'"),
        (["steer", "hello"], "give either --run"),
        (["steer", "hello", "--heads", "L9"], "write it like 'L12H3'"),
        (["steer", "--run", "nowhere"], "nowhere holds no HeadScores"),
    ],
)
def test_mistakes_get_one_line(arguments, message, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_heads_outside_the_model_and_too_many_heads(scored, model):
    out, _ = scored
    done = run("steer", "hello", "--heads", "L7H0", "--model", model)
    assert done.returncode == 2
    assert "layers are 0 to 2, heads 0 to 3" in done.stderr
    done = run("steer", "--run", out, "--k", 99, "--model", model)
    assert done.returncode == 2
    assert "asked for 99 of 12 heads" in done.stderr


def test_demo_on_few_heads_and_short_histories(tmp_path, model):
    records = [
        {
            "user_id": user,
            "id": str(i),
            "date": f"2024-01-0{i + 1}",
            "title": f"{user} no {i}",
            "text": f"words of {user} {i} " * 9,
        }
        for user, n in (("short", 4), ("long", 8), ("longer", 9))
        for i in range(n)
    ]
    users = write_jsonl(tmp_path / "docs.jsonl", records)
    demo = ("demo", "--model", model, "--users", users, "--max-examples", 1, "--held-out", 1, "--n-random", 2)
    done = run(*demo, "--out", tmp_path / "run", "--k", 5)
    assert done.returncode == 0, done.stderr
    assert "1 user is left out ('short'), with too short a history" in done.stderr
    assert (tmp_path / "run" / "report.html").is_file()
    done = run(*demo, "--out", tmp_path / "many", "--k", 7)
    assert done.returncode == 2
    assert "use a smaller --k" in done.stderr
    assert not (tmp_path / "many").exists()
    # Settings that a folder does not hold are refused before time is taken for an estimate.
    done = run(*demo, "--out", tmp_path / "run", "--k", 5, "--dtype", "bfloat16")
    assert done.returncode == 2
    assert "minutes" not in done.stderr


def test_demo_of_one_user(tmp_path, model):
    """Nobody else chose the heads, so the set itself is tested and steered with."""
    done = run(
        "demo", "--model", model, "--out", tmp_path / "demo", "--max-users", 1, "--k", 3, "--n-random", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    chosen = dps.FoundHeads.load(tmp_path / "demo" / "found")
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    found = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert found["outlined"] == f"the {len(chosen.heads)} heads that find_heads found"
    most = max(found["grid"]["ks"])
    assert most == len(chosen.heads)
    steered = {text["heads"] for text in found["grid"]["texts"] if text["k"] == most and text["gamma"]}
    assert steered == {str(chosen.heads)}


def test_demo_goes_on_where_no_set_is_found(tmp_path, llama, probe, capsys):
    class Nothing(dps.Finder):
        name = "nothing"

        def fit(self, trials, weights, k, bounds, seed):
            return [dps.Fit(dps.HeadSet(), torch.zeros(3, 4)) for _ in weights]

    size = QUICK._replace(n_random=2, gammas=(1.0,), shown_users=1, method=Nothing())
    stages = Stages(llama.hooked, list(probe[:3]), size, 2, tmp_path / "run", tmp_path / "report.html")
    scores, found = stages.scores(), stages.found()
    assert found is None
    assert "going on with the top 2 of the scores" in capsys.readouterr().err
    cost = stages.cost(scores, found)
    assert [*map(str, {*cost.sets().values()})] == [str(scores.top(2))]
    stages.write_all(scores, found, cost)
    assert (tmp_path / "report.html").is_file()
    # What an interrupted or empty search leaves is no found set.
    assert (tmp_path / "run" / "found").is_dir()
    assert _of_demo(tmp_path / "run")[0] is None


def test_heads_by_name_are_checked_first(tmp_path, model):
    ablate = ("ablate", "--model", model, "--out", tmp_path / "out", "--max-users", 3)
    for options, said in (
        (("--heads", ""), "--heads names none"),
        (("--heads", "L9H9"), "layers are 0 to 2"),
        (("--heads", "L0H1", "--select", "user"), "--select user chooses heads of a --run"),
        (("--heads", "L0H1", "--run", "there"), "give either --run"),
        (("--heads", "L0H1", "--only", "nobody"), "--only nobody is not among the users"),
        ((), "give either --run"),
    ):
        done = run(*ablate, *options)
        assert done.returncode == 2
        assert said in done.stderr
        assert not (tmp_path / "out").exists()


def test_warnings_are_one_line(tmp_path, model):
    before = warnings.formatwarning
    (tmp_path / "own.py").write_text(
        "import warnings\nfrom dps_lens import Zero as Own\nwarnings.warn('in own words')\n"
    )
    options = ("--heads", "L0H1", "--only", "asker-bread", "--max-users", 3, "--kinds", "", "--n-random", 0)
    command = [*COMMAND, "ablate", *options, "--ablation", f"{tmp_path / 'own.py'}:Own", "--model", model]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONWARNINGS": "default"}
    done = subprocess.run(
        [*map(str, command), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert "\nwarning: in own words\n" in f"\n{done.stderr}"
    assert "own.py:" not in done.stderr
    # Whoever names one user wants the others left out; one user gives no interval.
    assert "are left out" not in done.stderr
    assert "nan" not in done.stdout
    run("--version")
    assert warnings.formatwarning is before


def test_heads_of_another_model_are_refused(scored, tiny_folders):
    out, _ = scored
    done = run("steer", "hello", "--run", out, "--model", tiny_folders["qwen2"])
    assert done.returncode == 2
    assert "give its --model" in done.stderr


def test_steer_takes_other_rules(scored, model):
    out, _ = scored
    common = ("--model", model, "--max-users", 2, "--max-new-tokens", 4)
    done = run("steer", "--run", out, "--k", 3, "--rule", "dps+cad", "--alpha", 1, "--max-kl", 0.01, *common)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["rule"] for line in lines] == ["dps+cad"] * 2
    assert all(0 <= line["kl"] < 0.011 for line in lines)
    done = run("steer", "hello", "--rule", "cad", "--model", model)
    assert done.returncode == 2
    assert "needs prompts with a profile" in done.stderr


KINDS = ("--kinds", "induction,previous_token")


def test_compare_prints_overlaps_and_writes_figures(scored, model):
    out, _ = scored
    done = run("compare", "--run", out, "--model", model, "--k", 3, *KINDS)
    assert done.returncode == 0, done.stderr
    assert "preference, induction" in done.stdout
    assert "Between users: too few examples" in done.stdout
    for name in ("families.html", "families.csv", "users.html", "users.csv"):
        assert (out / "compare" / name).is_file()
    wrong = run("compare", "--run", out, "--model", model, "--kinds", "telepathy")
    assert wrong.returncode == 2
    assert "kind 'telepathy' is unknown" in wrong.stderr


@pytest.mark.parametrize("patch", [False, True])
def test_ablate_measures_families_and_resumes(scored, model, tmp_path, patch):
    out, _ = scored
    command = ["ablate", "--run", out, "--out", tmp_path / "a", "--model", model, "--max-users", 3, *KINDS]
    command += ["--max-examples", 1, "--ks", "1,2", "--n-random", 3, *(["--patch"] if patch else [])]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    ablated = (
        "gain_removed_other",
        "gain_removed",
        "task_cost",
        "neutral_cost",
        "necessity_other",
        "sufficiency_other",
    )
    measures = ("necessity", "sufficiency") if patch else ablated
    places = [done.stdout.index(f"{measure}, nats per token") for measure in measures]
    assert places == sorted(places)
    assert "Means, nats per token" in done.stdout
    assert "random sets" in done.stdout
    effects = dps.SetEffects.load(tmp_path / "a")
    assert effects.families == ("preference", "induction", "previous_token")
    assert effects.ks == (1, 2)
    assert (tmp_path / "a" / "effects.csv").is_file()
    first = (tmp_path / "a" / "effects.safetensors").read_bytes()
    assert run(*command).returncode == 0
    assert (tmp_path / "a" / "effects.safetensors").read_bytes() == first
    other = run(*command, "--seed", 7)
    assert other.returncode == 2
    assert "made with other settings" in other.stderr


def test_faithfulness_measures_rankings_and_resumes(tmp_path):
    model = toy.build(tmp_path / "model")
    users = write_jsonl(tmp_path / "users.jsonl", toy.records())
    common = ["--model", model, "--users", users, "--max-examples", 1]
    assert run("score", "--out", tmp_path / "run", *common).returncode == 0
    command = ["faithfulness", "--run", tmp_path / "run", "--out", tmp_path / "f", *common, "--kinds", ""]
    command += ["--sizes", "0,0.125,0.5,1", "--n-random", 3]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert re.search(r"preference .* 0\.937 \(0\.937 to 0\.938\)", done.stdout), done.stdout
    assert re.search(r"4 \(50%\) .* 1\.000", done.stdout)
    assert "a 95% range of random rankings needs 39" in done.stdout
    curves = dps.Faithfulness.load(tmp_path / "f")
    assert curves.counts == (0, 1, 4, 8)
    for name in ("faithfulness.csv", "areas.csv", "faithfulness.html"):
        assert (tmp_path / "f" / name).is_file()
    first = (tmp_path / "f" / "faithfulness.safetensors").read_bytes()
    assert run(*command).returncode == 0
    assert (tmp_path / "f" / "faithfulness.safetensors").read_bytes() == first
    other = run(*command, "--seed", 7)
    assert other.returncode == 2
    assert "made with other settings" in other.stderr


def test_faithfulness_without_a_gain_says_so(scored, model, tmp_path):
    command = ["faithfulness", "--run", scored[0], "--out", tmp_path / "f", "--model", model, "--max-users", 3, *KINDS]
    done = run(*command, "--max-examples", 1, "--sizes", "0.1,1", "--n-random", 0)
    assert done.returncode == 0, done.stderr
    assert "no faithfulness: the gain over another user's profile is not reliably above 0" in done.stdout
    wrong = run(*command, "--sizes", "1;2")
    assert wrong.returncode == 2
    assert "is not a list of numbers" in wrong.stderr


def test_ablate_refuses_what_is_no_list(scored, model, tmp_path):
    done = run("ablate", "--run", scored[0], "--out", tmp_path, "--model", model, "--ks", "1;2", *KINDS)
    assert done.returncode == 2
    assert "write 1,5,10" in done.stderr


def test_evaluate_prints_the_table_and_keeps_its_settings(scored, model, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {model}\nrun: {scored[0]}\nmax_users: 3\nmax_examples: 1\nmax_new_tokens: 9\nlayers: [1]\nks: [2]\n"
        "methods: [plain, rag, dps, 'dps:induction', 'dps:random', stylevector]\nstrengths: [0.5, 1.0]\n"
    )
    command = ["evaluate", "--config", config, "--out", tmp_path / "table", "--max-new-tokens", 4]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    for shown in ("dps:induction", "to rag", "ROUGE-L", "chosen from 2"):
        assert shown in done.stdout
    found = Evaluation.load(tmp_path / "table")
    assert found.methods == ("plain", "rag", "dps", "dps:induction", "dps:random", "stylevector", "reference")
    assert found.rows["tokens"].groupby(found.rows["method"]).max()["rag"] <= 4, "the command line wins"
    assert len((tmp_path / "table" / "answers.csv").read_text().splitlines()) > len(found.rows)
    kept = tmp_path / "table" / "config.yaml"
    again = run("evaluate", "--config", kept, "--out", tmp_path / "table")
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout


def test_evaluate_names_the_field_that_is_wrong(model, tmp_path):
    config = tmp_path / "bad.yaml"
    config.write_text("method: [rag]\n")
    done = run("evaluate", "--config", config, "--out", tmp_path / "out", "--model", model)
    assert done.returncode == 2
    assert "bad.yaml: method: Extra inputs are not permitted; fields are model, device" in done.stderr
    config.write_text("methods: [rag\n")
    assert "not valid YAML" in run("evaluate", "--config", config, "--out", tmp_path / "out").stderr
    done = run("evaluate", "--out", tmp_path / "out", "--model", model, "--methods", "dps")
    assert "method 'dps' needs the scores of 'dps-lens score'; give --run" in done.stderr
    done = run("evaluate", "--out", tmp_path / "out", "--model", model, "--methods", "cad:induction")
    assert "method 'cad:induction': cad takes no heads" in done.stderr
    done = run("evaluate", "--out", tmp_path / "out", "--model", model, "--strengths", "much")
    assert "evaluate: strengths.0: Input should be a valid number" in done.stderr
    assert "Traceback" not in done.stderr
