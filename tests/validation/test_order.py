"""The order in which users come changes no number of anybody."""

import pytest
import torch
from pcs import score_pcs

import dps_lens as dps

QUIET = dps.RunConfig(progress=False)
FAMILY = {"set": dps.HeadSet.parse("L1H2,L0H1")}


@pytest.fixture(params=["as they are", "the other way round"])
def people(request, probe):
    return probe[:4] if request.param == "as they are" else probe[3::-1]


@pytest.fixture(scope="module")
def known():
    """What was measured with the users in the first order, by call."""
    return {}


def by_example(user_ids, example_ids, values):
    return {key: value for *key, value in zip(user_ids, example_ids, values, strict=True) for key in [tuple(key)]}


def same(known, name, found):
    """Remember what was found first, and compare what is found then."""
    first = known.setdefault(name, found)
    assert first.keys() == found.keys()
    for key, value in found.items():
        assert torch.allclose(first[key], value, atol=1e-6, equal_nan=True), (name, key)


@pytest.mark.parametrize("against", ["no_profile", "other_user"])
def test_scores(people, known, llama, short, against):
    config = dps.ScoreConfig(n_donors=2)
    options = {"prompt_config": short, "score_config": config, "run_config": QUIET, "max_examples": 1}
    scores = score_pcs(llama.hooked, people, against=against, **options)
    same(known, against, by_example(scores.user_ids, scores.example_ids, scores.values))


def test_held_out_effects(people, known, llama, short):
    options = {"prompt_config": short, "run_config": QUIET, "ks": (2,), "n_random": 19}
    effects = dps.ablation_curve(llama.hooked, people, FAMILY, **options)
    assert {"own", "no_profile", "other_user", "neutral"} <= effects.chosen.keys()
    for name, chosen in effects.chosen.items():
        same(known, f"effects, {name}", by_example(effects.user_ids, effects.example_ids, chosen))
    owners = list(dict.fromkeys(effects.user_ids))
    for name, draws in effects.draws.items():
        same(known, f"draws, {name}", dict(zip(owners, draws.unbind(1), strict=True)))
    frame = effects.to_frame().set_index(["family", "k", "measure"])
    numbers = frame[["mean", "low", "high", "difference_low", "difference_high", "p"]].astype(float)
    same(known, "table", {key: torch.tensor(row) for key, row in zip(numbers.index, numbers.to_numpy(), strict=True)})


def test_steering(people, known, llama, short):
    methods = {"dps": ("dps", FAMILY["set"])}
    sweep = dps.steering_sweep(
        llama.hooked, people, methods, strengths=(1.0,), k=2, n_random=5, prompt_config=short, run_config=QUIET
    )
    for name, change in sweep.change.items():
        same(known, f"steering, {name}", by_example(sweep.user_ids, sweep.example_ids, change.movedim(-1, 0)))
