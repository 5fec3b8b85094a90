"""DPS against naive decoding: two whole passes a step on a plain model, no cache, no hooks."""

from contextlib import ExitStack

import pytest
import torch
from conftest import no_hooks_left
from flat import generate
from oracles import columns_replaced, two_pass_greedy, uniform_z

import dps_lens as dps
from dps_lens.data import build_prompt
from dps_lens.errors import HeadError, InterventionError, PromptError, SteeringError
from dps_lens.heads import HeadSet
from dps_lens.model.check import _plain_model
from dps_lens.steering.sampling import Sampling

SETS = [HeadSet.parse("L0H1,L2H3"), HeadSet.parse("L1H0"), HeadSet.parse("L0H2,L1H1,L2H0")]
GAP = 1e-4  # below this gap between the two best logits, rounding may decide; none may occur here


def reference(plain, prompt, head_set, gamma, steps, ends, *, d_head, positions="response"):
    """Greedy DPS of one prompt by definition."""
    start = prompt.spans["response"][0]
    edited = {"response": slice(start - 1, None), "all": slice(None), "profile": slice(*prompt.spans["profile"])}[
        positions
    ]

    @torch.no_grad()
    def full(tokens):
        return plain(input_ids=tokens[None]).logits[0, -1]

    def masked(tokens):
        with ExitStack() as stack:
            for layer, head in head_set:
                stack.enter_context(columns_replaced(plain, layer, head, d_head, edited, 0.0))
            return full(tokens)

    tokens, gap = two_pass_greedy(full, masked, prompt.prompt_tokens, gamma, steps, ends)
    assert gap > GAP, "the reference itself is undecided here; use another prompt"
    return tokens


@pytest.fixture(scope="module")
def prompts_of(probe):
    def build(model):
        configs = [dps.PromptConfig(items=n, profile_tokens=p, task_tokens=20) for n, p in ((3, 60), (2, 30), (5, 120))]
        return [
            build_prompt(model, user.examples[0], config=c)
            for user, c in zip((probe[0], probe[5], probe[10]), configs, strict=True)
        ]

    return build


@pytest.mark.parametrize("positions", ["response", "all", "profile"])
def test_mixed_batches_equal_naive_decoding(tiny, prompts_of, positions):
    prompts, gammas = prompts_of(tiny.hooked), [0.5, 0.0, 2.0]
    assert len({len(prompt.prompt_tokens) for prompt in prompts}) == 3
    out = generate(tiny.hooked, prompts, heads=SETS, gamma=gammas, positions=positions, max_new_tokens=8)
    for prompt, head_set, gamma, tokens in zip(prompts, SETS, gammas, out.tokens, strict=True):
        expected = reference(
            tiny.plain, prompt, head_set, gamma, 8, {3}, d_head=tiny.hooked.cfg.d_head, positions=positions
        )
        assert tokens.tolist() == expected
    assert no_hooks_left(tiny.hooked)


def test_steering_changes_tokens(tiny, prompts_of):
    prompts = prompts_of(tiny.hooked)
    plain, steered = (generate(tiny.hooked, prompts, heads=SETS, gamma=gamma, max_new_tokens=8) for gamma in (0.0, 2.0))
    assert any(a.tolist() != b.tolist() for a, b in zip(plain.tokens, steered.tokens, strict=True))
    assert all(not bool(shift.any()) for shift in plain.shifts)


@pytest.mark.real
@pytest.mark.full
def test_embedded_model_equals_naive_decoding(real, probe):
    config = dps.PromptConfig(items=3, profile_tokens=90, task_tokens=60)
    other = dps.PromptConfig(items=2, profile_tokens=50, task_tokens=40)
    prompts = [
        build_prompt(real, user.examples[0], config=c)
        for user, c in ((probe[0], config), (probe[6], other), (probe[9], config))
    ]
    sets = [HeadSet.parse("L14H3,L14H1,L20H5,L17H2"), HeadSet.parse("L8H0,L16H0"), HeadSet.parse("L19H7,L9H0,L20H5")]
    plain, ends = _plain_model(real), {real.tokenizer.eos_token_id}
    expected = {}
    for gamma in (0.0, 0.5, 2.0):
        expected[gamma] = [
            reference(plain, prompt, head_set, gamma, 6, ends, d_head=64)
            for prompt, head_set in zip(prompts, sets, strict=True)
        ]
        batch = generate(real, prompts, heads=sets, gamma=gamma, max_new_tokens=6)
        assert [tokens.tolist() for tokens in batch.tokens] == expected[gamma]
    alone = generate(real, prompts[1], heads=sets[1], gamma=2.0, max_new_tokens=6)
    assert alone.tokens[0].tolist() == expected[2.0][1]
    mixed = generate(real, prompts, heads=sets, gamma=[2.0, 0.0, 0.5], max_new_tokens=6)
    assert [tokens.tolist() for tokens in mixed.tokens] == [expected[2.0][0], expected[0.0][1], expected[0.5][2]]
    greedy = plain.generate(prompts[0].prompt_tokens[None], max_new_tokens=6, do_sample=False)[
        0, len(prompts[0].prompt_tokens) :
    ]
    assert expected[0.0][0] == greedy.tolist()


def test_gamma_minus_one_is_the_masked_model(llama, prompts_of):
    prompt = prompts_of(llama.hooked)[0]
    out = generate(
        llama.hooked,
        prompt,
        heads=SETS[0],
        gamma=-1.0,
        max_new_tokens=6,
        stop_at_eos=False,
    )
    with dps.ablate(llama.hooked, SETS[0], prompt=prompt), torch.no_grad():
        tokens = prompt.prompt_tokens
        for expected in out.tokens[0]:
            token = llama.hooked(tokens[None])[0, -1].argmax()
            assert int(token) == int(expected)
            tokens = torch.cat([tokens, token[None]])


def test_uniform_masking_equals_plain_hugging_face(llama, prompts_of):
    prompt = prompts_of(llama.hooked)[0]
    start = prompt.spans["response"][0]
    out = generate(
        llama.hooked,
        prompt,
        heads=HeadSet.parse("L1H2"),
        gamma=1.0,
        max_new_tokens=5,
        ablation="uniform",
        stop_at_eos=False,
    )
    new, handle = uniform_z(llama.plain, 1, 2, 8, 4)

    @torch.no_grad()
    def full(tokens):
        return llama.plain(input_ids=tokens[None]).logits[0, -1]

    def masked(tokens):
        with columns_replaced(llama.plain, 1, 2, 8, slice(start - 1, None), new):
            return full(tokens)

    expected, gap = two_pass_greedy(full, masked, prompt.prompt_tokens, 1.0, 5, set())
    handle.remove()
    assert gap > GAP
    assert out.tokens[0].tolist() == expected


def test_rows_stop_at_their_own_end(llama, prompts_of):
    prompts = prompts_of(llama.hooked)
    free = generate(llama.hooked, prompts, heads=SETS, max_new_tokens=12, stop_at_eos=False)
    assert [len(tokens) for tokens in free.tokens] == [12] * 3
    llama.hooked.original_model.generation_config.eos_token_id = [3, int(free.tokens[1][4])]
    try:
        out = generate(llama.hooked, prompts, heads=SETS, max_new_tokens=12)
    finally:
        llama.hooked.original_model.generation_config.eos_token_id = 3
    for ended, whole in zip(out.tokens, free.tokens, strict=True):
        assert ended.tolist() == whole[: len(ended)].tolist()
    assert len(out.tokens[1]) <= 5
    assert [len(values) for values in out.logprobs] == [len(tokens) for tokens in out.tokens]


def test_sampling_does_not_depend_on_the_batch(llama, prompts_of):
    prompts = prompts_of(llama.hooked)
    options = {
        "gamma": 0.7,
        "max_new_tokens": 10,
        "stop_at_eos": False,
    }

    def sampling(*seeds: int) -> list[dps.Sampling]:
        return [dps.Sampling(temperature=0.8, top_p=0.9, top_k=40, seed=seed) for seed in seeds]

    batch = generate(llama.hooked, prompts, heads=SETS, sampling=sampling(5, 6, 7), **options)
    for row in range(3):
        alone = generate(llama.hooked, prompts[row], heads=SETS[row], sampling=sampling(5 + row), **options)
        assert alone.tokens[0].tolist() == batch.tokens[row].tolist()
    other = generate(llama.hooked, prompts, heads=SETS, sampling=sampling(8, 9, 10), **options)
    assert other.tokens[0].tolist() != batch.tokens[0].tolist()


def test_sampler_draws_from_its_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 1.0]])
    plain = Sampling()
    assert torch.allclose(plain.probabilities(logits), logits.double().softmax(-1))
    kept = Sampling(top_k=3).probabilities(logits)[0]
    assert (kept > 0).tolist() == [True, True, False, False, True]
    nucleus = Sampling(top_p=0.6).probabilities(logits)[0]
    assert (nucleus > 0).tolist() == [True, True, False, False, False]
    assert float(Sampling(top_p=0.01).probabilities(logits)[0, 0]) == 1.0
    cold = Sampling(temperature=0.5).probabilities(logits)
    assert torch.allclose(cold, (2 * logits.double()).softmax(-1))
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([plain.draw(logits, [generator]) for _ in range(4000)])
    counts = torch.bincount(draws, minlength=5).double() / 4000
    assert float((counts - logits.double().softmax(-1)[0]).abs().max()) < 0.03


def test_delta_logits_are_gamma_times_the_difference(llama, prompts_of):
    prompts = prompts_of(llama.hooked)[:2]
    out = generate(
        llama.hooked,
        prompts,
        heads=SETS[:2],
        gamma=[1.5, 0.0],
        max_new_tokens=3,
        keep_delta_logits=True,
        stop_at_eos=False,
    )
    assert out.delta_logits[0].shape == (3, llama.hooked.cfg.d_vocab)
    assert not out.delta_logits[1].any()
    with torch.no_grad():
        full = llama.hooked(prompts[0].prompt_tokens[None])[0, -1]
        with dps.ablate(llama.hooked, SETS[0], prompt=prompts[0]):
            masked = llama.hooked(prompts[0].prompt_tokens[None])[0, -1]
    assert torch.allclose(out.delta_logits[0][0], 1.5 * (full - masked), atol=1e-3)
    steered = (full + 1.5 * (full - masked)).log_softmax(-1)
    token = int(out.tokens[0][0])
    assert float(out.logprobs[0][0]) == pytest.approx(float(steered[token]), abs=1e-3)
    assert float(out.shifts[0][0]) == pytest.approx(float(steered[token] - full.log_softmax(-1)[token]), abs=1e-3)
    with pytest.raises(SteeringError, match="keep_delta_logits"):
        _ = generate(llama.hooked, prompts, heads=SETS[:2], max_new_tokens=1).delta_logits
    assert list(out.to_frame()["tokens"]) == [3, 3]


def test_plain_texts_are_prompts(llama):
    out = generate(llama.hooked, ["the loaf", "a bird on the roof"], heads=SETS[0], gamma=1.0, max_new_tokens=4)
    assert len(out.texts) == 2


def test_bad_requests_are_named(llama, prompts_of, unchecked):
    prompts = prompts_of(llama.hooked)
    for options, message in (
        ({"heads": SETS[:2]}, "3 prompts and 2 head sets"),
        ({"heads": SETS, "gamma": [1.0]}, "1 values of gamma"),
        ({"heads": SETS, "gamma": -1.5}, "not a number from -1"),
        ({"heads": SETS, "gamma": [1.0, float("nan"), 0.0]}, "gamma nan"),
        ({"heads": SETS, "rule": "dps+cad", "alpha": float("inf"), "negative_prompts": prompts}, "alpha inf"),
        ({"heads": SETS, "rule": "cat"}, "rule 'cat' is unknown"),
        ({"heads": SETS, "do_sample": True, "temperature": 0.0}, "temperature 0.0 is not a number above 0"),
        ({"heads": SETS, "do_sample": True, "top_p": 1.2}, "top_p"),
        ({"heads": SETS, "do_sample": True, "top_k": 0}, "top_k"),
        ({"heads": SETS, "max_new_tokens": 0}, "max_new_tokens 0 is not a whole number from 1 up"),
    ):
        with pytest.raises(SteeringError, match=message):
            generate(llama.hooked, prompts, **options)
    with pytest.raises(InterventionError, match="needs the means"):
        generate(llama.hooked, prompts, heads=SETS, ablation="mean")
    with pytest.raises(HeadError, match="L9H9"):
        generate(llama.hooked, prompts[0], heads=HeadSet.parse("L9H9"), gamma=0.0)
    with pytest.raises(SteeringError, match="show a profile"):
        generate(llama.hooked, "a text alone", heads=SETS[0], positions="profile")
    with pytest.raises(PromptError, match="do not fit the context"):
        generate(llama.hooked, prompts, heads=SETS, max_new_tokens=2000)
