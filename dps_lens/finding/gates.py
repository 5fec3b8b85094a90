"""A set of heads by gates: memberships between 0 and 1, fitted by gradient in both directions under bounds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from dps_lens.checks import check_number, check_whole
from dps_lens.errors import ScoreError
from dps_lens.finding.causal_gates import CausalGates, GatingConfig, batches_of, fit_gates, gate_slopes
from dps_lens.finding.finder import Bounds, Finder, Fit
from dps_lens.finding.sets import Weighted, best, limits
from dps_lens.finding.trial import Quantity, Trial
from dps_lens.heads import HeadSet
from dps_lens.progress import step_bar

_TINY = 1e-12


@dataclass(frozen=True)
class Gates(Finder):
    """Learned gates, as in Causal Head Gating (Nam et al. 2025, arXiv 2505.13737), for a set of at most k heads.

    Every head has a membership s in [0, 1]. The soft set is lost by `1 − s` gates in the run with the own profile
    (towards the counterfactual run's z) and brought back by the same gates in the counterfactual run; its gain J(s)
    is the mean of both, in nats per token. The fit maximises J under `Σ s ≤ k`, and under the bounds on what zeroing
    the soft set costs in the task without a profile and in neutral text.

    It goes by mean-field annealing: `s = σ(β·∇L(s) / max ∇J(s) − τ)`, L the Lagrangian and τ ≥ 0 the least that
    keeps the budget: where L is flat, the maximum of L plus 1/β of the entropy of the memberships. The multipliers
    are the least that keep the bounds to first order. β rises until s is nearly a set. The gradient of each trial is
    remembered, and renewed when its turn comes (as in SAG, arXiv 1309.2388), so that a step costs a few trials and
    none of them is forgotten; the first ones are integrated gradients (arXiv 1703.01365). Fits share every pass and
    never meet.

    At last the k best heads are measured as a set, by plain ablation; bounds are moved by what was measured beside
    what was foreseen, and of the sets so found that keep them the one that should gain most is taken. Where none
    does, heads leave the last one, that of the largest slope of the broken costs per slope of the gain first. So a set
    may hold fewer than k heads, also where fewer than k have a positive slope of L, and keeps its bounds on the
    trials that it was fitted to.

    Attributes:
        visits: how often each trial's gradient is renewed; those of costs half as often.
        trials: between two updates of the memberships.
        sharpness: β at the first and at the last update; they rise geometrically.
        memory: what a renewed gradient keeps of the former one, in [0, 1).
        corrections: sets that are measured while bounds are moved.
        role_steps: updates of the free stage of the Causal Head Gating that tells facilitating, interfering and
            irrelevant heads apart, for the first row of weights only; its other stages take twice as many; 0: no roles.
    """

    name: ClassVar[str] = "gates"
    n_bootstraps: ClassVar[int] = 9
    visits: int = 4
    trials: int = 4
    sharpness: tuple[float, float] = (4.0, 40.0)
    memory: float = 0.8
    corrections: int = 5
    role_steps: int = 8

    def __post_init__(self) -> None:
        for name, least in (("visits", 1), ("trials", 1), ("corrections", 1), ("role_steps", 0)):
            check_whole(ScoreError, f"Gates: {name}", getattr(self, name), least=least)
        for value in self.sharpness:
            check_number(ScoreError, "Gates: sharpness", value, above=0)
        check_number(ScoreError, "Gates: memory", self.memory, least=0, most=0.999)

    def fit(
        self, trials: Sequence[Trial], weights: Float[Tensor, "fit trial"], k: int, bounds: Bounds, seed: int
    ) -> list[Fit]:
        """One set for each row of weights, as `Finder.fit` says.

        Raises:
            ScoreError: a bound on neutral text and trials without it, or gradients are NaN or infinite.
        """
        field = _Slopes(trials, weights.double(), tuple(limits(bounds)))
        most = {name: torch.full((len(weights),), one, dtype=torch.float64) for name, one in limits(bounds).items()}
        n, size = len(trials), min(self.trials, len(trials))
        steps = self.visits * -(-n // size)
        first, last = self.sharpness
        betas = [first * (last / first) ** (step / max(steps - 1, 1)) for step in range(steps)]
        planned = zip(betas, batches_of(n, size, steps, seed), strict=True)
        for beta, batch in step_bar(planned, desc="fitting gates", total=steps):
            field.renew(batch, _balanced(field, most, beta, k)[0], self.memory, self.visits)
        fits = list(Weighted.rows(trials, weights))
        sets, slopes = self._measured(fits, field, most, k)
        found = [Fit(heads, slope.float()) for heads, slope in zip(sets, slopes, strict=True)]
        if self.role_steps and found:
            found[0] = replace(found[0], roles=self._roles(trials, weights[0], seed))
        return found

    def _measured(
        self, fits: Sequence[Weighted], field: "_Slopes", most: Mapping[Quantity, Tensor], k: int
    ) -> tuple[list[HeadSet], Float64[Tensor, "fit layer head"]]:
        """The best sets that keep the bounds, and the slopes that they were ranked by."""
        gains, aims = field.mean("gain"), dict(most)
        sets: dict[int, HeadSet] = {}
        values = torch.zeros_like(gains)
        tried: list[HeadSet] = []
        for _ in range(self.corrections if most else 1):
            slopes = _balanced(field, aims, self.sharpness[1], k)[1]
            tried = [best(slope, k, positive=True) for slope in slopes]
            costs = _costs(fits, tried, field.trials, tuple(most))
            for row, heads in enumerate(tried):
                better = row not in sets or _total(gains[row], heads) > _total(gains[row], sets[row])
                if better and not _broken(costs, most, row):
                    sets[row], values[row] = heads, slopes[row]
            aims = {name: aims[name] + most[name] - costs[name] for name in most}
        while len(sets) < len(fits):
            for row in set(range(len(fits))) - set(sets):
                broken = _broken(costs, most, row)
                values[row] = slopes[row]
                if broken and len(tried[row]):
                    tried[row] = _without_worst(tried[row], field, row, broken)
                else:
                    sets[row] = tried[row]
            costs = _costs(fits, tried, field.trials, tuple(most))
        return [sets[row] for row in range(len(fits))], values

    def _roles(self, trials: Sequence[Trial], weights: Float[Tensor, " trial"], seed: int) -> dict[str, HeadSet]:
        """From gates that start half open, and go no farther than the pull can bring them back."""
        runs = [run for trial in trials for run in trial.necessity]
        each = [
            weight * share
            for trial, weight in zip(trials, weights.tolist(), strict=True)
            for share in trial.weights("necessity")
        ]
        config = GatingConfig(
            steps=self.role_steps,
            pulled_steps=2 * self.role_steps,
            lr=GatingConfig.clip / self.role_steps,
            runs=min(len(runs), self.trials),
            seed=seed,
        )
        cfg = runs[0].runner.cfg
        gates = fit_gates(runs, torch.tensor([each]), config, torch.zeros(cfg.n_layers, cfg.n_heads))
        return CausalGates(gates.free[0], gates.open[0], gates.closed[0]).roles()


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


def soft_gain(
    trial: Trial, soft: Float[Tensor, "row layer head"], turn: int = 0
) -> tuple[Float64[Tensor, " row"], Float[Tensor, "row layer head"]]:
    """`(necessity + sufficiency) / 2` of soft sets, nats per token, and its slope by every membership.

    Args:
        trial: of whose counterfactuals one is looked at.
        soft: memberships in [0, 1].
        turn: which one; they take turns.
    """
    index = turn % len(trial.necessity)
    lost, brought = trial.necessity[index], trial.sufficiency[index]
    lost_nll, lost_slope = gate_slopes(lost, 1 - soft)
    brought_nll, brought_slope = gate_slopes(brought, 1 - soft)
    return (lost_nll - lost.value + brought.value - brought_nll) / 2, (brought_slope - lost_slope) / 2


def soft_cost(
    trial: Trial, quantity: Quantity, soft: Float[Tensor, "row layer head"]
) -> tuple[Float64[Tensor, " row"], Float[Tensor, "row layer head"]]:
    """What zeroing soft sets costs, nats per token, and its slope by every membership."""
    (run,) = trial.runs(quantity)
    nll, slope = gate_slopes(run, 1 - soft)
    return nll - run.value, -slope


class _Slopes:
    """What is known of every trial at the soft set that it saw last, for each fit: slopes, and values of costs."""

    def __init__(
        self, trials: Sequence[Trial], weights: Float64[Tensor, "fit trial"], costs: Sequence[Quantity]
    ) -> None:
        self.trials, self.weights, self.costs = trials, weights, costs
        self.turns = [0] * len(trials)
        paths: dict[str, list[Tensor]] = {"gain": [trial.path("necessity") for trial in trials]}
        paths |= {name: [trial.path(name) for trial in trials] for name in costs}
        n_fits = len(weights)
        self.slopes = {name: torch.stack(one)[:, None].repeat(1, n_fits, 1, 1).float() for name, one in paths.items()}
        # Integrated scores add up to what all heads cost; at no head there is no cost.
        self.offsets = {name: torch.zeros(len(trials), n_fits, dtype=torch.float64) for name in costs}

    def renew(self, trials: Sequence[int], soft: Float[Tensor, "fit layer head"], memory: float, visits: int) -> None:
        """At a soft set; costs only at the last of so many visits and at every second one before it."""
        for index in trials:
            rows, trial = self.weights[:, index] > 0, self.trials[index]
            if not bool(rows.any()):
                continue
            shown = soft[rows].float()
            _, slope = soft_gain(trial, shown, self.turns[index])
            self._mix("gain", index, rows, slope, memory)
            for name in self.costs if (visits - self.turns[index]) % 2 else ():
                cost, slope = soft_cost(trial, name, shown)
                self._mix(name, index, rows, slope, memory)
                first_order = (self.slopes[name][index, rows] * shown).sum((-1, -2))
                self.offsets[name][index, rows] = cost - first_order.double()
            self.turns[index] += 1

    def _mix(self, name: str, index: int, rows: Tensor, slope: Tensor, memory: float) -> None:
        self.slopes[name][index, rows] = memory * self.slopes[name][index, rows] + (1 - memory) * slope.cpu()

    def mean(self, name: str) -> Float64[Tensor, "fit layer head"]:
        """Weighted mean of slopes over trials."""
        return torch.einsum("ft,tflh->flh", self.weights, self.slopes[name].double())

    def offset(self, name: Quantity) -> Float64[Tensor, " fit"]:
        """What a cost is beyond the sum of memberships times slopes, near the soft sets that trials saw last."""
        return (self.weights.T * self.offsets[name]).sum(0)


def _balanced(
    field: _Slopes, most: Mapping[Quantity, Float64[Tensor, " fit"]], beta: float, k: int
) -> tuple[Float64[Tensor, "fit layer head"], Float64[Tensor, "fit layer head"]]:
    """Memberships at one β that keep the bounds to first order, and the Lagrangian's slopes, in nats per token."""
    gain = field.mean("gain")
    # By the largest slope, so that β means the same for every model and gain.
    scale = gain.flatten(1).amax(1).clamp(min=_TINY)[:, None, None]
    costs = {name: (field.mean(name), field.offset(name)) for name in most}
    pressure = {name: torch.zeros(len(gain), dtype=torch.float64) for name in most}

    def lagrangian() -> Tensor:
        return gain - sum((pressure[name][:, None, None] * costs[name][0] for name in most), torch.zeros(()))

    for name in list(most) * (1 if len(most) < 2 else 3):
        slope, offset = costs[name]
        unit = 0.01 * scale[:, 0, 0] / slope.abs().flatten(1).amax(1).clamp(min=_TINY)
        low, high = torch.zeros_like(unit), torch.full_like(unit, 20.0)
        for step in range(25):
            # First without any pressure, which then is the answer.
            middle = (low + high) / 2 if step else low
            pressure[name] = unit * (2**middle - 1)
            foreseen = offset + (slope * memberships(beta * lagrangian() / scale, k)).sum((-1, -2))
            keeps = foreseen <= most[name]
            low, high = torch.where(keeps, low, middle), torch.where(keeps, middle, high)
        pressure[name] = unit * (2**high - 1)
    slopes = lagrangian()
    return memberships(beta * slopes / scale, k), slopes


def _costs(
    fits: Sequence[Weighted], sets: Sequence[HeadSet], trials: Sequence[Trial], names: Sequence[Quantity]
) -> dict[Quantity, Float64[Tensor, " fit"]]:
    """What each fit's set costs, measured: one batch a trial, where each fit alone would run its own."""
    for trial in trials if names else ():
        rows = [row for row, fit in enumerate(fits) if any(trial is one for one in fit.trials)]
        for name in names if rows else ():
            trial.measured(name, torch.stack([fits[row].mask(sets[row]) for row in rows]))
    each = {name: [fit.measured(name, [heads])[0] for fit, heads in zip(fits, sets, strict=True)] for name in names}
    return {name: torch.stack(costs) for name, costs in each.items()}


def _broken(costs: Mapping[Quantity, Tensor], most: Mapping[Quantity, Tensor], row: int) -> list[Quantity]:
    return [name for name in most if bool(costs[name][row] > most[name][row])]


def _total(values: Float64[Tensor, "layer head"], heads: HeadSet) -> float:
    return sum(float(values[head]) for head in heads)


def _without_worst(heads: HeadSet, field: _Slopes, row: int, broken: Sequence[Quantity]) -> HeadSet:
    """Without the head of the largest slope of the broken costs per slope of the gain; of equal ones the last."""
    ratio = sum((field.mean(name)[row] for name in broken), torch.zeros(())) / field.mean("gain")[row].clamp(min=_TINY)
    return heads - HeadSet([max(reversed(heads.heads), key=lambda head: float(ratio[head]))])
