"""Objects of somebody's own: docs/extending.md shows the files in examples/, which do what an oracle does by hand."""

import ast
import math
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import torch
from pcs import score_pcs
from sacrebleu import sentence_chrf

import dps_lens as dps

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "examples").glob("*.py"))
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
CALLS = [text for kind, text in FENCES if kind == "python" and text not in {file.read_text() for file in FILES}]
COMMANDS = [line for kind, text in FENCES if not kind for line in text.replace("\\\n", "").splitlines()]
NAMES = {"resample", "kl_objective", "adacad", "chrf", "first_token"}

CAP = 0.005  # below every strength that AdaCAD finds here
TOLERANCE = 1e-4  # nats; float32 of two attention kernels
CLOSE = {"abs": TOLERANCE, "rel": TOLERANCE}


@pytest.fixture(scope="module")
def model(tinies):
    return tinies("llama").hooked


@pytest.fixture(scope="module")
def users(probe):
    return probe[:4]


@pytest.fixture(scope="module")
def called(model, tmp_path_factory):
    """The names that the page's calls define, run in order on a small model."""
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(dps, "load_model", lambda: model, raising=False)
        for call in CALLS:
            exec(compile(call, "extending.md", "exec"), names)
    return names


@pytest.fixture(scope="module")
def command(tiny_folders, tmp_path_factory):
    """Run the page's commands that hold a word, where `examples/` is, on a small model; what they print."""
    from typer.testing import CliRunner

    from dps_lens.cli import app

    folder = tmp_path_factory.mktemp("commands")
    (folder / "examples").symlink_to(ROOT / "examples")
    done: dict[str, str] = {}

    def run(word: str) -> str:
        chosen = [line for line in COMMANDS if word in line]
        assert chosen
        for line in chosen:
            if line not in done:
                name, *arguments = shlex.split(line)
                assert name == "dps-lens"
                answer = CliRunner().invoke(app, [*arguments, "--model", str(tiny_folders["llama"])])
                assert answer.exit_code == 0, answer.output + repr(answer.exception)
                done[line] = answer.stdout
        return "".join(done[line] for line in chosen)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("COLUMNS", "200")
        patch.setattr(sys, "path", [*sys.path])
        yield run
    for name in NAMES:
        sys.modules.pop(name, None)


def logits_of(model, prompt, hooks=()):
    """Logits that give the response, by one pass of TransformerLens."""
    start, stop = prompt.spans["response"]
    with torch.no_grad():
        logits = model.run_with_hooks(prompt.tokens[None, : stop - 1], fwd_hooks=[*hooks], return_type="logits")
    return logits[0, start - 1 :].double()


def nll(model, prompt, hooks=()):
    logp = logits_of(model, prompt, hooks).log_softmax(-1)
    return -float(logp.gather(-1, prompt.response_tokens[:, None]).mean())


def kl(model, prompt, hooks):
    ablated, full = (logits_of(model, prompt, one).log_softmax(-1) for one in (hooks, ()))
    return float((ablated.exp() * (ablated - full)).sum(-1).mean())


def edited(prompt, positions):
    start, stop = prompt.spans["response"]
    where = {"response": (start - 1, stop - 1), "all": (0, stop - 1), "profile": prompt.spans["profile"]}
    return range(*where[positions])


def putting(heads, new):
    """Hooks that replace z; `new(layer, head)` is `{position: z}`."""

    def make(layer, head):
        def hook(z, hook):
            z = z.clone()
            for position, value in new(layer, head).items():
                z[0, position, head] = value
            return z

        return f"blocks.{layer}.attn.hook_z", hook

    return [make(*head) for head in heads]


def zero(heads, prompt):
    return putting(heads, lambda layer, head: dict.fromkeys(edited(prompt, "response"), 0.0))


def resampled(model, prompt, other, heads, positions):
    """Hooks that put the other prompt's z at the same share of the way through."""
    with torch.no_grad():
        _, cache = model.run_with_cache(other.tokens[None, :-1])
    ours, theirs = edited(prompt, positions), edited(other, positions)

    def new(layer, head):
        z = cache[f"blocks.{layer}.attn.hook_z"][0, :, head]
        return {ours[i]: z[theirs[i * len(theirs) // len(ours)]] for i in range(len(ours))}

    return putting(heads, new)


def resampled_change(model, prompt, other, heads, positions="response"):
    if not edited(prompt, positions):
        return 0.0
    return nll(model, prompt, resampled(model, prompt, other, heads, positions)) - nll(model, prompt)


def discovery(users, n=None):
    return [one for user in users for one in user.discovery_examples()[-n if n else None :]]


def donors_of(model, example, others, expected, heads, positions="response", config=None):
    """Of the other examples, those whose z give the expected scores, one a head, against no profile."""
    kinds = ("own", "none")
    own = [dps.build_prompt(model, example, kind, config=config) for kind in kinds]
    found = []
    for other in others:
        shown = [dps.build_prompt(model, other, kind, config=config) for kind in kinds]
        changes = [
            [resampled_change(model, a, b, [head], positions) for a, b in zip(own, shown, strict=True)]
            for head in heads
        ]
        if [with_profile - without for with_profile, without in changes] == pytest.approx(expected, **CLOSE):
            found.append(other.id)
    return found


def test_there_is_an_example_of_every_kind():
    assert {file.stem for file in FILES} == NAMES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_is_short_shown_and_asks_for_public_names_only(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    assert f"`examples/{file.name}`:\n\n```python\n{text}```" in PAGE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert all(not name.name.startswith("dps_lens.") for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not str(node.module).startswith("dps_lens.")
            assert node.module != "dps_lens" or {name.name for name in node.names} <= {*dps.__all__}
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "dps":
            assert node.attr in dps.__all__


@pytest.mark.full
def test_resampled_heads_are_scored_and_tested_as_by_hand(called, model, users):
    scores, heads = called["scores"], [(0, 1), (2, 3)]
    examples = discovery(users, 2)
    assert scores.manifest["ablation"] == {"name": "resample", "seed": 1}
    assert scores.example_ids == tuple(example.id for example in examples)
    for row in (0, 3):
        others = [one for one in examples if one is not examples[row]]
        expected = [float(scores.values[row][head]) for head in heads]
        assert len(donors_of(model, examples[row], others, expected, heads)) == 1
        assert max(map(abs, expected)) > 10 * TOLERANCE

    effects, user = called["effects"], users[0]
    prompt = dps.build_prompt(model, user.examples[-1])
    (tested,) = (effects.sets(k=2)[name] for name in effects.user_ids if name == user.id)
    expected = float(effects.chosen["own"][0, 0, 0, 0])
    found = [
        one.id
        for one in discovery(users)
        if resampled_change(model, prompt, dps.build_prompt(model, one), tested) == pytest.approx(expected, **CLOSE)
    ]
    assert len(found) == 1


@pytest.mark.parametrize("positions", ["all", "profile"])
def test_resampling_at_other_positions(called, model, users, short, positions):
    heads, (first, *rest) = [(1, 2)], discovery(users[:2], 2)
    options = {"max_examples": 2, "prompt_config": short, "positions": positions}
    scores = score_pcs(model, users[:2], ablation=called["Resample"](), **options)
    expected = [float(scores.values[0][head]) for head in heads]
    assert len(donors_of(model, first, rest, expected, heads, positions, short)) == 1


def test_a_seed_decides_what_is_drawn(called, model, users, short):
    make = called["Resample"]
    scored = [
        score_pcs(model, users[:2], ablation=make(seed=seed), max_examples=2, prompt_config=short)
        for seed in (0, 0, 1, 2)
    ]
    assert torch.equal(scored[0].values, scored[1].values)
    assert all(not torch.equal(one.values, other.values) for one, other in pairwise(scored[1:]))


def test_resampling_is_refused_where_nothing_can_be_drawn(called, model, users, short):
    resample, heads = called["Resample"](), dps.HeadSet.parse("L0H1")
    prompt = dps.build_prompt(model, users[0].examples[-1], config=short)
    with pytest.raises(dps.DPSLensError, match="generate: ablation 'resample' takes its values from the users' ex"):
        dps.generate(model, prompt, heads=heads, decode_config=dps.DecodeConfig(ablation=resample))
    with (
        pytest.raises(dps.DPSLensError, match="ablate: ablation 'resample'"),
        dps.ablate(model, heads, ablation=resample, prompt=prompt),
    ):
        pass
    with pytest.raises(dps.DPSLensError, match="no other discovery example"):
        score_pcs(model, users[:1], ablation=resample, max_examples=1, prompt_config=short)


def test_kl_is_the_distance_of_two_passes(called, model, users):
    scores = called["moved"]
    assert (scores.manifest["objective"], scores.manifest["unit"]) == ("kl", "nats per token")
    for row, example in enumerate(discovery(users, 1)[:2]):
        own, none = (dps.build_prompt(model, example, kind) for kind in ("own", "none"))
        for head in ((0, 2), (2, 1)):
            expected = [kl(model, prompt, zero([head], prompt)) for prompt in (own, none)]
            found = [float(scores.components[name][row][head]) for name in ("own", "no_profile")]
            assert found == pytest.approx(expected, **CLOSE)
            assert min(expected) > 10 * TOLERANCE
            assert float(scores.values[row][head]) == pytest.approx(expected[0] - expected[1], **CLOSE)

    effects, user = called["moved_by_sets"], users[0]
    tested = effects.sets(k=2)[user.id]
    for name, kind in (("own", "own"), ("no_profile", "none")):
        prompt = dps.build_prompt(model, user.examples[-1], kind)
        expected = kl(model, prompt, zero(tested, prompt))
        assert float(effects.chosen[name][0, 0, 0, 0]) == pytest.approx(expected, **CLOSE)
        assert effects.full[name] == pytest.approx(0)


@torch.no_grad()
def adacad_by_hand(model, prompt, without, steps, end):
    """Two whole passes a step; tokens, and at each step α, KL(steered ‖ full) and how clear the choice was."""
    tokens, found = [], []
    for _ in range(steps):
        full, other = (
            model(torch.cat([one.prompt_tokens, torch.tensor(tokens, dtype=torch.long)])[None])[0, -1].double()
            for one in (prompt, without)
        )
        p, q = full.softmax(-1), other.softmax(-1)
        middle = (p + q) / 2
        alpha = float((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2
        steered = full + alpha * (full - other)
        gap = float(steered.topk(2).values.diff().abs())
        moved = (steered.softmax(-1) * (steered.log_softmax(-1) - full.log_softmax(-1))).sum()
        tokens.append(int(steered.argmax()))
        found.append((alpha, float(moved), gap))
        if tokens[-1] == end:
            break
    return tokens, *zip(*found, strict=True)


def test_adacad_writes_what_a_slow_loop_writes(called, model, users):
    out = called["out"]
    assert out.manifest["rule"]["name"] == "AdaCAD"
    alphas = []
    for row, (prompt, without) in enumerate(zip(called["prompts"], called["without"], strict=True)):
        tokens, alpha, moved, gaps = adacad_by_hand(model, prompt, without, 16, model.tokenizer.eos_token_id)
        assert min(gaps) > TOLERANCE, "no step was a matter of rounding"
        assert out.tokens[row].tolist() == tokens
        assert out.kl[row].tolist() == pytest.approx(moved, rel=0.02, abs=2e-6)
        alphas += alpha
    assert 0 <= min(alphas) < max(alphas) <= math.log(2)
    assert max(alphas) - min(alphas) > 0.01
    plain = dps.generate(model, called["prompts"], rule="greedy", max_new_tokens=16)
    assert plain.texts != out.texts
    # Under a cap that every step exceeds it is `cad`.
    kept = {"keep_delta_logits": True}
    options = {"negative_prompts": called["without"], "max_new_tokens": 8}
    capped, fixed = (
        dps.generate(model, called["prompts"], decode_config=dps.DecodeConfig(**kept, **config), **rule, **options)
        for config, rule in (({"max_gamma": CAP}, {"rule": called["AdaCAD"]()}), ({}, {"rule": "cad", "alpha": CAP}))
    )
    assert min(alphas) > CAP
    assert torch.cat(capped.delta_logits) == pytest.approx(torch.cat(fixed.delta_logits), abs=1e-6)
    assert float(torch.cat(fixed.delta_logits).abs().max()) > 1e-3


def test_chrf_measures_answers_and_chooses_settings(called, model, users, short):
    table = called["table"]
    rows = table.rows[table.rows["method"] != "reference"]
    assert len(rows) == 2 * len(users)
    expected = [
        sentence_chrf(text, [reference]).score for text, reference in zip(rows["text"], rows["reference"], strict=True)
    ]
    assert rows["chrF"].tolist() == pytest.approx(expected)
    assert max(expected) > 0
    assert table.manifest["better"]["chrF"] == "higher"
    means = table.to_frame().set_index(["method", "metric"])["mean"]
    assert means["rag", "chrF"] == pytest.approx(rows[rows["method"] == "rag"]["chrF"].mean())
    # The rule of the table is that of `generate`.
    texts = [text.strip() for text in called["out"].texts]
    assert rows[rows["method"] == "adacad"]["text"].tolist() == texts

    options = {"metrics": [called["CHRF"]], "max_examples": 1, "max_new_tokens": 8, "prompt_config": short}
    chosen = dps.evaluate(model, users[:2], {"cad": "cad"}, strengths=(0.5, 2.0), **options).choices
    assert chosen["chrF"].nunique() == 2
    assert chosen.loc[chosen["chrF"].idxmax(), "chosen"]


def test_first_token_heads_are_those_of_the_pattern(called, model):
    scores = called["families"]["first_token"]
    texts = called["FirstToken"]().texts
    assert scores.example_ids == texts
    assert scores.manifest["unit"] == "mean attention"
    for row, text in enumerate(texts):
        _, cache = model.run_with_cache(model.to_tokens(text))
        for layer in range(model.cfg.n_layers):
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0]
            for head in range(model.cfg.n_heads):
                by_hand = sum(float(pattern[head, query, 0]) for query in range(1, pattern.shape[1]))
                expected = by_hand / (pattern.shape[1] - 1)
                assert float(scores.values[row, layer, head]) == pytest.approx(expected, abs=1e-5)
    assert called["overlap"].names == ("preference", "first_token", "previous_token")


def test_the_commands_score_and_test_as_the_calls_do(called, command):
    printed = command("resample.py")
    assert "first_token" in printed
    scores, effects = dps.HeadScores.load("runs/resample"), dps.SetEffects.load("runs/resample-ablation")
    assert scores.manifest["ablation"] == effects.manifest["ablation"] == {"name": "resample", "seed": 1}
    assert scores.values == pytest.approx(called["scores"].values, abs=1e-5)
    assert effects.families == ("preference", "first_token")
    assert effects.chosen["own"][:, :1] == pytest.approx(called["effects"].chosen["own"], abs=1e-5)

    command("kl_objective.py")
    scores = dps.HeadScores.load("runs/kl")
    assert scores.manifest["objective"] == "kl"
    assert scores.values == pytest.approx(called["moved"].values, abs=1e-5)

    command("resample")
    assert Path("runs/resample/compare/families.html").is_file()
    frame = pd.read_csv("runs/resample/compare/families.csv")
    expected = called["overlap"].to_frame()
    assert frame[["a", "b"]].to_numpy().tolist() == expected[["a", "b"]].to_numpy().tolist()
    assert frame["jaccard"].tolist() == pytest.approx(expected["jaccard"].tolist())


def test_the_commands_steer_and_evaluate_as_the_calls_do(called, command):
    import json

    lines = [json.loads(line) for line in command("dps-lens steer").splitlines()]
    assert [line["steered"] for line in lines] == called["out"].texts
    assert "chrF" in command("chrf.py")
    rows = dps.Evaluation.load("runs/chrf").rows
    assert set(rows["method"]) == {"rag", "examples/adacad.py:AdaCAD", "reference"}
    rows, expected = (of[of["method"] != "reference"] for of in (rows, called["table"].rows))
    assert rows["text"].tolist() == expected["text"].tolist()
    assert rows["chrF"].tolist() == pytest.approx(expected["chrF"].tolist())


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("score --out runs/x --ablation examples/chrf.py:CHRF", "Ablation"),
        ("score --out runs/x --objective examples/chrf.py:CHRF", "Objective"),
        ("steer --rule examples/chrf.py:CHRF", "Term"),
        ("evaluate --out runs/x --methods rag --metrics examples/kl_objective.py:KL", "Metric"),
        ("compare --run runs/resample --kinds examples/chrf.py:CHRF", "Family"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_an_object_of_another_kind_is_refused(command, tiny_folders, arguments, wanted):
    from typer.testing import CliRunner

    from dps_lens.cli import app

    command("dps-lens score")
    answer = CliRunner().invoke(app, [*arguments.split(), "--model", str(tiny_folders["llama"])])
    assert isinstance(answer.exception, dps.DPSLensError)
    assert f"asked for is a {wanted}" in str(answer.exception)
