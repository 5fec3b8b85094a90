"""A set of heads by gates: memberships between 0 and 1, fitted by gradient in both directions under bounds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from dps_lens.checks import check_number, check_whole
from dps_lens.errors import ScoreError
from dps_lens.finding.causal_gates import GatingConfig, batches_of, fit_gates, gate_slopes
from dps_lens.finding.finder import Bounds, Finder, Fit
from dps_lens.finding.trial import Trial
from dps_lens.heads import HeadSet
from dps_lens.scoring.clean_run import CleanRun
from dps_lens.scoring.paths import integrated

_TINY = 1e-12


@dataclass(frozen=True)
class Gates(Finder):
    """Learned gates, as in Causal Head Gating (Nam et al. 2025, arXiv 2505.13737), for a set of at most k heads.

    Every head has a membership s in [0, 1]. The soft set is lost by `1 − s` gates in the run with the own profile
    (towards the counterfactual run's z) and brought back by the same gates in the counterfactual run; its gain J(s)
    is the mean of both, in nats per token. The fit maximises J under `Σ s ≤ k`, and under the bounds on what zeroing
    the soft set costs in the task without a profile and in neutral text, by the method of multipliers.

    It goes by mean-field annealing: `s = σ(β·∇L(s) / max ∇L(s) − τ)`, L the Lagrangian and τ ≥ 0 the least that
    keeps the budget, which is the maximum of L plus 1/β of the memberships' entropy where L is flat. β rises until
    s is nearly a set. Each trial's gradient is remembered and renewed when its turn comes (as in SAG, arXiv
    1309.2388), so that a step costs a few trials and none of them is forgotten; the first ones are integrated
    gradients (arXiv 1703.01365). Fits share every pass and never meet.

    At last the set is measured as a set, by plain ablation. While it breaks a bound, the head whose slope of the
    broken costs is largest per slope of the gain leaves: a set may hold fewer than k heads, also where fewer than k
    have a positive slope of L, and keeps its bounds on the trials it was fitted to.

    Attributes:
        visits: how often each trial's gradient is renewed.
        trials: between two updates of the memberships.
        path_steps: of the integrated gradients that it starts from.
        sharpness: β at the first and at the last update; they rise geometrically.
        memory: what a renewed gradient keeps of the former one, in [0, 1).
        penalty: nats of gain that a nat beyond a bound costs for each nat beyond it.
        role_steps: updates of each of the three fits of Causal Head Gating that tell facilitating, interfering and
            irrelevant heads apart, on the runs with the own profile; 0 leaves them out.
    """

    name: ClassVar[str] = "gates"
    visits: int = 3
    trials: int = 4
    path_steps: int = 5
    sharpness: tuple[float, float] = (4.0, 40.0)
    memory: float = 0.5
    penalty: float = 4.0
    role_steps: int = 20

    def __post_init__(self) -> None:
        for name, least in (("visits", 1), ("trials", 1), ("path_steps", 1), ("role_steps", 0)):
            check_whole(ScoreError, f"Gates: {name}", getattr(self, name), least=least)
        for value in self.sharpness:
            check_number(ScoreError, "Gates: sharpness", value, above=0)
        check_number(ScoreError, "Gates: memory", self.memory, least=0, most=0.999)
        check_number(ScoreError, "Gates: penalty", self.penalty, above=0)

    def fit(
        self, trials: Sequence[Trial], weights: Float[Tensor, "fit trial"], k: int, bounds: Bounds, seed: int
    ) -> list[Fit]:
        """One set for each row of weights, as `Finder.fit` says.

        Raises:
            ScoreError: a bound on neutral text and trials without it, or gradients are NaN or infinite.
        """
        weights = weights.double()
        parts = _parts(trials, bounds)
        field = _Field(parts, weights, self.path_steps)
        n, size = len(trials), min(self.trials, len(trials))
        steps = self.visits * -(-n // size)
        betas = torch.logspace(*(torch.tensor(self.sharpness).log10().tolist()), steps).tolist()
        multipliers = {part.name: torch.zeros(len(weights), dtype=torch.float64) for part in parts}
        slopes = field.slope("gain")
        for beta, batch in zip(betas, batches_of(n, size, steps, seed), strict=True):
            soft = memberships(beta * _scaled(slopes), k)
            field.visit(batch, soft, self.memory)
            slopes = field.slope("gain")
            for part in parts[1:]:
                excess = field.value(part.name, soft) - part.bound
                pressure = (multipliers[part.name] + self.penalty * excess).clamp(min=0)
                rate = self.penalty * len(batch) / n
                multipliers[part.name] = (multipliers[part.name] + rate * excess).clamp(min=0)
                slopes = slopes - pressure[:, None, None] * field.slope(part.name)
        chosen = _keep_bounds(_best(slopes, k), parts, weights, field)
        roles = self._roles(trials, weights, seed)
        shape = (int(slopes.shape[1]), int(slopes.shape[2]))
        return [
            Fit(HeadSet(heads, "gates", shape), slope.float(), role)
            for heads, slope, role in zip(chosen, slopes, roles, strict=True)
        ]

    def _roles(self, trials: Sequence[Trial], weights: Tensor, seed: int) -> list[dict[str, HeadSet]]:
        if not self.role_steps:
            return [{} for _ in weights]
        runs = [run for trial in trials for run in trial.removed]
        own = [weights[:, index] / len(trial.removed) for index, trial in enumerate(trials) for _ in trial.removed]
        count = min(len(runs), 2 * self.trials)
        config = GatingConfig(steps=self.role_steps, pulled_steps=self.role_steps, runs=count, seed=seed)
        fitted = fit_gates(runs, torch.stack(own, 1), config)
        return [gates.roles() for gates in fitted.unbound()]


def memberships(scores: Float[Tensor, "fit layer head"], k: int) -> Float[Tensor, "fit layer head"]:
    """σ(score − τ) with the least τ ≥ 0 whose memberships add up to at most k, for each fit."""
    flat = scores.double().flatten(1)
    low = torch.zeros(len(flat), 1, dtype=torch.float64)
    high = flat.amax(1, keepdim=True).clamp(min=0) + torch.tensor(float(flat.shape[1])).log()
    for _ in range(60):
        middle = (low + high) / 2
        over = (flat - middle).sigmoid().sum(1, keepdim=True) > k
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    # Where nothing has to give way, τ is 0 itself.
    free = flat.sigmoid().sum(1, keepdim=True) <= k
    return (flat - torch.where(free, 0.0, high)).sigmoid().reshape(scores.shape).to(scores.dtype)


@dataclass(frozen=True)
class Part:
    """One thing that a soft set changes in every trial: the gain, or what it costs somewhere.

    Attributes:
        name: `"gain"`, `"task_cost"` or `"neutral_cost"`.
        runs: of each trial, each with the sign by which its NLL counts.
        bound: nats per token; infinite for the gain.
    """

    name: str
    runs: list[list[tuple[CleanRun, float]]]
    bound: float = float("inf")

    def soft(
        self, trial: int, soft: Float[Tensor, "row layer head"]
    ) -> tuple[Float64[Tensor, " row"], Float[Tensor, "row layer head"]]:
        """What soft sets change, and the slope by every membership, in nats per token."""
        value, slope = torch.zeros(len(soft), dtype=torch.float64), torch.zeros(soft.shape)
        for run, sign in self.runs[trial]:
            nll, by_gate = gate_slopes(run, 1 - soft.float())
            value += sign * (nll - run.value)
            slope -= sign * by_gate
        return value, slope

    def hard(self, trial: int, masks: Bool[Tensor, "row layer head"]) -> Float64[Tensor, " row"]:
        """What sets change, by plain ablation."""
        value = torch.zeros(len(masks), dtype=torch.float64)
        for run, sign in self.runs[trial]:
            value += sign * (run.ablated(masks) - run.value)
        return value

    def path(self, trial: int, steps: int) -> Float[Tensor, "layer head"]:
        """Slopes on the way from no head to all of them."""
        return sum((sign * integrated(run, steps).values for run, sign in self.runs[trial]), torch.zeros(()))


def _parts(trials: Sequence[Trial], bounds: Bounds) -> list[Part]:
    """The gain first, then what is bounded."""
    gains = []
    for trial in trials:
        lost = [(run, 0.5 / len(trial.removed)) for run in trial.removed]
        gains.append(lost + [(run, -0.5 / len(trial.restored)) for run in trial.restored])
    parts = [Part("gain", gains)]
    if bounds.task_cost is not None:
        parts.append(Part("task_cost", [[(trial.task, 1.0)] for trial in trials], bounds.task_cost))
    if bounds.neutral_cost is not None:
        neutral = [(trial.neutral, 1.0) for trial in trials if trial.neutral is not None]
        if len(neutral) < len(trials):
            raise ScoreError("Gates: a bound on neutral_cost needs neutral text in every trial")
        parts.append(Part("neutral_cost", [[one] for one in neutral], bounds.neutral_cost))
    return parts


class _Field:
    """What is known of every trial at the soft set that it saw last: values, and slopes by membership."""

    def __init__(self, parts: Sequence[Part], weights: Float64[Tensor, "fit trial"], path_steps: int) -> None:
        self.parts, self.weights = parts, weights
        n_fits, n_trials = weights.shape
        used = [trial for trial in range(n_trials) if bool((weights[:, trial] > 0).any())]
        self.slopes: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        for part in parts:
            cfg = part.runs[0][0][0].runner.cfg
            slopes = torch.zeros(n_trials, n_fits, cfg.n_layers, cfg.n_heads)
            for trial in used:
                slopes[trial] = part.path(trial, path_steps)
            self.slopes[part.name] = slopes
            self.values[part.name] = torch.full((n_trials, n_fits), float("nan"), dtype=torch.float64)

    def visit(self, trials: Sequence[int], soft: Float[Tensor, "fit layer head"], memory: float) -> None:
        for trial in trials:
            rows = self.weights[:, trial] > 0
            if not bool(rows.any()):
                continue
            for part in self.parts:
                value, slope = part.soft(trial, soft[rows])
                slopes = self.slopes[part.name][trial]
                slopes[rows] = memory * slopes[rows] + (1 - memory) * slope
                self.values[part.name][trial, rows] = value

    def slope(self, name: str) -> Float64[Tensor, "fit layer head"]:
        return torch.einsum("ft,tflh->flh", self.weights, self.slopes[name].double())

    def value(self, name: str, soft: Float[Tensor, "fit layer head"]) -> Float64[Tensor, " fit"]:
        """Mean over trials; to first order where a trial has not seen a soft set."""
        first_order = (self.slopes[name].double() * soft.double()).sum((-1, -2))
        values = torch.where(self.values[name].isnan(), first_order, self.values[name])
        return (self.weights.T * values).sum(0)


def _scaled(slopes: Tensor) -> Tensor:
    """By the largest positive slope, so that β means the same for every model and gain."""
    return slopes / slopes.flatten(1).amax(1).clamp(min=_TINY)[:, None, None]


def _best(slopes: Float[Tensor, "fit layer head"], k: int) -> list[list[tuple[int, int]]]:
    """At most k heads of each fit by slope, as far as it is positive; ties by layer, then head."""
    found = []
    for one in slopes:
        order = one.flatten().argsort(descending=True, stable=True).tolist()[:k]
        heads = [divmod(head, one.shape[1]) for head in order]
        found.append([head for head in heads if float(one[head]) > 0])
    return found


def _keep_bounds(
    chosen: list[list[tuple[int, int]]], parts: Sequence[Part], weights: Tensor, field: _Field
) -> list[list[tuple[int, int]]]:
    """The sets without the heads that have to leave until every bound holds, measured."""
    gain = field.slope("gain")
    bounded = [(part, field.slope(part.name)) for part in parts[1:]]
    open_fits = list(range(len(chosen))) if bounded else []
    while open_fits:
        masks = torch.zeros(len(open_fits), *gain.shape[1:], dtype=torch.bool)
        for row, fit in enumerate(open_fits):
            for head in chosen[fit]:
                masks[row][head] = True
        costs = [set_costs(part.hard, weights[open_fits], masks) for part, _ in bounded]
        still = []
        for row, fit in enumerate(open_fits):
            broken = [slope[fit] for (part, slope), cost in zip(bounded, costs, strict=True) if cost[row] > part.bound]
            if broken and chosen[fit]:
                costly = torch.stack(broken).sum(0)
                ratios = [float(costly[one] / gain[fit][one].clamp(min=_TINY)) for one in chosen[fit]]
                worst = max(range(len(ratios)), key=lambda index: (ratios[index], index))
                del chosen[fit][worst]
                still.append(fit)
        open_fits = still
    return chosen


def set_costs(
    measure: Callable[[int, Tensor], Tensor], weights: Float[Tensor, "fit trial"], masks: Bool[Tensor, "fit layer head"]
) -> Float64[Tensor, " fit"]:
    """Weighted mean over trials of what a measure finds for each fit's set."""
    total = torch.zeros(len(masks), dtype=torch.float64)
    for trial in range(weights.shape[1]):
        rows = weights[:, trial] > 0
        if bool(rows.any()):
            total[rows] += weights[rows, trial].double() * measure(trial, masks[rows])
    return total
