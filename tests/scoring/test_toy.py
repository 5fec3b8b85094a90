"""Ground truth: a model in which exactly one known head carries the profile."""

import pytest
import torch
import toy
from pcs import score_pcs

import dps_lens as dps
from dps_lens.heads import Head, HeadSet

CARRIER = Head(*toy.CARRIER)


@pytest.mark.parametrize("ablation", ["zero", "mean", "uniform"])
@pytest.mark.parametrize("positions", ["response", "all"])
def test_pcs_ranks_the_carrier_first_with_a_clear_gap(toy_model, toy_users, ablation, positions):
    scores = score_pcs(toy_model, toy_users, ablation=ablation, positions=positions)
    mean = scores.mean().flatten()
    best, second = mean.topk(2).values
    assert scores.top(1).heads == (CARRIER,)
    # A head that spreads its attention evenly still copies a little of every signature it sees.
    floor = 0.2 if ablation == "uniform" else 0.5
    assert float(best) > floor
    assert float(best) > 10 * abs(float(second))
    low, _ = scores.ci()
    assert float(low[CARRIER]) > floor


def test_only_the_carriers_ablation_removes_the_gain(toy_model, toy_users):
    cost = dps.ablation_cost(toy_model, toy_users, HeadSet([CARRIER]), n_random=20)
    frame = cost.beside_random().set_index(["ablated", "measure"])["mean"]
    gain = frame["full model", "gain"]
    assert gain > 0.5
    assert abs(frame["top 1 heads", "gain"]) < 0.05 * gain
    assert frame["top 1 heads", "gain_removed"] == pytest.approx(gain, rel=0.05)
    assert cost.to_frame().query("measure == 'gain_removed'")["p"].tolist() == [1 / 21]
    assert "More of the gain goes with" in cost.verdict()
    for layer in range(2):
        for head in range(4):
            if (layer, head) != CARRIER:
                other = dps.ablation_cost(toy_model, toy_users, HeadSet([(layer, head)]), n_random=0)
                taken = (
                    other.beside_random().set_index(["ablated", "measure"]).loc[("top 1 heads", "gain_removed"), "mean"]
                )
                assert abs(taken) < 0.05 * gain


def test_steering_amplifies_what_the_carrier_writes(toy_model, toy_users):
    prompts = [dps.build_prompt(toy_model, user.examples[0]) for user in toy_users]
    plain = dps.generate(toy_model, prompts, heads=HeadSet([CARRIER]), gamma=0.0, max_new_tokens=1)
    steered = dps.generate(toy_model, prompts, heads=HeadSet([CARRIER]), gamma=1.0, max_new_tokens=1)
    muted = dps.generate(toy_model, prompts, heads=HeadSet([CARRIER]), gamma=-1.0, max_new_tokens=1)
    for index, user in enumerate(toy_users):
        signature = user.examples[0].reference.split()[0]
        assert plain.texts[index] == steered.texts[index] == signature
        assert float(steered.logprobs[index]) > float(plain.logprobs[index])
        assert muted.texts[index] != signature


def test_profile_reading_head_is_found_by_denoising(toy_model, toy_users):
    scores = score_pcs(toy_model, toy_users, ablation=dps.Patch(direction="denoising"))
    assert scores.top(1).heads == (CARRIER,)
    recovered = scores.mean()[CARRIER]
    gain = scores.nll["no_profile"].mean() - torch.tensor(
        [score_pcs(toy_model, toy_users, max_examples=None).nll["own"].mean()]
    )
    assert float(recovered) == pytest.approx(float(gain), rel=0.1)
