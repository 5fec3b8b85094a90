"""How steering moves the probability of users' own text: rules × strengths, teacher-forced."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from dps_lens.analysis.forced import Forced, Weights, combine
from dps_lens.analysis.intervals import interval, user_means
from dps_lens.analysis.rankings import Family, Select
from dps_lens.analysis.set_sweep import SetSweep
from dps_lens.data import PromptConfig, User
from dps_lens.errors import SteeringError
from dps_lens.families import draw_seed, random_heads
from dps_lens.heads import Head, HeadSet
from dps_lens.intervene import Positions
from dps_lens.runs import RunFolder
from dps_lens.scores import HeadScores
from dps_lens.scoring.branches import token_losses
from dps_lens.steering import SteeringVector
from dps_lens.steering.generate import layers_to_contrast
from dps_lens.steering.rules import Rule, divergence, find_rule

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from dps_lens.model import HookedModel

Method: TypeAlias = str | tuple[str, Family | Mapping[str, SteeringVector]]
"""A rule, such as `"cad"`; a rule of heads with its heads, `("dps", scores)`; or `("vector", {user: vector})`."""


@dataclass(frozen=True)
class SteeringSweep:
    """What steering does to the users' own text, at every strength.

    Attributes:
        strengths: γ, α, or the cap of an entropy γ.
        user_ids: of each example.
        example_ids: the examples.
        nll: of the full model, nats per token.
        change: method → NLL under steering minus that of the full model; below 0 the text became likelier.
            `"… (random)"` holds layer-matched random heads instead, the mean of an example's draws.
        kl: method → KL(steered ‖ full), nats per token, mean over the positions of the text.
        manifest: settings.
    """

    strengths: tuple[float, ...]
    user_ids: tuple[str, ...]
    example_ids: tuple[str, ...]
    nll: Float64[Tensor, " example"]
    change: Mapping[str, Float64[Tensor, "strength example"]]
    kl: Mapping[str, Float64[Tensor, "strength example"]]
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names, random controls included."""
        return tuple(self.change)

    def to_frame(self, level: float = 0.95) -> "pandas.DataFrame":
        """One row a method and strength: `mean` change of the NLL with its interval over users, `kl`, and the
        `difference` to random heads at the same strength, paired by user. Intervals are over users, given the random
        sets that were drawn."""
        import pandas as pd

        rows = []
        for name in self.methods:
            for index, strength in enumerate(self.strengths):
                change = self._users(self.change[name][index])
                row = {"method": name, "strength": strength, **interval(change, level)}
                row["kl"] = float(self._users(self.kl[name][index]).mean())
                if (control := _random(name)) in self.change:
                    row |= _named("difference", interval(change - self._users(self.change[control][index]), level))
                rows.append(row)
        return pd.DataFrame(rows)

    def at_kl(self, kl: float, level: float = 0.95) -> "pandas.DataFrame":
        """Every method at the strength where its mean KL over users is `kl` nats per token.

        Between two strengths of the grid every user's change is interpolated linearly in the root of the mean KL:
        for weak steering the change grows with the strength, the KL with its square. Methods that do not reach `kl`
        have NaN.

        Returns:
            one row a method: `strength`, `mean` change with interval, and `difference` to random heads at the same KL.

        Raises:
            SteeringError: `kl` is not positive.
        """
        import pandas as pd

        if not kl > 0:
            raise SteeringError(f"at_kl: {kl} is no KL to steer to; give nats per token above 0")
        at = {name: self._at_kl(name, kl) for name in self.methods}
        rows = []
        for name, (strength, change) in at.items():
            row = {"method": name, "kl": kl, "strength": strength, **interval(change, level)}
            if (control := _random(name)) in at:
                row |= _named("difference", interval(change - at[control][1], level))
            rows.append(row)
        return pd.DataFrame(rows)

    def _at_kl(self, name: str, kl: float) -> tuple[float, np.ndarray]:
        changes = np.stack([self._users(row) for row in self.change[name]])
        roots = np.array([max(self._users(row).mean(), 0.0) for row in self.kl[name]]) ** 0.5
        # No steering is the first point of every curve.
        changes, roots = np.vstack([np.zeros(changes.shape[1]), changes]), np.append(0.0, roots)
        strengths = np.append(0.0, self.strengths)
        above = np.flatnonzero(roots >= kl**0.5)
        if not len(above):
            return float("nan"), np.full(changes.shape[1], np.nan)
        right = int(above[0])
        share = (kl**0.5 - roots[right - 1]) / (roots[right] - roots[right - 1])
        mixed = [(1 - share) * values[right - 1] + share * values[right] for values in (strengths, changes)]
        return float(mixed[0]), mixed[1]

    def _users(self, values: Float64[Tensor, " example"]) -> np.ndarray:
        return user_means(values, self.user_ids)

    def plot(self) -> "plotly.graph_objects.Figure":
        """`dps_lens.plots.steering` of this sweep."""
        from dps_lens.plots import steering

        return steering(self)


def steering_sweep(
    model: "HookedModel",
    users: Sequence[User],
    methods: Mapping[str, Method],
    *,
    strengths: Sequence[float] = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0),
    k: int = 10,
    n_random: int = 8,
    select: Select | Mapping[str, Select] = "global",
    exclude: Mapping[str, HeadSet] | None = None,
    weighted: Collection[str] = (),
    positions: Positions = "response",
    max_examples: int | None = None,
    prompt: PromptConfig | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool = True,
) -> SteeringSweep:
    """NLL of the users' own held-out text under rules of `generate`, and how hard each rule steers.

    Teacher-forced: a set of heads runs once for all strengths (`amplify`: once each), and with
    `positions="response"` the prompt once for all sets.
    Methods are compared at equal KL with `.at_kl`, because a strength means something else in every rule.

    Args:
        model: a hooked model.
        users: their evaluation examples are used.
        methods: name → rule, or rule and heads (a family as in `ablation_curve`):
            `{"dps": ("dps", scores), "cad": "cad"}`; `vector` takes a vector a user. `dola` is `log p − strength ·
            log p_j`, with nothing ruled out, so that the NLL is finite.
        strengths: positive, ascending: γ, α (both, for stacked rules), or the cap of an entropy γ.
        k: heads of each set.
        n_random: layer-matched random sets of every method with heads, spread over a user's examples.
        select: as in `ablation_curve`; method → either, or one for all.
        exclude: as in `ablation_curve`.
        weighted: methods whose heads are edited in proportion to their score, the best one wholly: scores of the
            other users, so that none is weighted by its own.
        positions: where heads are edited: `"response"`, `"profile"` or `"all"`.
        max_examples: the newest so many evaluation examples of each user.
        prompt: how prompts are built; by default as for the scores.
        seed: of folds and random sets.
        out: a run folder; a run that is started again there resumes.
        force: drop what `out` holds.
        progress: show a progress bar.

    Raises:
        SteeringError: a rule is unknown or lacks its heads or vectors, or vectors meet other positions than the
            response; a weighted method has no scores or spreads attention evenly (`decore`), which has no parts.
        ScoreError: scores were measured on one of these examples, or at other positions.
    """
    if not strengths or min(strengths) <= 0 or list(strengths) != sorted({*strengths}):
        raise SteeringError(f"steering_sweep: strengths {list(strengths)} are not positive and ascending")
    asked = _Asked.of(methods, strengths, weighted)
    asked.check(model, users, positions)
    sets = SetSweep.of(
        "steering_sweep",
        model,
        users,
        asked.families,
        (k,),
        positions=positions,
        prompt=prompt,
        n_random=n_random,
        select=select,
        exclude=exclude,
        max_examples=max_examples,
        seed=seed,
        optional=True,
    )
    manifest = sets.fingerprint() | asked.described()
    folder = RunFolder(out, manifest, force=force) if out is not None else None
    units = sets.units(folder, lambda number, _: _measure(sets, number, asked), "steering", progress)
    names = [label for name in methods for label in (name, _random(name)) if f"change.{label}" in units[0]]
    return SteeringSweep(
        tuple(strengths),
        tuple(example.user_id for example in sets.examples),
        tuple(example.id for example in sets.examples),
        torch.stack([unit["nll"] for unit in units]),
        {name: torch.stack([unit[f"change.{name}"] for unit in units], dim=1) for name in names},
        {name: torch.stack([unit[f"kl.{name}"] for unit in units], dim=1) for name in names},
        manifest,
    )


@dataclass(frozen=True)
class _Asked:
    """What a sweep is asked for, taken apart: rules by method, with their heads or vectors."""

    rules: Mapping[str, Rule]
    named: Mapping[str, str]
    families: Mapping[str, Family]
    vectors: Mapping[str, Mapping[str, SteeringVector]]
    strengths: Sequence[float]
    weighted: Collection[str]

    @staticmethod
    def of(methods: Mapping[str, Method], strengths: Sequence[float], weighted: Collection[str]) -> "_Asked":
        """From the arguments of `steering_sweep`.

        Raises:
            SteeringError: a rule is unknown, or what it needs was not given.
        """
        rules, named = {}, {}
        families: dict[str, Any] = {}
        vectors: dict[str, Any] = {}
        for name, method in methods.items():
            named[name], given = (method, None) if isinstance(method, str) else method
            rule = rules[name] = find_rule(named[name])
            if rule.edits != (given is not None):
                wanted = "needs heads, such as ('dps', scores)" if rule.needs_heads else "takes no heads"
                if rule.vector:
                    wanted = "needs a vector a user, ('vector', {user.id: style_vector(model, user)})"
                raise SteeringError(f"steering_sweep: the rule of method {name!r} {wanted}")
            if given is not None:
                (vectors if rule.vector else families)[name] = given
        return _Asked(rules, named, families, vectors, strengths, weighted)

    def check(self, model: "HookedModel", users: Sequence[User], positions: Positions) -> None:
        """Refuse what cannot be measured.

        Raises:
            SteeringError: a method cannot be weighted, or vectors do not fit model, users or positions.
        """
        for name in self.weighted:
            if not isinstance(self.families.get(name), HeadScores) or self.rules[name].uniform:
                raise SteeringError(
                    f"steering_sweep: method {name!r} cannot be weighted; it needs scores, and a rule but decore"
                )
        for name, vectors in self.vectors.items():
            if positions != "response":
                raise SteeringError(
                    "steering_sweep: vectors are added from the last prompt token on; use positions='response'"
                )
            for user in users:
                if user.id not in vectors:
                    raise SteeringError(f"steering_sweep: method {name!r} has no vector of user {user.id!r}")
                vectors[user.id].check("steering_sweep", model)

    def described(self) -> dict[str, Any]:
        """What decides the result, for the run folder and the manifest."""
        found: dict[str, Any] = {"strengths": list(self.strengths), "rules": dict(self.named)}
        if self.weighted:
            found["weighted"] = sorted(self.weighted)
        if self.vectors:
            found["vectors"] = {
                name: {user: [one.layer, _digest(one.values)] for user, one in sorted(vectors.items())}
                for name, vectors in self.vectors.items()
            }
        return found


@torch.inference_mode()
def _measure(sets: SetSweep, number: int, asked: _Asked) -> dict[str, Float64[Tensor, "..."]]:
    """One example: `nll`, and by method `change.…` and `kl.…`, `[strength]`."""
    example, rules = sets.examples[number], asked.rules
    forced = Forced(sets.runner, sets.build(example, "own"), sets.positions)
    full, without, early = forced.logits(), None, None
    if any(rule.prompt for rule in rules.values()):
        without = Forced(sets.runner, sets.build(example, "none")).logits()
    if any(rule.early for rule in rules.values()):
        early = forced.premature(full, layers_to_contrast(sets.model))
    nll = token_losses(full, forced.targets).double().mean().cpu()
    found: dict[str, Tensor] = {"nll": nll}
    for name, rule in rules.items():
        for label, chosen in _sets_of(sets, number, name, name in asked.weighted).items():
            measured = []
            for heads in chosen:
                edited = forced.edited(rule, heads) if rule.heads else None
                for strength in asked.strengths:
                    if rule.amplify:
                        edited = forced.amplified(heads, strength)
                    elif rule.vector:
                        edited = forced.added(asked.vectors[name][example.user_id], strength)
                    steered = combine(rule, strength, full, edited=edited, without=without, early=early)
                    loss = token_losses(steered, forced.targets).double().mean().cpu()
                    measured.append(torch.stack([loss - nll, divergence(steered, full).double().mean().cpu()]))
            change, kl = torch.stack(measured).reshape(len(chosen), len(asked.strengths), 2).mean(0).unbind(-1)
            found |= {f"change.{label}": change, f"kl.{label}": kl}
    return found


def _sets_of(sets: SetSweep, number: int, name: str, weighted: bool) -> dict[str, list[Weights]]:
    """What runs under a method's name, and its random sets; a rule without heads runs once, with none."""
    if name not in sets.families:
        return {name: [{}]}
    if name not in sets.ranked[0]:
        return {}  # the family is not defined
    user = sets.examples[number].user_id
    (heads,) = sets.ranked[0][name][user]
    draws = [*sets.draws_of(number)]
    if not draws and sets.n_random:
        draws = [number % sets.n_random]  # a user with more examples than there are draws
    drawn = [random_heads(sets.model, heads, match="nearest", seed=draw_seed(sets.seed, draw)) for draw in draws]
    # By layer, so that a random head has the weight of the one that it stands for.
    chosen = sorted(heads)
    scores = sets.families[name]
    weights = [1.0] * len(chosen)
    if weighted and isinstance(scores, HeadScores):
        weights = _scored(scores, user, chosen)
    found = {name: [chosen]} | ({_random(name): [sorted(one) for one in drawn]} if drawn else {})
    return {label: [dict(zip(one, weights, strict=True)) for one in of] for label, of in found.items()}


def _scored(scores: HeadScores, user: str, heads: Sequence[Head]) -> list[float]:
    """Scores of heads by other users, as shares of the largest; 0 where one is negative."""
    mean = scores.without({user}).mean()
    values = torch.stack([mean[head] for head in heads]).clamp(min=0)
    return (values / values.max().clamp(min=1e-12)).tolist()


def _random(name: str) -> str:
    return f"{name} (random)"


def _named(column: str, found: Mapping[str, float]) -> dict[str, float]:
    return {column if part == "mean" else f"{column}_{part}": value for part, value in found.items()}


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.detach().float().cpu().numpy().tobytes()).hexdigest()[:16]
