"""Ground truth: a model in which exactly one known head carries the profile."""

import pytest
import torch
import toy
from conftest import write_jsonl

import dps_lens as dps
from dps_lens.heads import Head, HeadSet

CARRIER = Head(*toy.CARRIER)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return dps.load_model(str(toy.build(tmp_path_factory.mktemp("toy"))))


@pytest.fixture(scope="module")
def users(tmp_path_factory):
    return dps.load_users(write_jsonl(tmp_path_factory.mktemp("users") / "docs.jsonl", toy.records()))


@pytest.mark.parametrize("ablation", ["zero", "mean", "uniform"])
@pytest.mark.parametrize("positions", ["response", "all"])
def test_pcs_ranks_the_carrier_first_with_a_clear_gap(model, users, ablation, positions):
    scores = dps.score_heads(model, users, ablation=ablation, positions=positions, progress=False)
    mean = scores.mean().flatten()
    best, second = mean.topk(2).values
    assert scores.top(1).heads == (CARRIER,)
    # A head that spreads its attention evenly still copies a little of every signature it sees.
    floor = 0.2 if ablation == "uniform" else 0.5
    assert float(best) > floor
    assert float(best) > 10 * abs(float(second))
    low, _ = scores.ci()
    assert float(low[CARRIER]) > floor


def test_only_the_carriers_ablation_removes_the_gain(model, users):
    cost = dps.ablation_cost(model, users, HeadSet([CARRIER]), n_random=3, progress=False)
    frame = cost.to_frame().set_index(["ablated", "measure"])["mean"]
    gain = frame["full model", "gain"]
    assert gain > 0.5
    assert abs(frame["top 1 heads", "gain"]) < 0.05 * gain
    assert frame["top 1 heads", "taken"] == pytest.approx(gain, rel=0.05)
    assert cost.share_of_draws_below == 1.0
    for layer in range(2):
        for head in range(4):
            if (layer, head) != CARRIER:
                other = dps.ablation_cost(model, users, HeadSet([(layer, head)]), n_random=0, progress=False)
                taken = other.to_frame().set_index(["ablated", "measure"]).loc[("top 1 heads", "taken"), "mean"]
                assert abs(taken) < 0.05 * gain


def test_steering_amplifies_what_the_carrier_writes(model, users):
    prompts = [dps.build_prompt(model, user.examples[0]) for user in users]
    plain = dps.generate(model, prompts, heads=HeadSet([CARRIER]), gamma=0.0, max_new_tokens=1)
    steered = dps.generate(model, prompts, heads=HeadSet([CARRIER]), gamma=1.0, max_new_tokens=1)
    muted = dps.generate(model, prompts, heads=HeadSet([CARRIER]), gamma=-1.0, max_new_tokens=1)
    for index, user in enumerate(users):
        signature = user.examples[0].reference.split()[0]
        assert plain.texts[index] == steered.texts[index] == signature
        assert float(steered.logprobs[index]) > float(plain.logprobs[index])
        assert muted.texts[index] != signature


def test_profile_reading_head_is_found_by_denoising(model, users):
    scores = dps.score_heads(model, users, contrast=None, ablation="patch", direction="denoising", progress=False)
    assert scores.top(1).heads == (CARRIER,)
    recovered = scores.mean()[CARRIER]
    gain = scores.nll["no_profile"].mean() - torch.tensor(
        [dps.score_heads(model, users, max_examples=None, progress=False).nll["own"].mean()]
    )
    assert float(recovered) == pytest.approx(float(gain), rel=0.1)
