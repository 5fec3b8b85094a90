"""Which planted carriers each score finds."""

from functools import cache
from statistics import fmean

import plants
import pytest
import torch

import dps_lens as dps
from dps_lens.data.conditions import neutral_prompt, prompts_in
from dps_lens.families.retrieval import shipped_paragraphs
from dps_lens.heads import Head

EVERY = {Head(layer, head) for layer in range(plants.N_LAYERS) for head in range(plants.N_HEADS)}


def edits(model, heads, prompt, source=None):
    """Plain hooks on the positions that give the response; without a source, z is 0."""
    begin = prompt.spans["response"][0] - 1

    def make(layer):
        chosen = [head for at, head in heads if at == layer]

        def edit(z, hook):
            z = z.clone()
            z[:, begin:, chosen] = 0 if source is None else source[layer][:, :, chosen]
            return z

        return edit

    return [(f"blocks.{layer}.attn.hook_z", make(layer)) for layer in {layer for layer, _ in heads}]


def losses(model, prompt, hooks=()):
    """Of each response token; the whole prompt is run."""
    start, stop = prompt.spans["response"]
    with torch.no_grad():
        logits = model.run_with_hooks(prompt.tokens[None, : stop - 1], fwd_hooks=list(hooks), return_type="logits")
    logp = logits[0, start - 1 :].double().log_softmax(-1)
    return -logp.gather(-1, prompt.tokens[start:stop, None])[:, 0]


def z_of(model, prompt):
    start, stop = prompt.spans["response"]
    found = {}

    def keep(z, hook):
        found[len(found)] = z[:, start - 1 :].clone()

    names = [f"blocks.{layer}.attn.hook_z" for layer in range(plants.N_LAYERS)]
    with torch.no_grad():
        model.run_with_hooks(prompt.tokens[None, : stop - 1], fwd_hooks=[(name, keep) for name in names])
    return found


class Truth:
    """What edits of heads do to held-out titles, by plain hooks: the newest title of each user, one other user each."""

    def __init__(self, planted):
        self.model, self.users, self.carriers = planted
        self.pairs = []
        for user in self.users:
            (own,) = prompts_in(self.model, user.examples[0], "own", self.users)
            (other,) = prompts_in(self.model, user.examples[0], "other_user", self.users)
            self.pairs.append((own, other, z_of(self.model, own), z_of(self.model, other)))

    def gain(self, heads=()):
        """NLL with another user's profile − NLL with the own one, the heads zeroed in both."""
        return fmean(
            float((losses(self.model, other, edits(self.model, heads, other)) - self.own(own, heads)).mean())
            for own, other, *_ in self.pairs
        )

    def own(self, own, heads):
        return losses(self.model, own, edits(self.model, heads, own))

    def lost(self, heads):
        """NLL with the own profile, once the z of the other user's run stands in the heads."""
        return fmean(
            float((losses(self.model, own, edits(self.model, heads, own, z)) - losses(self.model, own)).mean())
            for own, _, _, z in self.pairs
        )

    def sufficient(self, heads):
        """NLL with another user's profile that goes when the z of the own run stands in the heads."""
        return fmean(
            float((losses(self.model, other) - losses(self.model, other, edits(self.model, heads, other, z))).mean())
            for _, other, z, _ in self.pairs
        )


@pytest.fixture(scope="module")
def truth(planted):
    return cache(lambda name: Truth(planted(name)))


@pytest.mark.parametrize("name", plants.NAMES)
def test_the_carriers_hold_the_gain_and_nothing_else_does(truth, name):
    of = truth(name)
    gain, rest = of.gain(), EVERY - of.carriers
    assert gain > 1.5
    assert abs(of.gain(of.carriers)) < 0.05 * gain
    assert of.lost(of.carriers) == pytest.approx(gain, rel=0.05)
    assert of.sufficient(of.carriers) == pytest.approx(gain, rel=0.05)
    assert of.gain(rest) > 0.9 * gain
    assert abs(of.lost(rest)) < 0.05 * gain
    assert abs(of.sufficient(rest)) < 0.05 * gain


def test_redundant_carriers_back_each_other_up(truth):
    of = truth("redundant")
    for carrier in of.carriers:
        assert of.lost([carrier]) < 0.02 * of.gain()
        assert of.gain([carrier]) > 0.9 * of.gain()


def test_both_ends_of_a_chain_are_needed_and_the_first_says_nothing_itself(truth):
    of = truth("chain")
    first, second = sorted(of.carriers)
    for carrier in of.carriers:
        assert of.gain([carrier]) < 0.05 * of.gain()
        assert of.lost([carrier]) > 0.5 * of.gain()
    # The first is another user's, and the second held as it was.
    for own, _, z_own, z_other in of.pairs:
        hooks = [*edits(of.model, [first], own, z_other), *edits(of.model, [second], own, z_own)]
        torch.testing.assert_close(losses(of.model, own, hooks), losses(of.model, own), atol=0.05, rtol=0)


def test_style_is_the_first_word_and_topic_the_second(truth):
    of = truth("style_topic")
    for carrier, word in zip(sorted(of.carriers), (0, 1), strict=True):
        changed = sum(
            losses(of.model, own, edits(of.model, [carrier], own, z)) - losses(of.model, own)
            for own, _, _, z in of.pairs
        ) / len(of.pairs)
        assert float(changed[word]) > 5
        assert float(changed.abs().sum() - changed[word]) < 0.1


def test_the_harmful_head_is_needed_by_any_text(truth):
    of = truth("harmful")
    prompts = [neutral_prompt(of.model, text) for text in shipped_paragraphs()[:3]]
    prompts += [prompts_in(of.model, user.examples[0], "no_profile", of.users)[0] for user in of.users]
    for prompt in prompts:
        cost = losses(of.model, prompt, edits(of.model, [plants.HARMFUL], prompt)) - losses(of.model, prompt)
        assert float(cost.mean()) > 2
    assert of.lost([plants.HARMFUL]) == pytest.approx(0, abs=1e-6)


def single(planted, ablation, against):
    return dps.score_heads(
        planted.model, planted.users, ablation=ablation, against=against, method="exact", max_examples=2
    )


@pytest.mark.parametrize("against", [None, "no_profile"])
def test_single_zero_ablations_miss_redundant_carriers(planted, against):
    of = planted("redundant")
    scores = single(of, "zero", against)
    found = {*scores.top(len(of.carriers)).heads} & of.carriers
    assert len(found) <= len(of.carriers) / 2
    assert all(abs(float(scores.mean()[head])) < 0.05 for head in of.carriers)


@pytest.mark.parametrize("against", ["other_user", "no_profile"])
def test_single_patches_miss_redundant_carriers(planted, truth, against):
    of = planted("redundant")
    mean = single(of, "patch", against).mean()
    assert all(abs(float(mean[head])) < 0.02 * truth("redundant").gain() for head in of.carriers)


def test_single_zero_ablations_rank_the_harmful_head_first(planted):
    of = planted("harmful")
    scores = single(of, "zero", None)
    assert scores.top(1).heads == (plants.HARMFUL,)
    assert float(scores.mean()[plants.HARMFUL]) > 3 * max(float(scores.mean()[head]) for head in of.carriers)


def walked(planted, against, ablation="patch"):
    """Mean integrated scores."""
    config = dps.ScoreConfig(n_donors=2)
    return dps.score_heads(
        planted.model,
        planted.users,
        ablation=ablation,
        against=against,
        method="integrated",
        max_examples=2,
        score_config=config,
    ).mean()


def ranked(values):
    order = values.flatten().argsort(descending=True).tolist()
    return [Head(*divmod(index, plants.N_HEADS)) for index in order]


@pytest.mark.parametrize("against", ["other_user", pytest.param("no_profile", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", plants.NAMES)
def test_integrated_patches_put_all_carriers_first(planted, name, against):
    of = planted(name)
    values = walked(of, against)
    n = len(of.carriers)
    order = ranked(values)
    assert {*order[:n]} == of.carriers
    assert float(values[order[n - 1]]) > 10 * abs(float(values[order[n]]))


def test_restoring_misses_the_first_of_a_chain_where_there_is_no_profile(planted):
    """What the first head notes cannot be looked for there; the second, as it was, says everything."""
    of = planted("chain")
    first, second = sorted(of.carriers)
    values = walked(of, "no_profile", dps.Patch(direction="denoising"))
    assert ranked(values)[0] == second
    assert float(values[first]) < 0


def test_what_does_not_hang_on_the_profile_scores_nothing(planted):
    values = walked(planted("harmful"), "other_user")
    assert abs(float(values[plants.HARMFUL])) < 1e-6 * float(values.max())
