"""Causal Head Gating as published: one gate a head, fitted freely, towards open and towards closed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from dps_lens.checks import check_number, check_whole
from dps_lens.data import Prompt
from dps_lens.errors import ScoreError
from dps_lens.heads import HeadSet
from dps_lens.intervene import Patch
from dps_lens.literals import Positions
from dps_lens.model import HookedModel, runner_of
from dps_lens.scoring.answers import ExampleRun
from dps_lens.scoring.clean_run import CleanRun
from dps_lens.scoring.paths import gradients_of
from dps_lens.scoring.sweep import aligned_z


@dataclass(frozen=True)
class GatingConfig:
    """How gates are fitted; the defaults are those of the published package.

    Attributes:
        steps: updates of the free fit.
        pulled_steps: updates of each of the two fits that start from it.
        lr: of Adam, on the logits of the gates.
        pull: λ, of the mean logit, per nat of NLL per token.
        clip: logits beyond ± this are pulled no further.
        max_norm: of the gradient of one gate map.
        runs: how many runs an update looks at, drawn without replacement; None looks at all of them.
        seed: of the starting gates, uniform in (0, 1), and of the order of the runs.
    """

    steps: int = 500
    pulled_steps: int = 500
    lr: float = 1.0
    pull: float = 0.1
    clip: float = 4.0
    max_norm: float = 1.0
    runs: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "pulled_steps"):
            check_whole(ScoreError, f"GatingConfig: {name}", getattr(self, name), least=0)
        for name in ("lr", "pull", "clip", "max_norm"):
            check_number(ScoreError, f"GatingConfig: {name}", getattr(self, name), above=0)
        if self.runs is not None:
            check_whole(ScoreError, "GatingConfig: runs", self.runs, least=1)


@dataclass(frozen=True, eq=False)
class CausalGates:
    """Gates in [0, 1] of every head, and the roles that they tell apart (Nam et al. 2025, arXiv 2505.13737, Table 1).

    Attributes:
        free: `Float[Tensor, "... layer head"]`, fitted without a pull (λ = 0).
        open: G⁺, fitted from there with λ > 0, towards 1.
        closed: G⁻, fitted from there with λ < 0, towards 0.
    """

    free: Tensor
    open: Tensor
    closed: Tensor

    @property
    def facilitating(self) -> Tensor:
        """G⁻: stays open although it is pulled shut; losing the head hurts."""
        return self.closed

    @property
    def interfering(self) -> Tensor:
        """1 − G⁺: stays shut although it is pulled open; losing the head helps."""
        return 1 - self.open

    @property
    def irrelevant(self) -> Tensor:
        """G⁺(1 − G⁻): goes wherever it is pulled."""
        return self.open * (1 - self.closed)

    def roles(self, threshold: float = 0.5) -> dict[str, HeadSet]:
        """Heads whose score reaches the threshold, by role, highest first; a head may have none, or two.

        Raises:
            ScoreError: there are several gate maps; take one of them.
        """
        if self.free.ndim != 2:
            raise ScoreError(f"CausalGates.roles: needs gates [layer head], found {list(self.free.shape)}")
        found = {}
        for name in ("facilitating", "interfering", "irrelevant"):
            scores = getattr(self, name)
            order = scores.flatten().argsort(descending=True, stable=True).tolist()
            heads = (divmod(one, scores.shape[1]) for one in order)
            chosen = [head for head in heads if float(scores[head]) >= threshold]
            found[name] = HeadSet(chosen, name, (scores.shape[0], scores.shape[1]))
        return found


def causal_head_gates(
    model: HookedModel,
    prompts: Sequence[Prompt],
    *,
    counterfactuals: Sequence[Prompt] | None = None,
    positions: Positions = "all",
    start: Float[Tensor, "layer head"] | None = None,
    config: GatingConfig | None = None,
) -> CausalGates:
    """Causal Head Gating (Nam et al. 2025, arXiv 2505.13737): which heads a response needs, and which disturb it.

    One gate g = σ(θ) a head scales its z. Adam minimises `NLL − λ · mean(clip(θ))`, NLL per token, mean over
    prompts: first with λ = 0, then from there with λ > 0 and with λ < 0. Unlike the published trainer, which runs
    under autocast, everything is computed in the model's own dtype. (That package calls the fit with λ > 0
    "necessary"; in the paper's Table 1, as here, it is the one that tells interfering heads.)

    Args:
        model: a hooked model.
        prompts: with responses.
        counterfactuals: prompts with the same responses, one for each; a closed gate then puts their z in place
            instead of 0.
        positions: where gates act; the published ones act everywhere.
        start: logits of the gates to start from; drawn with the seed where there are none.
        config: of the fit.

    Raises:
        ScoreError: no prompts, or another number of counterfactuals.
        PromptError: positions other than `"response"` and a counterfactual of other length.
    """
    if not prompts or (counterfactuals is not None and len(counterfactuals) != len(prompts)):
        found = "" if counterfactuals is None else f" and {len(counterfactuals)} counterfactuals"
        raise ScoreError(
            f"causal_head_gates: needs prompts, and a counterfactual for each, found {len(prompts)}{found}"
        )
    runner, config = runner_of(model), config or GatingConfig()
    if counterfactuals is None:
        runs = [CleanRun(runner, prompt, ablation="zero", positions=positions) for prompt in prompts]
    else:
        runs = []
        for prompt, other in zip(prompts, counterfactuals, strict=True):
            z, where = aligned_z(model, prompt, other, positions)
            runs.append(CleanRun(runner, prompt, ablation=Patch(z=z), positions=positions, where=where))
    gates = fit_gates(runs, torch.full((1, len(runs)), 1 / len(runs)), config, start)
    return CausalGates(gates.free[0], gates.open[0], gates.closed[0])


def fit_gates(
    runs: Sequence[ExampleRun],
    weights: Float[Tensor, "fit run"],
    config: GatingConfig,
    start: Float[Tensor, "layer head"] | None = None,
) -> CausalGates:
    """The three fits of Causal Head Gating for several weightings of the runs at once, which never meet.

    Args:
        runs: with the ablation that stands behind a closed gate.
        weights: of the runs, adding up to 1 in each row.
        config: of the fit.
        start: logits of the gates to start from, the same for all fits; drawn with the seed where there are none.

    Raises:
        ScoreError: gradients are NaN or infinite.
    """
    cfg = runs[0].runner.cfg
    if start is None:
        drawn = torch.rand(cfg.n_layers, cfg.n_heads, generator=torch.Generator().manual_seed(config.seed))
        start = drawn.clamp(1e-6, 1 - 1e-6).logit()
    free = _stage(runs, weights, start.float().expand(len(weights), -1, -1), config, config.steps, 0.0)
    fits = [_stage(runs, weights, free, config, config.pulled_steps, pull) for pull in (config.pull, -config.pull)]
    return CausalGates(free.sigmoid(), fits[0].sigmoid(), fits[1].sigmoid())


def _stage(
    runs: Sequence[ExampleRun], weights: Tensor, start: Tensor, config: GatingConfig, steps: int, pull: float
) -> Float[Tensor, "fit layer head"]:
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=config.lr)
    batches = batches_of(len(runs), config.runs, steps, config.seed)
    for batch in batches:
        slope = torch.zeros_like(start)
        for index in batch:
            rows = weights[:, index] > 0
            if bool(rows.any()):
                _, by_gate = gate_slopes(runs[index], logits.detach()[rows].sigmoid())
                slope[rows] += weights[rows, index, None, None] * len(runs) / len(batch) * by_gate
        gates = logits.detach().sigmoid()
        slope *= gates * (1 - gates)
        # d/dθ of mean(clip(θ)), over the heads of one map.
        slope -= pull / start[0].numel() * (logits.detach().abs() <= config.clip)
        norms = slope.flatten(1).norm(dim=1)[:, None, None]
        logits.grad = slope * (config.max_norm / (norms + 1e-6)).clamp(max=1.0)
        optimizer.step()
    return logits.detach()


def batches_of(n: int, size: int | None, steps: int, seed: int) -> Iterator[list[int]]:
    """So many batches of indices; every pass through them is shuffled anew, and its last batch may be short."""
    generator = torch.Generator().manual_seed(seed)
    size, done = size or n, 0
    while done < steps:
        order = torch.randperm(n, generator=generator).tolist() if size < n else list(range(n))
        for first in range(0, n, size):
            if done == steps:
                return
            yield order[first : first + size]
            done += 1


def gate_slopes(
    run: ExampleRun, gates: Float[Tensor, "row layer head"]
) -> tuple[Float64[Tensor, " row"], Float[Tensor, "row layer head"]]:
    """Mean objective over the response under each row's gates, and its slope by every gate.

    Raises:
        ScoreError: gradients are NaN or infinite.
    """
    values, slopes, rows, done = [], [], min(run.batch_size, len(gates)), 0
    while done < len(gates):
        part = gates[done : done + rows].detach().clone().requires_grad_()
        try:
            with gradients_of(run):
                value = run.gated(part)
                (slope,) = torch.autograd.grad(value.sum(), part)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows //= 2
            torch.cuda.empty_cache()
            continue
        values.append(value.detach())
        slopes.append(slope)
        done += len(part)
    slope = torch.cat(slopes)
    if not bool(torch.isfinite(slope).all()):
        raise ScoreError(
            f"example {run.prompt.example_id!r}: gradients are NaN or infinite; load the model in float32 or bfloat16"
        )
    return torch.cat(values), slope
