"""Texts at every γ and K: the same as `generate` writes, resumed, and summarised over users."""

import numpy as np
import pytest
from pcs import score_pcs
from scipy import stats

import dps_lens as dps
from dps_lens.errors import EvaluationError, SteeringError
from dps_lens.evaluation import SteeringGrid
from dps_lens.evaluation.metrics import rouge
from dps_lens.evaluation.style import StyleMeasure
from dps_lens.heads import HeadSet

PROMPT = dps.PromptConfig(items=2, profile_tokens=60, task_tokens=20, response_tokens=6)
HEADS = HeadSet.parse("L1H2,L0H1,L2H0")
OPTIONS = {"gammas": (0.5, 2.0), "ks": (1, 3), "max_new_tokens": 6, "prompt_config": PROMPT}


@pytest.fixture(scope="module")
def grid(tinies, probe):
    return dps.steering_grid(tinies("llama").hooked, probe[:3], HEADS, **OPTIONS)


def test_texts_are_those_of_generate(grid, llama, probe):
    style = StyleMeasure(probe[:3])
    for user in probe[:3]:
        example = user.examples[-1]
        prompt = dps.build_prompt(llama.hooked, example, config=PROMPT)
        for gamma, k in [(0.0, 1), (0.5, 1), (0.5, 3), (2.0, 1), (2.0, 3)]:
            found = grid.find(example.id, gamma, k)
            options = {"heads": HEADS[:k], "gamma": gamma, "max_new_tokens": 6}
            options["decode_config"] = dps.DecodeConfig(keep_alternatives=3)
            expected = dps.generate(llama.hooked, prompt, **options)
            assert found.pieces == expected.pieces[0]
            assert found.shifts == pytest.approx(expected.shifts[0].tolist(), abs=1e-4)
            assert found.kl == pytest.approx(expected.kl[0].tolist(), abs=1e-4)
            assert [[p for p, _ in s] for s in found.alternatives] == [
                [p for p, _ in s] for s in expected.alternatives[0]
            ]
            assert found.heads == (str(HEADS[:k]) if gamma else "")
            assert found.scores["ROUGE-L"] == rouge(example.reference, found.text)["ROUGE-L"]
            assert found.scores["style"] == pytest.approx(style(user.id, found.text))
    assert len(grid.texts) == 3 * 5, "γ = 0 once"


def test_frame_is_means_of_users_with_paired_differences(grid):
    frame = grid.to_frame().set_index(["gamma", "K", "measure"])
    names = [one.example for one in grid.texts if not one.gamma]
    plain, steered = (
        np.array([grid.find(example, gamma, 3).scores["NLL"] for example in names]) for gamma in (0.0, 2.0)
    )
    row = frame.loc[(2.0, 3, "NLL")]
    assert row["mean"] == pytest.approx(steered.mean())
    low, high = stats.t.interval(0.95, 2, (steered - plain).mean(), stats.sem(steered - plain))
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((low, high))
    kl = [np.mean(grid.find(example, 2.0, 3).kl) for example in names]
    assert frame.loc[(2.0, 3, "KL"), "mean"] == pytest.approx(np.mean(kl))
    assert np.isnan(frame.loc[(0.0, 0, "NLL"), "difference"])


def test_users_get_heads_that_others_chose(llama, probe, tmp_path):
    scores = score_pcs(llama.hooked, probe[:6], max_examples=1, prompt_config=PROMPT)
    found = dps.steering_grid(llama.hooked, probe[:6], scores, **OPTIONS)
    from dps_lens.selection import folds

    for fold in folds(probe[:6], 0):
        expected = str(scores.without(fold).top(3))
        for text in (one for one in found.texts if one.user in fold and one.k == 3):
            assert text.heads == expected


def test_resumes_and_loads(grid, llama, probe, tmp_path, monkeypatch):
    # What measures nothing here may be installed later.
    assert {*grid.manifest["measured_with"]} == {"rouge_score", "nltk", "scikit-learn", "numpy"}
    first = dps.steering_grid(llama.hooked, probe[:3], HEADS, out=tmp_path, **OPTIONS)
    assert first.texts == grid.texts == SteeringGrid.load(tmp_path).texts
    assert first.references == grid.references == SteeringGrid.load(tmp_path).references
    sorted((tmp_path / "units").glob("*"))[0].unlink()
    calls = []
    from dps_lens.evaluation import grid as module

    real = module.generate
    monkeypatch.setattr(module, "generate", lambda *a, **o: calls.append(1) or real(*a, **o))
    assert dps.steering_grid(llama.hooked, probe[:3], HEADS, out=tmp_path, **OPTIONS).texts == grid.texts
    assert len(calls) == 1
    with pytest.raises(dps.DPSLensError, match="other settings"):
        dps.steering_grid(llama.hooked, probe[:3], HEADS, out=tmp_path, **OPTIONS | {"gammas": (1.0,)})
    (tmp_path / "grid.json").write_text("{", encoding="utf-8")
    with pytest.raises(EvaluationError, match="not a whole SteeringGrid"):
        SteeringGrid.load(tmp_path)


def test_what_cannot_be_written_is_refused(grid, llama, probe):
    model = llama.hooked
    for rule in ("cad", "dps+cad", "vector"):
        with pytest.raises(SteeringError, match="heads alone"):
            dps.steering_grid(model, probe[:2], HEADS, rule=rule)
    for wrong in ({"gammas": (0.0,)}, {"gammas": (-2.0,)}, {"ks": (0,)}, {"ks": ()}):
        with pytest.raises(EvaluationError, match="give one γ"):
            dps.steering_grid(model, probe[:2], HEADS, **OPTIONS | wrong)
    with pytest.raises(EvaluationError, match="one task"):
        dps.steering_grid(model, [], HEADS)
    with pytest.raises(EvaluationError, match="no text of example"):
        grid.find("nobody", 0.5, 1)


def test_rules_without_a_full_model_have_no_shift(llama, probe):
    found = dps.steering_grid(llama.hooked, probe[:2], HEADS, rule="amplify", **OPTIONS)
    steered = [one for one in found.texts if one.gamma]
    assert all(shift is None for one in steered for shift in one.shifts)
    assert np.isnan(found.to_frame().set_index(["gamma", "K", "measure"]).loc[(2.0, 3, "KL"), "mean"])
