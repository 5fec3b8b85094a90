"""Steps without idle hook points: the same logits, hooks that are there fire, nothing is left behind."""

from contextlib import contextmanager

import pytest
import torch
from conftest import no_hooks_left
from oracles import columns_replaced

from dps_lens.heads import HeadSet
from dps_lens.intervene import ablate
from dps_lens.model import native_attention
from dps_lens.model.fast.bypass import BypassedHooks, reused_logits
from dps_lens.model.runners import runner_of

TOKENS = torch.arange(5, 17)[None]


def components(model):
    """The component or module at every place of the Hugging Face model."""
    found = {}

    def walk(parent, name):
        for key, child in parent._modules.items():
            found[f"{name}.{key}"] = child
            if child is not None:
                walk(child, f"{name}.{key}")

    walk(model.original_model, "")
    return found


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_steps_equal_the_plain_model(tiny, rows):
    runner = runner_of(tiny.hooked)
    tokens = TOKENS.expand(rows, -1) + torch.arange(rows)[:, None]
    tiny.hooked(TOKENS)  # a first pass hangs the bridge's own hooks on its norms
    before = components(tiny.hooked)
    with torch.inference_mode(), native_attention(tiny.hooked), BypassedHooks(tiny.hooked):
        assert not any("_original_component" in m._modules for m in components(tiny.hooked).values() if m is not None)
        cache = runner.start_decoding(runner.prefill(tokens[:, :-2]), torch.arange(rows))
        mask = torch.ones_like(tokens)
        steps = [runner.step(tokens[:, [at]], cache, mask[:, : at + 1 or None]) for at in (-2, -1)]
    expected = tiny.plain(input_ids=tokens).logits[:, -2:]
    assert torch.stack(steps, dim=1) == pytest.approx(expected.detach(), abs=1e-4)
    after = components(tiny.hooked)
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert not any("forward" in vars(module) for module in after.values() if isinstance(module, torch.nn.Linear))
    assert no_hooks_left(tiny.hooked)


def test_a_hook_keeps_its_component(tiny):
    """The ablation is entered first, as in decoding; only its own projection stays hooked."""
    runner, d_head = runner_of(tiny.hooked), tiny.hooked.cfg.d_head
    tiny.hooked(TOKENS)
    hooked = ablate(tiny.hooked, HeadSet.parse("L1H2"), positions="all")
    with torch.inference_mode(), native_attention(tiny.hooked), hooked, BypassedHooks(tiny.hooked):
        left = [n for n, m in components(tiny.hooked).items() if m is not None and "_original_component" in m._modules]
        cache = runner.start_decoding(runner.prefill(TOKENS[:, :-1]), torch.zeros(1, dtype=torch.long))
        step = runner.step(TOKENS[:, -1:], cache, torch.ones_like(TOKENS))
    assert len(left) == 1
    assert left[0].endswith(("o_proj", "c_proj", "dense"))
    with columns_replaced(tiny.plain, 1, 2, d_head, slice(None), 0.0):
        expected = tiny.plain(input_ids=TOKENS).logits[:, -1]
    assert step == pytest.approx(expected.detach(), abs=1e-4)


def test_torch_hooks_of_others_fire(llama):
    calls = []
    handle = llama.hooked.blocks[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    try:
        with torch.inference_mode(), BypassedHooks(llama.hooked):
            llama.hooked.original_model(TOKENS)
    finally:
        handle.remove()
    assert calls == [1]


def test_long_texts_outgrow_the_room_of_the_cache(llama):
    """Rows leave on the way, too."""
    runner, tokens = (
        runner_of(llama.hooked),
        torch.randint(5, 500, (3, 160), generator=torch.Generator().manual_seed(0)),
    )
    with torch.inference_mode(), native_attention(llama.hooked):
        cache = runner.start_decoding(runner.prefill(tokens[:1, :4]), torch.zeros(3, dtype=torch.long))
        buffer = cache.layers[0].keys.data_ptr()
        rows, mask = torch.arange(3), torch.ones_like(tokens)
        tokens[:, :4] = tokens[0, :4]
        for at in range(4, 160):
            step = runner.step(tokens[rows, at : at + 1], cache, mask[rows, : at + 1])
            if at == 60:
                assert cache.layers[0].keys.data_ptr() == buffer, "nothing was copied so far"
            if at == 100:
                rows = rows[1:]
                runner.select(cache, torch.tensor([1, 2]))
    assert step == pytest.approx(llama.plain(input_ids=tokens[1:]).logits[:, -1].detach(), abs=1e-4)


@pytest.mark.parametrize("name", ["blocks.1.attn.hook_q", "blocks.1.attn.hook_pattern", "blocks.1.mlp.hook_pre"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_hook_that_fires_in_a_pass_fires_in_a_step(tinies, architecture, name):
    """On the hooked attention; GPT-2's q lives outside the modules of Hugging Face."""
    model, calls = tinies(architecture).hooked, []
    with torch.inference_mode(), model.hooks(fwd_hooks=[(name, lambda value, hook: calls.append(1))]):
        model(TOKENS)
        fired = len(calls)
        with BypassedHooks(model):
            model.original_model(TOKENS)
    assert fired == 1
    assert len(calls) == 2


def test_an_error_inside_leaves_the_model_as_it_was(llama):
    before = components(llama.hooked)
    with pytest.raises(RuntimeError, match="stop"), BypassedHooks(llama.hooked):
        raise RuntimeError("stop")
    after = components(llama.hooked)
    assert all(before[name] is after[name] for name in before)
    assert not any("forward" in vars(module) for module in llama.hooked.original_model.modules())


@contextmanager
def products_of(unembed):
    """What an unembedding gave, kept alive, so that no two can lie in one place by chance."""
    products = []
    handle = unembed.register_forward_hook(lambda module, inputs, product: products.append(product))
    try:
        yield products
    finally:
        handle.remove()


def test_logits_written_over_those_before_are_the_same(tiny):
    model, passes = tiny.hooked, [TOKENS[:, :8], TOKENS, TOKENS[:, 3:9]]
    with torch.inference_mode(), reused_logits(model):
        found = [model(tokens, return_type="logits").clone() for tokens in passes]
        with products_of(model.original_model.get_output_embeddings()) as products:
            for _ in range(3):
                model(TOKENS)
    assert len({product.data_ptr() for product in products}) == 1
    for tokens, logits in zip(passes, found, strict=True):
        torch.testing.assert_close(logits, model(tokens, return_type="logits"))
    assert not any("forward" in vars(m) for m in components(model).values() if isinstance(m, torch.nn.Linear))


def test_logits_that_need_gradients_have_memory_of_their_own(tiny):
    with reused_logits(tiny.hooked):
        first = tiny.hooked(TOKENS, return_type="logits")
        kept = first.detach().clone()
        tiny.hooked(TOKENS + 1, return_type="logits").sum().backward()
    torch.testing.assert_close(first.detach(), kept)
