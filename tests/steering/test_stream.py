"""Streaming, alternatives, and the figure of token shifts."""

import numpy as np
import pytest
import torch
from conftest import no_hooks_left
from flat import generate

import dps_lens as dps
from dps_lens.data import build_prompt
from dps_lens.errors import SteeringError
from dps_lens.heads import HeadSet
from dps_lens.model import runs_native
from dps_lens.plots import token_shift

HEADS = HeadSet.parse("L0H1,L2H3")
OPTIONS = {"heads": HEADS, "gamma": 1.0, "max_new_tokens": 10, "stop_at_eos": False}


@pytest.fixture(scope="module")
def prompts(tinies, probe, short):
    return [build_prompt(tinies("llama").hooked, user.examples[0], config=short) for user in probe[:2]]


def test_a_stream_adds_up_to_the_generation(llama, prompts):
    whole = generate(llama.hooked, prompts, **OPTIONS)
    stream = generate(llama.hooked, prompts, stream=True, **OPTIONS)
    with pytest.raises(SteeringError, match="has not ended"):
        _ = stream.generation
    written, pieces = ["", ""], 0
    for row, text in stream:
        written[row] += text
        pieces += 1
        assert not text.endswith("\ufffd") or written[row] == whole.texts[row]
    assert written == whole.texts == stream.generation.texts
    assert pieces > 4
    assert [row.tolist() for row in stream.generation.tokens] == [row.tolist() for row in whole.tokens]
    assert no_hooks_left(llama.hooked)


def test_between_the_pieces_of_a_stream_the_model_is_bare(llama, prompts):
    stream = iter(generate(llama.hooked, prompts, stream=True, **OPTIONS))
    next(stream)
    assert no_hooks_left(llama.hooked)
    assert not runs_native(llama.hooked)
    assert not torch.is_inference_mode_enabled()
    stream.close()
    assert no_hooks_left(llama.hooked)


def test_alternatives_are_the_tokens_that_were_moved_most(llama, prompts):
    out = generate(llama.hooked, prompts, keep_alternatives=2, **OPTIONS)
    with torch.no_grad():
        full = llama.hooked(prompts[0].prompt_tokens[None])[0, -1]
        with dps.ablate(llama.hooked, HEADS, prompt=prompts[0]):
            masked = llama.hooked(prompts[0].prompt_tokens[None])[0, -1]
    change = (2 * full - masked).softmax(-1) - full.softmax(-1)
    order = change.argsort(descending=True)
    expected = [*order[:2].tolist(), *order[-2:].tolist()]
    found = out.alternatives[0][0]
    assert [piece for piece, _ in found] == [llama.hooked.tokenizer.decode([token]) for token in expected]
    assert [value for _, value in found] == pytest.approx(change[expected].tolist(), abs=1e-4)
    assert [len(row) for row in out.alternatives] == [10, 10]
    assert generate(llama.hooked, prompts, **OPTIONS).alternatives == []


def test_the_figure_shows_every_token_with_its_shift(llama, prompts):
    out = generate(llama.hooked, prompts, keep_alternatives=1, **{**OPTIONS, "max_new_tokens": 14})
    out.pieces[1][3] = "<b onclick=x>"
    figure = token_shift(out, row=1)
    trace = figure.data[0]
    shifts = [value for line in trace.z for value in line if value is not None]
    assert np.allclose(shifts, out.shifts[1].numpy())
    shown = [text for line in trace.text for text in line][:14]
    assert shown[3] == "&lt;b onclick=x&gt;"
    assert shown[0] == out.pieces[1][0].replace("\n", "⏎").replace("&", "&amp;").replace("<", "&lt;").replace(
        ">", "&gt;"
    )
    assert "KL" in trace.customdata[0][0]
    assert f"{float(out.kl[1].mean()):.3f}" in figure.layout.title.text
    assert out.plot(row=1).data[0].zmax == pytest.approx(float(out.shifts[1].abs().max()))
    alone = generate(llama.hooked, prompts, **{**OPTIONS, "gamma": -1.0})
    with pytest.raises(SteeringError, match="the full model did not run"):
        token_shift(alone)
