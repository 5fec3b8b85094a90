"""The oracles again, with every fast path turned off; each is seen to stand still."""

import pytest
import torch
from conftest import no_hooks_left
from oracles import ablated_nll, columns_replaced, nll, two_pass_greedy
from pcs import score_pcs

import dps_lens as dps
from dps_lens.heads import Head, HeadSet
from dps_lens.model.fast import bypass, cache, shared

HEADS = HeadSet([Head(1, 2)])


class EnteredError(Exception):
    """A fast path was taken."""


@pytest.fixture
def guarded(monkeypatch):
    """Every fast path raises as soon as it does anything."""

    def refuse(*_, **__):
        raise EnteredError

    for owner, name in (
        (bypass.BypassedHooks, "_walk"),
        (bypass, "_Overwriting"),
        (cache, "_layer_class"),
        (shared, "_register"),
        (dps.model.kernels, "_call"),
    ):
        monkeypatch.setattr(owner, name, refuse)


@pytest.fixture
def prompt(tiny, probe, short):
    return dps.build_prompt(tiny.hooked, probe[0].discovery_examples()[-1], config=short)


def test_without_the_switch_fast_paths_are_taken(tiny, prompt, guarded):
    for call in (lambda: dps.generate(tiny.hooked, prompt, heads=HEADS), lambda: dps.record_z(tiny.hooked, prompt)):
        with pytest.raises(EnteredError):
            call()


def test_scores_equal_plain_hugging_face(tiny, probe, short, guarded, monkeypatch):
    monkeypatch.setenv("DPS_LENS_FAST", "0")
    scores = score_pcs(tiny.hooked, probe[:1], max_examples=1, prompt_config=short)
    example = probe[0].discovery_examples()[-1]
    for name, profile in (("own", "own"), ("no_profile", "none")):
        prompt = dps.build_prompt(tiny.hooked, example, profile, config=short)
        clean = nll(tiny.plain, prompt)
        for layer, head in ((0, 1), (1, 2), (2, 3)):
            expected = ablated_nll(tiny.plain, prompt, layer, head, tiny.hooked.cfg.d_head, "response", 0.0) - clean
            assert float(scores.components[name][0, layer, head]) == pytest.approx(expected, abs=1e-4)
    assert no_hooks_left(tiny.hooked)


def test_texts_are_those_of_whole_passes(tiny, prompt, guarded, monkeypatch):
    monkeypatch.setenv("DPS_LENS_FAST", "0")
    config = dps.DecodeConfig(stop_at_eos=False)
    out = dps.generate(tiny.hooked, [prompt, prompt], heads=HEADS, gamma=0.7, max_new_tokens=5, decode_config=config)
    start, d_head = prompt.spans["response"][0], tiny.hooked.cfg.d_head
    columns = slice(2 * d_head, 3 * d_head)

    def plain(tokens):
        return tiny.plain(input_ids=tokens[None]).logits[0, -1]

    def masked(tokens):
        where = torch.arange(len(tokens)) >= start - 1
        with columns_replaced(tiny.plain, 1, 2, d_head, where, 0.0):
            return plain(tokens)

    assert columns.stop <= tiny.hooked.cfg.n_heads * d_head
    expected, gap = two_pass_greedy(plain, masked, prompt.prompt_tokens, 0.7, 5, set())
    assert gap > 1e-4
    assert [tokens.tolist() for tokens in out.tokens] == [expected, expected]
