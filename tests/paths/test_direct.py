"""Direct paths against transformer-lens, and against plain Hugging Face models with hooks on their projections."""

import pytest
import torch
from conftest import ARCHITECTURES, no_hooks_left
from direct import SENDERS, Case, add_write, blocks_of, hooked, written_by_hand
from oracles import attention_modules, nll

from dps_lens.heads import Head
from dps_lens.paths.direct import INTO, Glance

TINY = 1e-5


@pytest.fixture(scope="module")
def case(tinies, probe):
    made = {}

    def get(architecture):
        if architecture not in made:
            made[architecture] = Case(tinies(architecture), probe[:2])
        return made[architecture]

    return get


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_write_is_what_the_block_leaves_with_its_mlp_held(case, architecture):
    one = case(architecture)
    written = one.paths.writes(SENDERS, one.z)
    for head, write in zip(SENDERS, written, strict=True):
        expected = written_by_hand(one, head)
        # A sliding window of Gemma's first layer does not reach the profile.
        assert expected.norm() > 1e-2 or (head.layer == 0 and architecture.startswith("gemma"))
        assert torch.allclose(write, expected, atol=TINY), head
    assert no_hooks_left(one.tiny.hooked)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_glance_shows_what_the_whole_run_shows(case, architecture, long, monkeypatch):
    one = case(architecture)
    if long:
        monkeypatch.setattr("dps_lens.paths.direct._GLANCED", 1)
    for layer in (0, 2):
        glance = Glance.of(one.run.runner, one.other, layer)
        for head in range(one.cfg.n_heads):
            assert torch.allclose(glance.z[:, head], one.other_z(Head(layer, head)), atol=TINY)
        own = Glance.of(one.run.runner, one.own, layer).pattern
        assert torch.allclose(own, one.paths.pattern(layer), atol=TINY)
        assert torch.allclose(own.sum(-1), torch.ones(own.shape[:2]), atol=TINY)
    assert no_hooks_left(one.tiny.hooked)


def projections(architecture, block, n_heads, n_kv, d_head):
    """Of q, k and v: the module, and the columns of its output."""
    attention = next(getattr(block, name) for name in ("self_attn", "attn", "attention") if hasattr(block, name))
    if architecture == "gpt2":
        width = n_heads * d_head
        return {part: (attention.c_attn, [*range(i * width, (i + 1) * width)]) for i, part in enumerate("qkv")}
    if architecture == "gpt_neox":
        return {
            part: (
                attention.query_key_value,
                [h * 3 * d_head + i * d_head + d for h in range(n_heads) for d in range(d_head)],
            )
            for i, part in enumerate("qkv")
        }
    return {
        part: (getattr(attention, f"{part}_proj"), [*range((n_heads if part == "q" else n_kv) * d_head)])
        for part in "qkv"
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_path_into_one_input_is_that_projection_of_the_changed_stream(case, architecture):
    one, layer = case(architecture), 2
    written = one.paths.writes(SENDERS, one.z)
    received = one.paths.received(layer, written, INTO)
    plain = one.tiny.plain
    block, cfg = blocks_of(plain)[layer], one.cfg
    n_kv = getattr(plain.config, "num_key_value_heads", None) or cfg.n_heads
    modules = projections(architecture, block, cfg.n_heads, n_kv, cfg.d_head)
    for number, write in enumerate(written):
        entering = add_write(one, block, write)
        for part, z in received.items():
            for index in range(cfg.n_heads):
                head = Head(layer, index)
                if part == "resid":
                    expected = one.z_with(head, [entering])
                else:
                    module, columns = modules[part]
                    seen = []
                    with (
                        torch.no_grad(),
                        hooked(
                            [
                                entering,
                                (module.register_forward_hook, lambda m, a, o, seen=seen: seen.append(o.clone())),
                            ]
                        ),
                    ):
                        plain(input_ids=one.own.tokens[None])

                    def replace(m, a, output, columns=columns, seen=seen):
                        output = output.clone()
                        output[..., columns] = seen[0][..., columns]
                        return output

                    expected = one.z_with(head, [(module.register_forward_hook, replace)])
                assert torch.allclose(z[number, :, index], expected, atol=TINY), (part, head, SENDERS[number])
    clean = one.z_with(Head(layer, 0), [])
    assert (received["q"][1, :, 0] - clean).norm() > 1e-4  # the paths do something
    assert (received["q"][1, :, 0] - received["k"][1, :, 0]).norm() > 1e-4


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_head_that_cannot_look_at_a_document_is_one_of_a_masked_prompt(case, architecture, layer):
    one = case(architecture)
    plain, attention = one.tiny.plain, attention_modules(one.tiny.plain)[layer]
    start, stop = one.own.items[0]
    z = one.paths.cut(layer, [(start, stop), (start, stop - 3)])

    def mask(module, arguments, kwargs):
        # Additive, as eager attention takes it, causal and of this layer's window.
        n = len(one.own.tokens)
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        kind = getattr(plain.config, "layer_types", None)
        if kind and kind[layer] == "sliding_attention":
            seen &= ~torch.ones(n, n, dtype=torch.bool).tril(-plain.config.sliding_window)
        seen[one.positions, start:stop] = False
        blind = torch.zeros(1, 1, n, n).masked_fill(~seen, torch.finfo(torch.float32).min)
        return arguments, {**kwargs, "attention_mask": blind}

    register = lambda hook: attention.register_forward_pre_hook(hook, with_kwargs=True)  # noqa: E731
    for index in range(one.cfg.n_heads):
        head = Head(layer, index)
        expected = one.z_with(head, [(register, mask)])
        assert torch.allclose(z[0, :, index], expected, atol=TINY)
        # Gemma's sliding window ends before the profile.
        assert (expected - one.z_with(head, [])).norm() > 1e-3 or (layer == 2 and architecture.startswith("gemma"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_a_write_into_the_logits_passes_the_final_norm_alone(case, architecture):
    one = case(architecture)
    written = one.paths.writes(SENDERS, one.z)
    found = one.paths.to_logits(written).mean(-1)
    plain = one.tiny.plain
    final = {"gpt2": lambda: plain.transformer.ln_f}.get(architecture, lambda: plain.model.norm)()
    for write, loss in zip(written, found, strict=True):

        def add(module, arguments, write=write):
            residual = arguments[0].clone()
            residual[0, one.positions] += write
            return (residual,)

        with hooked([(final.register_forward_pre_hook, add)]):
            expected = nll(plain, one.own)
        assert float(loss) == pytest.approx(expected, abs=TINY)
    assert abs(float(found[1]) - one.run.value) > 1e-5


@pytest.mark.parametrize(
    ("architecture", "into"), [("llama", "q"), ("qwen2", "q"), ("gpt2", "q"), ("gpt2", "k"), ("gpt_neox", "v")]
)
def test_paths_equal_those_of_transformer_lens(case, architecture, into):
    """`get_act_patch_direct_path`, which takes k and v only where heads do not share them."""
    patching = pytest.importorskip("transformer_lens.patching")
    if not hasattr(patching, "get_act_patch_direct_path"):
        pytest.skip("transformer-lens 3.9 patches no direct paths")
    one, sender = case(architecture), Head(1, 3)
    model, tokens = one.tiny.hooked, one.own.tokens[None]
    _, cache = model.run_with_cache(tokens)
    name = f"blocks.{sender.layer}.attn.hook_z"
    other = {name: cache[name].clone()}
    other[name][:, one.positions] = one.z[sender.layer][None]
    start, stop = one.own.spans["response"]

    def loss(logits):
        return torch.nn.functional.cross_entropy(logits[0, start - 1 : stop - 1], tokens[0, start:stop])

    with torch.no_grad():
        theirs = patching.get_act_patch_direct_path(
            model, tokens, other, cache, loss, sender.layer, sender.head, component=into, verbose=False
        )
    z = one.paths.received(2, one.paths.writes([sender], one.z), [into])[into][0]
    heads = [Head(2, index) for index in range(one.cfg.n_heads)]
    ours = one.run.replaced_losses(heads, z.transpose(0, 1)).mean(-1)
    assert torch.allclose(ours.float(), theirs[2].cpu(), atol=2e-6)
    assert (ours - one.run.value).abs().max() > 2e-5
    assert no_hooks_left(model)
