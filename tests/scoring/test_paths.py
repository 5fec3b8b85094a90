"""Integrated gradients of heads beside a plain Hugging Face model with one factor a head."""

from copy import deepcopy
from typing import NamedTuple

import oracles
import pytest
import torch
from conftest import no_hooks_left
from torch.nn.functional import cross_entropy

import dps_lens as dps
from dps_lens.data import Prompt
from dps_lens.data.conditions import prompts_in
from dps_lens.errors import InterventionError
from dps_lens.intervene import Gate, record_z
from dps_lens.model import runner_of
from dps_lens.scoring.clean_run import CleanRun, single_heads
from dps_lens.scoring.paths import gradients_of, integrated

ARCHITECTURES = ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox"]
STEPS, ORACLE_STEPS = 5, 100


class Case(NamedTuple):
    runner: object
    plain: torch.nn.Module
    own: Prompt
    other: Prompt

    def patched(self, **options) -> CleanRun:
        """The run with the own profile, to be patched with the other user's."""
        other = CleanRun(self.runner, self.other, keep_z=True)
        return CleanRun(self.runner, self.own, **options).with_values(dps.Patch(z=other.z))


@pytest.fixture
def case(tinies, probe, short):
    def make(architecture):
        tiny = tinies(architecture)
        example = probe[5].discovery_examples()[-1]
        (own,) = prompts_in(tiny.hooked, example, "own", probe, config=short)
        (other,) = prompts_in(tiny.hooked, example, "other_user", probe, config=short)
        return Case(runner_of(tiny.hooked), deepcopy(tiny.plain).double(), own, other)

    return make


def edited(prompt):
    """The positions whose logits give the response."""
    start, stop = prompt.spans["response"]
    return slice(start - 1, stop - 1)


def walk(plain, prompt, gates, closed):
    """NLL of the response by row, every head's z let through by its factor at the edited positions.

    gates: `[row layer head]`; closed: of each layer, `[pos head*d_head]` behind them, or 0.
    """
    where, handles = edited(prompt), []
    for layer, attention in enumerate(oracles.attention_modules(plain)):

        def let(module, arguments, layer=layer):
            z = arguments[0]
            factors = gates[:, layer].repeat_interleave(z.shape[-1] // gates.shape[-1], dim=-1)[:, None]
            let_through = z.clone()
            let_through[:, where] = factors * z[:, where] + (1 - factors) * closed[layer]
            return (let_through, *arguments[1:])

        handles.append(oracles.output_projection(attention).register_forward_pre_hook(let))
    try:
        logits = plain(input_ids=prompt.tokens.expand(len(gates), -1)).logits[:, where]
    finally:
        for handle in handles:
            handle.remove()
    response = prompt.response_tokens.expand(len(gates), -1)
    return cross_entropy(logits.transpose(1, 2), response, reduction="none").mean(-1)


def path_integral(plain, prompt, shape, closed):
    """By the midpoint rule, and what all heads at once change."""
    middles = (torch.arange(ORACLE_STEPS, dtype=torch.float64) + 0.5) / ORACLE_STEPS
    gates = middles[:, None, None].repeat(1, *shape).requires_grad_()
    (gradient,) = torch.autograd.grad(walk(plain, prompt, gates, closed).sum(), gates)
    with torch.no_grad():
        shut, opened = (walk(plain, prompt, torch.full((1, *shape), gate).double(), closed) for gate in (0, 1))
    return -gradient.mean(0), float(shut - opened)


# Towards zero the way bends more, most where what attention writes is normalised (Gemma).
STEPS_TO_ZERO = {"llama": 5, "qwen3": 10, "gpt2": 5, "gpt_neox": 5}


@pytest.mark.parametrize(
    ("architecture", "ablation", "steps"),
    [(name, "patch", 5) for name in ARCHITECTURES] + [(name, "zero", steps) for name, steps in STEPS_TO_ZERO.items()],
)
def test_a_few_steps_are_the_path_integral(case, architecture, ablation, steps):
    runner, plain, own, other = of = case(architecture)
    shape = runner.cfg.n_layers, runner.cfg.n_heads
    closed = [0.0] * shape[0]
    if ablation == "patch":
        closed = [oracles.z_of(plain, other, layer)[edited(other)] for layer in range(shape[0])]
    exact, change = path_integral(plain, own, shape, closed)
    found = integrated(of.patched() if ablation == "patch" else CleanRun(runner, own), steps)
    tolerance = 1e-3 * float(exact.norm())
    assert float((found.values - exact).norm()) <= tolerance
    assert found.change == pytest.approx(change, abs=1e-4)
    assert abs(change) > 0.01
    # Errors of n heads add up to at most √n times their norm.
    assert float(found.values.sum()) == pytest.approx(change, abs=tolerance * exact.numel() ** 0.5)


def test_the_gap_to_the_change_tells_that_steps_are_too_few(case):
    """A norm behind the attention keeps a direction up to where z is 0: the gradient there has no bound."""
    runner, _, own, _ = case("gemma3")
    values, change = integrated(CleanRun(runner, own), STEPS)
    assert abs(float(values.sum()) - change) > 0.1 * abs(change)


def test_values_do_not_hang_on_the_batch(case):
    of = case("llama")
    few, many = (integrated(of.patched(batch_size=rows), 8) for rows in (1, 8))
    torch.testing.assert_close(few.values, many.values, atol=1e-6, rtol=1e-4)
    assert few.change == pytest.approx(many.change, abs=1e-6)


def test_a_path_from_a_run_to_itself_is_flat(case):
    runner, _, own, _ = case("llama")
    clean = CleanRun(runner, own, keep_z=True)
    values, change = integrated(clean.with_values(dps.Patch(z=clean.z)), STEPS)
    assert float(values.abs().max()) < 1e-6
    assert abs(change) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_z_that_is_kept_is_that_of_the_plain_model(case, architecture):
    runner, plain, own, _ = case(architecture)
    z = CleanRun(runner, own, keep_z=True).z
    torch.testing.assert_close(z, record_z(runner.model, own)[:, :-1], atol=1e-5, rtol=1e-4)
    for layer, of_layer in enumerate(z):
        expected = oracles.z_of(plain, own, layer)[edited(own)].float()
        torch.testing.assert_close(of_layer.flatten(1), expected, atol=1e-4, rtol=1e-3)


def test_other_values_leave_the_first_run_as_it_was(case):
    of = case("llama")
    clean = CleanRun(of.runner, of.own)
    masks = single_heads(of.runner.cfg.n_layers, of.runner.cfg.n_heads)
    before = clean.ablated(masks)
    other = CleanRun(of.runner, of.other, keep_z=True)
    patched = clean.with_values(dps.Patch(z=other.z))
    assert float((patched.ablated(masks) - before).abs().max()) > 1e-3
    assert clean.ablation.name == "zero"
    assert clean.values is None
    assert torch.equal(clean.ablated(masks), before)
    assert patched.value == clean.value


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gated_losses_follow_each_gate(case, architecture):
    """Rows of mixed gates, against the plain model."""
    runner, plain, own, other = of = case(architecture)
    shape = runner.cfg.n_layers, runner.cfg.n_heads
    gates = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
    closed = [oracles.z_of(plain, other, layer)[edited(other)] for layer in range(shape[0])]
    with torch.no_grad():
        expected = walk(plain, own, gates.double(), closed)
    clean = of.patched()
    with gradients_of(clean), torch.no_grad():
        losses = clean.gated_losses(gates)
    torch.testing.assert_close(losses.double().mean(-1), expected, atol=1e-4, rtol=1e-4)


def test_nothing_is_left_behind(case):
    of = case("llama")
    model, clean = of.runner.model, of.patched()
    gates = torch.ones(1, of.runner.cfg.n_layers, of.runner.cfg.n_heads)

    def interrupted():
        with Gate(gates).on(model):
            assert not no_hooks_left(model)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert no_hooks_left(model)
    wrong = clean.with_values(dps.Patch(z=clean.values[:, :1].repeat(1, 3, 1, 1)))
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(InterventionError, match="3 positions of values"):
        integrated(wrong, STEPS)
    assert no_hooks_left(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert torch.is_grad_enabled()


def test_attention_scores_have_no_path(case):
    runner, _, own, _ = case("llama")
    with pytest.raises(InterventionError, match="hook_z"):
        integrated(CleanRun(runner, own, ablation="uniform"), STEPS)
