"""Settings and logits that are no numbers."""

import math

import pytest
import torch
from flat import generate
from pcs import score_pcs

import dps_lens as dps
from dps_lens.data import build_prompt
from dps_lens.errors import DPSLensError, ScoreError, SteeringError
from dps_lens.heads import HeadSet

HEADS = HeadSet.parse("L1H2")
NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def prompts(tinies, probe, short):
    return [build_prompt(tinies("llama").hooked, user.examples[0], config=short) for user in probe[:2]]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("gamma", [NAN, INF, -1.5, "1", True, None, [1.0, NAN]]),
        ("max_new_tokens", [0, -1, 2.0, True, "3", NAN]),
        ("max_gamma", [NAN, INF, 0, -1.0, True, "2"]),
        ("max_kl", [NAN, INF, 0.0, True, "2"]),
        ("min_p", [NAN, 0, 1.1, True, "0.1"]),
        ("keep_alternatives", [-1, 1.0, True, 10**6, NAN]),
        ("stop_at_eos", ["no", 0, None]),
        ("keep_delta_logits", [1, "yes"]),
        ("sampling", ["greedy", 0.7, [None, 1]]),
        ("temperature", [NAN, INF, 0, -1.0, True, "1"]),
        ("top_k", [0, 1.5, True, "5"]),
        ("top_p", [NAN, 0.0, 1.01, True, "0.9"]),
        ("seed", [2**32, -1, 1.0, True, "7", None]),
    ],
)
def test_settings_that_are_no_numbers_are_refused_where_they_enter(llama, prompts, unchecked, name, values):
    for value in values:
        options = {"do_sample": True} if name in ("temperature", "top_k", "top_p", "seed") else {}
        with pytest.raises(SteeringError, match=name):
            generate(llama.hooked, prompts, heads=HEADS, **{"max_new_tokens": 2, **options, name: value})


def test_alpha_is_a_number(llama, prompts, unchecked):
    for value in (NAN, INF, -0.1, "1", True):
        with pytest.raises(SteeringError, match="alpha"):
            generate(llama.hooked, prompts, rule="cad", negative_prompts=prompts[::-1], alpha=value, max_new_tokens=2)


def test_numbers_at_the_edge_are_taken(llama, prompts):
    options = {"heads": HEADS, "gamma": 1.0, "max_new_tokens": 4, "stop_at_eos": False}
    greedy = generate(llama.hooked, prompts, **options)
    cold = generate(llama.hooked, prompts, do_sample=True, temperature=5e-324, **options)
    assert [row.tolist() for row in cold.tokens] == [row.tolist() for row in greedy.tokens]
    for seed in (2**32 - 1, 0):
        assert len(generate(llama.hooked, prompts, do_sample=True, seed=seed, **options).tokens[0]) == 4
    most = llama.hooked.cfg.d_vocab // 2
    out = generate(llama.hooked, prompts[0], keep_alternatives=most, **{**options, "max_new_tokens": 1})
    assert len(out.alternatives[0][0]) == 2 * most


def test_an_overflow_names_the_prompt_and_the_step(llama, prompts):
    options = {"heads": HEADS, "max_new_tokens": 4}
    for sampling in ({}, {"do_sample": True, "top_p": 0.9}):
        with pytest.raises(SteeringError, match=r"prompt 1 at step \d are NaN or infinite"):
            generate(llama.hooked, prompts, gamma=[1.0, 3e38], **options, **sampling)
    with pytest.raises(SteeringError, match="rule 'amplify' with gamma 3e\\+38 leaves nothing"):
        generate(llama.hooked, prompts, gamma=3e38, rule="amplify", **options)
    stream = generate(llama.hooked, prompts[0], gamma=3e38, stream=True, **options)
    with pytest.raises(SteeringError, match=r"prompt 0 at step \d"):
        for _ in stream:
            pass
    with pytest.raises(SteeringError, match="has not ended"):
        _ = stream.generation


def test_an_overflow_in_a_later_step_is_found(llama, prompts):
    model, steps = llama.hooked, []

    def late(residual, hook):
        steps.append(residual.shape[1])
        if steps.count(1) == 3:
            return residual * 1e30 * 1e30
        return residual

    with (
        model.hooks(fwd_hooks=[("blocks.2.hook_resid_post", late)]),
        pytest.raises(SteeringError, match="prompt 0 at step 2 are NaN or infinite"),
    ):
        generate(model, prompts[0], heads=HEADS, max_new_tokens=6, stop_at_eos=False)


@pytest.fixture(scope="module")
def broken(tiny_folders):
    """A model with one weight that is NaN, and one whose logits overflow the range of float16."""
    nan, big = (dps.load_model(str(tiny_folders["llama"])) for _ in range(2))
    with torch.no_grad():
        next(p for name, p in nan.original_model.named_parameters() if "o_proj" in name).view(-1)[0] = NAN
        big.original_model.half()
        big.original_model.get_output_embeddings().original_component.weight.mul_(1e6).clamp_(-6e4, 6e4)
    return nan, big


def test_weights_that_are_nan_and_logits_beyond_float16(broken, prompts, probe, short):
    for model in broken:
        for options in ({}, {"gamma": 0.0}, {"gamma": -1.0}, {"rule": "amplify"}, {"rule": "dola"}, {"min_p": 0.1}):
            with pytest.raises(SteeringError, match="prompt 0 at step 0 are NaN or infinite"):
                generate(model, prompts[0], heads=HEADS, max_new_tokens=3, **options)
        users = probe[:2]
        with pytest.raises(DPSLensError, match="NaN|infinite|nan"):
            dps.evaluate(model, users, {"plain": "plain"}, max_new_tokens=3, prompt_config=short)
        with pytest.raises(ScoreError, match="NLL is nan|NLL is inf"):
            score_pcs(model, users, prompt_config=short, max_examples=1)


def test_scores_of_heads_that_overflow_are_no_scores(llama, probe, short):
    cfg = llama.hooked.cfg
    far = dps.Mean(z=torch.full((cfg.n_layers, cfg.n_heads, cfg.d_head), NAN))
    for method in ("exact", "attribution"):
        with pytest.raises(ScoreError, match="NaN or infinite"):
            score_pcs(
                llama.hooked, probe[:1], ablation=far, method=method, prompt_config=short, max_examples=1, against=None
            )
