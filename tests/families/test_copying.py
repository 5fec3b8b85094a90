"""Copying and copy suppression: by hand on plain models, and on a circuit that copies."""

import circuits
import pytest
import torch

import dps_lens as dps
from dps_lens.errors import ScoreError
from dps_lens.families.copying import drawn, own_ranks
from dps_lens.heads import Head


def by_hand(architecture, plain, layer, head, d_head, tokens):
    """Logits when a head looks at one token alone, `[token vocab]`: by the modules of the plain model."""
    inner = plain.transformer if architecture == "gpt2" else plain.model
    block = (inner.h if architecture == "gpt2" else inner.layers)[layer]
    final = inner.ln_f if architecture == "gpt2" else inner.norm
    embedding = plain(input_ids=tokens[:, None], output_hidden_states=True).hidden_states[1][:, 0]
    columns = slice(head * d_head, (head + 1) * d_head)
    if architecture == "gpt2":
        width = block.attn.c_attn.weight.shape[0]
        w_v = block.attn.c_attn.weight[:, 2 * width :][:, columns]
        w_o = block.attn.c_proj.weight[columns]
        write = block.ln_1(embedding) @ w_v @ w_o
    else:
        group = block.self_attn.q_proj.out_features // block.self_attn.v_proj.out_features
        rows = slice(head // group * d_head, (head // group + 1) * d_head)
        w_v, w_o = block.self_attn.v_proj.weight[rows].T, block.self_attn.o_proj.weight[:, columns].T
        write = block.input_layernorm(embedding) @ w_v @ w_o
        if architecture == "gemma2":
            write = block.post_attention_layernorm(write)
    bias = getattr(final, "bias", None)
    return (final(write) - (0 if bias is None else bias)) @ plain.lm_head.weight.T


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_ranks_are_those_of_the_plain_modules(tinies, architecture):
    tiny = tinies(architecture)
    cfg, tokens = tiny.hooked.cfg, drawn(tiny.hooked, 40, 0)
    assert len(set(tokens.tolist())) == 40
    ranks = own_ranks(tiny.hooked, tokens)
    with torch.no_grad():
        for layer, head in ((0, 1), (2, 3)):
            logits = by_hand(architecture, tiny.plain, layer, head, cfg.d_head, tokens)
            own = logits[torch.arange(40), tokens]
            above = [(row > value + 1e-5).sum() for row, value in zip(logits, own, strict=True)]
            below = [(row < value - 1e-5).sum() for row, value in zip(logits, own, strict=True)]
            assert (ranks.above[layer, head] - torch.stack(above)).abs().max() <= 1
            assert (ranks.below[layer, head] - torch.stack(below)).abs().max() <= 1


def test_shares_count_tokens_within_reach(tinies):
    model = tinies("llama").hooked
    tokens = drawn(model, 100, 3)
    ranks = own_ranks(model, tokens)
    for name, places in (("copying", ranks.above), ("copy_suppression", ranks.below)):
        family = dps.Copying(name, n_tokens=100, reach=30, seed=3)
        scores = dps.reference_heads(model, [family], cache=False)[name]
        assert scores.example_ids == tuple(f"token {token}" for token in tokens.tolist())
        assert torch.allclose(scores.mean(), (places < 30).double().mean(-1))


def test_an_induction_head_copies_and_its_negative_suppresses(tmp_path):
    folder = circuits.copying(tmp_path)
    model, head = dps.load_model(str(folder)), Head(*circuits.INDUCTION)
    size = model.cfg.d_vocab
    found = dps.reference_heads(model, [dps.Copying("copying", n_tokens=size, reach=1)], cache=False)["copying"]
    assert float(found.mean()[head]) > 0.95
    assert found.top(1)[0] == head
    with torch.no_grad():
        model.blocks[head.layer].attn.original_component.c_proj.weight[
            head.head * circuits.D_HEAD : (head.head + 1) * circuits.D_HEAD
        ] *= -1
    both = dps.reference_heads(model, ["copying", dps.Copying(n_tokens=size, reach=1)], cache=False)
    assert float(both["copy_suppression"].mean()[head]) > 0.95
    assert float(both["copying"].mean()[head]) < 0.2


@pytest.mark.parametrize("wrong", [{"n_tokens": 0}, {"reach": 0}, {"reach": 10**6}])
def test_what_does_not_fit_the_vocabulary_is_refused(tinies, wrong):
    with pytest.raises(ScoreError, match="vocabulary"):
        dps.reference_heads(tinies("llama").hooked, [dps.Copying(**wrong)], cache=False)
