"""Settings of generation_config beside the processor: the documented distribution, or a refusal."""

import gc
from contextlib import ExitStack

import pytest
import torch
from conftest import no_hooks_left
from oracles import columns_replaced
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

import dps_lens as dps
from dps_lens.data import build_prompt
from dps_lens.errors import SteeringError
from dps_lens.heads import HeadSet

HEADS = HeadSet.parse("L0H1,L2H2")
GAMMA, NEW = 1.5, 5


@pytest.fixture(scope="module")
def ids(tinies, probe, short):
    return build_prompt(tinies("llama").hooked, probe[0].examples[0], config=short).prompt_tokens[None]


@torch.no_grad()
def documented(plain, ids, start, rule="dps"):
    """Full and steered log-probabilities after `ids`, by definition: two whole passes of a plain model."""
    full = plain(ids).logits[:, -1].log_softmax(-1)
    with ExitStack() as stack:
        for head in HEADS:
            stack.enter_context(columns_replaced(plain, *head, 8, slice(start - 1, None), 0.0))
        masked = plain(ids).logits[:, -1].log_softmax(-1)
    gamma = GAMMA if rule == "dps" else torch.special.entr(full.exp()).sum(-1, keepdim=True)
    return full, full + gamma * (full - masked)


def distributions(model, ids, steering, others=(), **options):
    """What the `generate` of transformers writes, and the log-probabilities that it writes each token from."""
    out = model.original_model.generate(
        ids,
        logits_processor=LogitsProcessorList([*others, steering]),
        max_new_tokens=NEW,
        return_dict_in_generate=True,
        output_scores=True,
        **{"do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids), **options},
    )
    return out.sequences, [one.log_softmax(-1) for one in out.scores]


RULED_OUT = {
    "no_repeat_ngram_size": (3, lambda n: NoRepeatNGramLogitsProcessor(3)),
    "suppress_tokens": ([7, 8, 20], lambda n: SuppressTokensLogitsProcessor([7, 8, 20])),
    "bad_words_ids": ([[9], [11]], lambda n: NoBadWordsLogitsProcessor([[9], [11]])),
    "min_new_tokens": (3, lambda n: MinNewTokensLengthLogitsProcessor(n, 3, torch.tensor([3]))),
}


@pytest.mark.parametrize("rule", ["dps", "dps-entropy"])
@pytest.mark.parametrize("setting", RULED_OUT)
def test_tokens_that_others_rule_out_stay_out_of_the_documented_distribution(llama, ids, setting, rule):
    value, made = RULED_OUT[setting]
    options = {setting: value} | ({"eos_token_id": 3} if setting == "min_new_tokens" else {})
    steering = dps.logits_processor(llama.hooked, HEADS, GAMMA, rule=rule)
    written, found = distributions(llama.hooked, ids, steering, **options)
    other, start = made(ids.shape[1]), ids.shape[1]
    for step, scores in enumerate(found):
        seen = written[:, : start + step]
        full, steered = documented(llama.plain, seen, start, rule)
        out = other(seen, full.clone()).isneginf()
        expected = steered.masked_fill(out, -torch.inf).log_softmax(-1)
        assert torch.equal(scores.isneginf(), out)
        assert torch.allclose(scores, expected, atol=1e-4)


def test_forced_tokens_are_written(llama, ids):
    steering = dps.logits_processor(llama.hooked, HEADS, GAMMA)
    written, _ = distributions(llama.hooked, ids, steering, forced_eos_token_id=50)
    assert int(written[0, -1]) == 50
    plain, _ = distributions(llama.hooked, ids, dps.logits_processor(llama.hooked, HEADS, GAMMA))
    assert torch.equal(written[:, :-1], plain[:, :-1])


WARPED = {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_p": 0.05, "typical_p": 0.9, "epsilon_cutoff": 1e-3}


@pytest.mark.parametrize("setting", WARPED)
def test_warpers_work_on_the_steered_scores(llama, ids, setting):
    start, options = ids.shape[1], {"do_sample": True, "top_k": 0, setting: WARPED[setting]}
    torch.manual_seed(3)
    steering = dps.logits_processor(llama.hooked, HEADS, GAMMA)
    written, found = distributions(llama.hooked, ids, steering, **options)
    for step, scores in enumerate(found):
        expected = documented(llama.plain, written[:, : start + step], start)[1].log_softmax(-1)
        if setting == "temperature":
            expected = TemperatureLogitsWarper(0.7)(None, expected)
        elif setting == "top_k":
            expected = TopKLogitsWarper(9)(None, expected)
        else:
            assert bool(scores.isneginf().any())
            expected = expected.masked_fill(scores.isneginf(), -torch.inf)
        assert torch.allclose(scores, expected.log_softmax(-1), atol=1e-4)


REFUSED = {
    "repetition_penalty": 1.3,
    "guidance_scale": 1.5,
    "sequence_bias": [[[7], 2.0]],
    "exponential_decay_length_penalty": (1, 1.5),
}


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("setting", REFUSED)
def test_changed_scores_are_refused(llama, ids, setting, beams):
    if setting == "guidance_scale" and beams > 1:
        pytest.skip("transformers keeps one cache for the negative prompt, which beams do not fit")
    steering = dps.logits_processor(llama.hooked, HEADS, GAMMA)
    options = {setting: REFUSED[setting], "eos_token_id": 3, "num_beams": beams, "min_new_tokens": 4}
    with pytest.raises(SteeringError, match="changed the scores of tokens that it did not rule out .*repetition"):
        distributions(llama.hooked, ids, steering, **options)
    expected = distributions(llama.hooked, ids, dps.logits_processor(llama.hooked, HEADS, GAMMA))
    assert torch.equal(distributions(llama.hooked, ids, steering)[0], expected[0]), "the next prompt is served"


def test_a_penalty_behind_the_processor_works_on_the_steered_scores(llama, ids):
    model, penalty, start = llama.hooked, RepetitionPenaltyLogitsProcessor(1.3), ids.shape[1]
    steering = dps.logits_processor(model, HEADS, GAMMA)
    with pytest.raises(SteeringError, match="put its LogitsProcessor behind this one"):
        distributions(model, ids, steering, others=[penalty])
    out = model.original_model.generate(
        ids,
        logits_processor=LogitsProcessorList([dps.logits_processor(model, HEADS, GAMMA), penalty]),
        max_new_tokens=3,
        return_dict_in_generate=True,
        output_scores=True,
        do_sample=False,
    )
    for step, scores in enumerate(out.scores):
        seen = out.sequences[:, : start + step]
        expected = penalty(seen, documented(llama.plain, seen, start)[1].log_softmax(-1))
        assert torch.allclose(scores, expected, atol=1e-4)


def test_tokens_that_generate_takes_for_padding_are_named(llama, ids):
    """Where the padding token is no end token, transformers hides it also inside a prompt."""
    assert bool((ids == 3).any())
    steering = dps.logits_processor(llama.hooked, HEADS, GAMMA)
    with pytest.raises(SteeringError, match="another attention_mask than the processor has"):
        distributions(llama.hooked, ids, steering, attention_mask=None)
    _, found = distributions(llama.hooked, ids, steering)
    expected = documented(llama.plain, ids, ids.shape[1])[1].log_softmax(-1)
    assert torch.allclose(found[0], expected, atol=1e-4)
    mask = torch.ones_like(ids)
    mask[:, 2] = 0
    with pytest.raises(SteeringError, match="another attention_mask"):
        distributions(llama.hooked, ids, dps.logits_processor(llama.hooked, HEADS, GAMMA), attention_mask=mask)


def test_two_processors_do_not_steer_twice(llama, ids):
    steering = [dps.logits_processor(llama.hooked, HEADS, gamma) for gamma in (GAMMA, 0.5)]
    with pytest.raises(SteeringError, match="a processor before this one"):
        distributions(llama.hooked, ids, steering[1], others=steering[:1])


def test_nan_is_named(tiny_folders, ids):
    model = dps.load_model(str(tiny_folders["llama"]))
    with torch.no_grad():
        steering = dps.logits_processor(model, HEADS, GAMMA)
        next(p for name, p in model.original_model.named_parameters() if "o_proj" in name).view(-1)[0] = torch.nan
    with pytest.raises(SteeringError, match=f"after {ids.shape[1]} tokens are NaN or infinite"):
        distributions(model, ids, steering)


def test_a_processor_leaves_nothing_on_the_model(llama, ids):
    hf_model = llama.hooked.original_model
    gc.collect()
    before = len(hf_model._forward_hooks)
    steering = dps.logits_processor(llama.hooked, HEADS, GAMMA)
    distributions(llama.hooked, ids, steering)
    assert len(hf_model._forward_hooks) == before + 1
    del steering
    gc.collect()
    assert len(hf_model._forward_hooks) == before
    assert no_hooks_left(llama.hooked)
