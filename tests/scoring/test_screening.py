"""Attribution against automatic differentiation of the whole model, and screening."""

from contextlib import ExitStack

import pytest
import torch
from oracles import attention_modules, edited_positions, output_projection, z_of
from pcs import score_pcs

import dps_lens as dps
from dps_lens.data import build_prompt
from dps_lens.errors import ScoreError
from dps_lens.model.runners import runner_of
from dps_lens.scoring import CleanRun
from dps_lens.scoring.attribution import attribute


def gradient_oracle(plain, prompt, positions, new=0.0):
    """Σ (z′ − z) · ∂NLL/∂z from one backward pass through a plain model."""
    held = []

    def scaled(module, arguments):
        # A leaf in the middle would cut the graph: add a zero leaf instead.
        leaf = torch.zeros_like(arguments[0]).requires_grad_()
        held.append((arguments[0].detach(), leaf))
        return (arguments[0] + leaf, *arguments[1:])

    with ExitStack() as stack:
        for module in attention_modules(plain):
            handle = output_projection(module).register_forward_pre_hook(scaled)
            stack.callback(handle.remove)
        start, stop = prompt.spans["response"]
        logits = plain(input_ids=prompt.tokens[None]).logits[0, start - 1 : stop - 1].double()
        torch.nn.functional.cross_entropy(logits, prompt.tokens[start:stop]).backward()
    chosen = edited_positions(prompt, positions)
    rows = []
    for layer, (z, leaf) in enumerate(held):
        target = new if not isinstance(new, list) else new[layer]
        change = (target - z[0, chosen]) * leaf.grad[0, chosen]
        rows.append(change.reshape(len(change), 4, 8).sum((0, 2)))
    return torch.stack(rows)


@pytest.mark.parametrize("positions", ["response", "all", "profile"])
def test_attribution_equals_autograd_through_the_whole_model(tiny, probe, short, positions):
    prompt = build_prompt(tiny.hooked, probe[0].discovery_examples()[-1], config=short)
    branches = CleanRun(runner_of(tiny.hooked), prompt, positions=positions)
    got = attribute(branches)
    assert torch.allclose(got, gradient_oracle(tiny.plain, prompt, positions), atol=1e-4)
    assert got.abs().max() > 1e-3
    assert all(parameter.requires_grad for parameter in tiny.hooked.parameters())


def test_attribution_of_a_mean_and_of_a_patch(llama, probe, short):
    prompt = build_prompt(llama.hooked, probe[0].discovery_examples()[-1], config=short)
    other = build_prompt(llama.hooked, probe[0].discovery_examples()[-1], "none", config=short)
    means = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    branches = CleanRun(runner_of(llama.hooked), prompt, ablation=dps.Mean(z=means))
    expected = gradient_oracle(llama.plain, prompt, "response", [means[layer].flatten() for layer in range(3)])
    assert torch.allclose(attribute(branches), expected, atol=1e-4)
    z = torch.stack([z_of(llama.plain, other, layer)[edited_positions(other, "response")] for layer in range(3)])
    n_edited = len(prompt.response_tokens)
    patch = dps.Patch(z=z[:, :n_edited].reshape(3, n_edited, 4, 8))
    got = attribute(CleanRun(runner_of(llama.hooked), prompt, ablation=patch))
    assert torch.allclose(got, gradient_oracle(llama.plain, prompt, "response", list(z)), atol=1e-4)


def test_attribution_is_exact_to_first_order(llama, probe, short):
    """A mean ablation a step of ε away from z changes the NLL by ε times the attribution of a whole step."""
    prompt = build_prompt(llama.hooked, probe[0].discovery_examples()[-1], config=short)
    runner, step = runner_of(llama.hooked), 1e-2
    z = dps.record_z(llama.hooked, prompt)[:, : len(prompt.response_tokens)]
    estimate = attribute(CleanRun(runner, prompt, ablation=dps.Patch(z=torch.zeros_like(z))))
    branches = CleanRun(runner, prompt, ablation=dps.Patch(z=(1 - step) * z))
    from dps_lens.scoring import single_heads

    measured = (branches.ablated(single_heads(3, 4)) - branches.nll).reshape(3, 4) / step
    assert torch.allclose(measured.float(), estimate, atol=2e-2 * float(estimate.abs().max()))


def test_screened_values_are_exact_where_they_say_so(llama, probe, short, tmp_path):
    options = {"max_examples": 1, "prompt_config": short}
    exact = score_pcs(llama.hooked, probe[:3], **options)
    estimated = score_pcs(llama.hooked, probe[:3], method="attribution", **options)
    screened = score_pcs(
        llama.hooked,
        probe[:3],
        method="screened",
        out=tmp_path,
        score_config=dps.ScoreConfig(exact_layers=1, confirm=0.25),
        **options,
    )
    assert exact.exact.all()
    assert not estimated.exact.any()
    assert screened.exact[:, 0].all()
    assert screened.exact[:, 1:].sum(dim=(1, 2)).tolist() == [3, 3, 3]
    assert torch.allclose(screened.values[screened.exact], exact.values[screened.exact], atol=1e-5)
    assert torch.equal(screened.values[~screened.exact], estimated.values[~screened.exact])
    rest = estimated.values[:, 1:].flatten(1)
    assert torch.equal(screened.exact[:, 1:].flatten(1), rest >= rest.topk(3).values[:, -1:])
    loaded = dps.HeadScores.load(tmp_path)
    assert torch.equal(loaded.exact, screened.exact)
    assert set(loaded.to_frame()["exact"].astype(float).round(3)) <= {0.0, 0.333, 0.667, 1.0}
    everything = score_pcs(
        llama.hooked, probe[:3], method="screened", score_config=dps.ScoreConfig(exact_layers=3, confirm=0.0), **options
    )
    assert torch.allclose(everything.values, exact.values, atol=1e-6)


def test_screening_of_uniform_and_bad_settings(llama, probe, short):
    options = {"max_examples": 1, "prompt_config": short}
    with pytest.raises(ScoreError, match="not for 'uniform'"):
        score_pcs(llama.hooked, probe[:1], method="attribution", ablation="uniform", **options)
    with pytest.raises(ScoreError, match="confirm 2.5 is not a number from 0 to 1"):
        score_pcs(llama.hooked, probe[:1], method="screened", score_config=dps.ScoreConfig(confirm=2.5), **options)
    patched = score_pcs(
        llama.hooked,
        probe[:2],
        method="screened",
        ablation=dps.Patch(direction="denoising"),
        score_config=dps.ScoreConfig(exact_layers=1),
        **options,
    )
    assert patched.exact.any()
    assert not patched.exact.all()


def test_recall_of_screening_is_kept_with_the_scores(llama, probe, short, tmp_path):
    options = {"max_examples": 1, "prompt_config": short}
    exact = score_pcs(llama.hooked, probe[:3], **options)
    screened = score_pcs(
        llama.hooked, probe[:2], method="screened", score_config=dps.ScoreConfig(exact_layers=1, confirm=0.1), **options
    )
    tops = [values.flatten(1).topk(4).indices.tolist() for values in (screened.values, exact.values[:2])]
    expected = sum(len({*a} & {*b}) / 4 for a, b in zip(*tops, strict=True)) / 2
    assert dps.screening_recall(screened, exact, k=4) == pytest.approx(expected)
    screened.save(tmp_path)
    kept = dps.HeadScores.load(tmp_path).manifest["recall"]
    assert kept == {"k": 4, "recall": pytest.approx(expected), "n_examples": 2}
    assert dps.screening_recall(exact, exact, k=4) == 1.0
    with pytest.raises(ScoreError, match="hold estimates"):
        dps.screening_recall(exact, screened, k=4)
    with pytest.raises(ScoreError, match="is not in the exact scores"):
        dps.screening_recall(exact, score_pcs(llama.hooked, probe[:2], **options), k=4)
    elsewhere = score_pcs(llama.hooked, probe[:3], positions="all", **options)
    with pytest.raises(ScoreError, match="positions is"):
        dps.screening_recall(elsewhere, exact, k=4)
