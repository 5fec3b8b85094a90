"""Ablations as context managers: what they do, and that they leave nothing behind."""

import pytest
import torch
from conftest import no_hooks_left
from oracles import attention_modules, columns_replaced

import dps_lens as dps
from dps_lens.data import build_prompt
from dps_lens.errors import HeadError, InterventionError
from dps_lens.heads import HeadSet
from dps_lens.intervene import record_z
from dps_lens.model import native_attention

TOKENS = torch.arange(5, 25)[None].repeat(3, 1)


@torch.no_grad()
def test_rows_carry_their_own_heads(tiny):
    sets = [HeadSet(), HeadSet.parse("L0H1,L2H3"), HeadSet.parse("L1H0")]
    with dps.ablate(tiny.hooked, sets, positions="all"):
        got = tiny.hooked(TOKENS)
    for row, head_set in enumerate(sets):
        from contextlib import ExitStack

        with ExitStack() as stack:
            for layer, head in head_set:
                stack.enter_context(columns_replaced(tiny.plain, layer, head, tiny.hooked.cfg.d_head, slice(None), 0.0))
            expected = tiny.plain(input_ids=TOKENS[row : row + 1]).logits[0]
        assert torch.allclose(got[row], expected, atol=1e-4)
    assert no_hooks_left(tiny.hooked)


@torch.no_grad()
def test_nothing_is_left_after_an_exception(tiny):
    before = tiny.hooked(TOKENS)
    with (
        pytest.raises(RuntimeError, match="stop"),
        native_attention(tiny.hooked),
        dps.ablate(tiny.hooked, HeadSet.parse("L1H1"), positions="all"),
    ):
        raise RuntimeError("stop")
    assert no_hooks_left(tiny.hooked)
    assert torch.equal(tiny.hooked(TOKENS), before)
    assert all("forward" not in vars(block.attn) for block in tiny.hooked.blocks)


@torch.no_grad()
def test_contexts_nest_and_keep_hooks_of_others(llama):
    seen = []
    handle_name = "blocks.1.attn.hook_z"
    with llama.hooked.hooks(fwd_hooks=[(handle_name, lambda z, hook: seen.append(z.shape))]):
        with dps.ablate(llama.hooked, HeadSet.parse("L0H1"), positions="all"):
            with dps.ablate(llama.hooked, HeadSet.parse("L1H2"), positions="all"):
                both = llama.hooked(TOKENS)
            outer = llama.hooked(TOKENS)
        llama.hooked(TOKENS)
    with dps.ablate(llama.hooked, HeadSet.parse("L0H1,L1H2"), positions="all"):
        assert torch.allclose(both, llama.hooked(TOKENS), atol=1e-5)
    with dps.ablate(llama.hooked, HeadSet.parse("L0H1"), positions="all"):
        assert torch.allclose(outer, llama.hooked(TOKENS), atol=1e-5)
    assert len(seen) == 3
    assert no_hooks_left(llama.hooked)


@torch.no_grad()
def test_native_attention_is_really_native(tiny, monkeypatch):
    """Equal logits would prove nothing: count the calls of the kernel, and of hook_z under it."""
    calls, fired = [], []
    real_kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or real_kernel(*a, **k)
    )
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(3)]
    hooked = tiny.hooked(TOKENS)
    assert not calls
    with (
        native_attention(tiny.hooked),
        tiny.hooked.hooks(fwd_hooks=[(n, lambda z, hook: fired.append(z.shape)) for n in names]),
    ):
        native = tiny.hooked(TOKENS)
    capped = getattr(tiny.plain.config, "attn_logit_softcapping", None) is not None
    assert len(calls) == (0 if capped else 3), "sdpa would drop the cap on attention logits"
    assert fired == [(3, 20, 4, 8)] * 3
    assert torch.allclose(native, hooked, atol=1e-4)
    tiny.hooked(TOKENS)
    assert len(calls) == (0 if capped else 3)


@torch.no_grad()
def test_response_positions_follow_decoding(llama, probe, short):
    """A whole pass and cached steps after the prompt are edited at the same positions."""
    prompt = build_prompt(llama.hooked, probe[0].examples[0], config=short)
    heads = HeadSet.parse("L0H1,L1H3")
    start, stop = prompt.spans["response"]
    with dps.ablate(llama.hooked, heads, prompt=prompt):
        whole = llama.hooked(prompt.tokens[None])[0, start - 1 :]
        logits, cache = llama.hooked(prompt.tokens[None, :start], return_type="logits_and_cache", use_cache=True)
        steps = [logits[0, -1]]
        for token in prompt.tokens[start:stop]:
            logits, cache = llama.hooked(token[None, None], return_type="logits_and_cache", past_key_values=cache)
            steps.append(logits[0, -1])
    assert torch.allclose(torch.stack(steps), whole, atol=1e-4)
    plain = llama.plain(input_ids=prompt.tokens[None]).logits[0, start - 1 :]
    assert not torch.allclose(plain, whole, atol=1e-3)


@torch.no_grad()
def test_uniform_spreads_attention_evenly_and_skips_padding(llama):
    mask = torch.ones_like(TOKENS)
    mask[1, :4] = 0
    patterns = {}
    hook = ("blocks.1.attn.hook_pattern", lambda pattern, hook: patterns.update(p=pattern.clone()))
    with (
        dps.ablate(llama.hooked, HeadSet.parse("L1H2"), ablation="uniform", positions="all"),
        llama.hooked.hooks(fwd_hooks=[hook]),
    ):
        llama.hooked(TOKENS, attention_mask=mask)
    assert torch.allclose(patterns["p"][0, 2, 9, :10], torch.full((10,), 0.1))
    assert torch.allclose(patterns["p"][1, 2, 9, 4:10], torch.full((6,), 1 / 6))
    assert not torch.allclose(patterns["p"][0, 1, 9, :10], torch.full((10,), 0.1))


def test_uniform_refuses_native_attention(llama):
    with (
        native_attention(llama.hooked),
        pytest.raises(InterventionError, match="attention scores"),
        dps.ablate(llama.hooked, HeadSet.parse("L1H2"), ablation="uniform", positions="all"),
    ):
        pass


@torch.no_grad()
def test_mean_and_patch_take_values(llama, probe, short):
    model = llama.hooked
    prompt = build_prompt(model, probe[0].examples[0], config=short)
    z = record_z(model, prompt)
    start, stop = prompt.spans["response"]
    assert z.shape == (3, stop - start + 1, 4, 8)
    found = {}
    hook = ("blocks.1.attn.hook_z", lambda z, hook: found.update(z=z.clone()))
    with (
        dps.ablate(model, HeadSet.parse("L1H2"), ablation=dps.Mean(z=z.mean(1)), prompt=prompt),
        model.hooks(fwd_hooks=[hook]),
    ):
        model(prompt.tokens[None])
    assert torch.allclose(found["z"][0, start - 1 :, 2], z[1, :, 2].mean(0).expand(stop - start + 1, -1), atol=1e-5)
    clean = model(prompt.tokens[None])
    with dps.ablate(model, HeadSet.parse("L1H2"), ablation=dps.Patch(z=z), prompt=prompt):
        assert torch.allclose(model(prompt.tokens[None]), clean, atol=1e-4)


def test_bad_requests_are_named(llama, probe, short, unchecked):
    model = llama.hooked
    prompt = build_prompt(model, probe[0].examples[0], config=short)
    heads = HeadSet.parse("L1H2")
    for options, message in (
        ({}, "positions='all'"),
        ({"positions": "everywhere"}, "unknown"),
        ({"positions": "all", "ablation": "noise"}, "unknown"),
        ({"positions": "all", "ablation": "mean"}, "needs the means"),
    ):
        with pytest.raises(InterventionError, match=message), dps.ablate(model, heads, **options):
            pass
    with (
        pytest.raises(HeadError, match="layers are 0 to 2, heads 0 to 3"),
        dps.ablate(model, HeadSet.parse("L3H0"), positions="all"),
    ):
        pass
    with dps.ablate(model, [heads] * 2, positions="all"), pytest.raises(InterventionError, match="2 rows of heads"):
        model(TOKENS)
    with dps.ablate(model, heads, prompt=prompt), pytest.raises(InterventionError, match="neither the whole prompt"):
        model(TOKENS[:, :6])
    assert no_hooks_left(model)


def test_attention_modules_of_the_oracle_are_the_models(tiny):
    assert len(attention_modules(tiny.plain)) == tiny.hooked.cfg.n_layers
