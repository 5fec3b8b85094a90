"""How steering moves the probability of users' own text: rules × strengths, teacher-forced."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from dps_lens.analysis.intervals import interval, user_means
from dps_lens.analysis.rankings import Family, Select
from dps_lens.analysis.set_sweep import SetSweep
from dps_lens.data import Prompt, PromptConfig, User
from dps_lens.errors import ScoreError, SteeringError
from dps_lens.families import draw_seed, random_heads
from dps_lens.heads import Head, HeadSet
from dps_lens.intervene import Edit, Positions, Scale, attention_for, everywhere, window
from dps_lens.model import Runner
from dps_lens.runs import RunFolder
from dps_lens.scores import HeadScores
from dps_lens.scoring.branches import token_losses
from dps_lens.steering.rules import Rule, divergence, entropy, find_rule

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from dps_lens.model import HookedModel

Method: TypeAlias = str | tuple[str, Family]
"""A rule, such as `"cad"`; or a rule of heads with its heads, `("dps", scores)`."""

Weights: TypeAlias = Mapping[Head, float]
"""Heads and how much of the edit each gets, from 0 to 1."""


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
            `{"dps": ("dps", scores), "cad": "cad"}`.
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
        SteeringError: a rule is unknown, rules tokens out (`dola`: their NLL is infinite), adds vectors, or lacks its
            heads; a weighted method has no scores or spreads attention evenly (`decore`), which has no parts.
        ScoreError: scores were measured on one of these examples, or at other positions.
    """
    if not strengths or min(strengths) <= 0 or list(strengths) != sorted({*strengths}):
        raise SteeringError(f"steering_sweep: strengths {list(strengths)} are not positive and ascending")
    rules = {name: _rule_of(name, method) for name, method in methods.items()}
    families = {name: method[1] for name, method in methods.items() if not isinstance(method, str)}
    for name in weighted:
        if not isinstance(families.get(name), HeadScores) or rules[name].uniform:
            raise SteeringError(
                f"steering_sweep: method {name!r} cannot be weighted; it needs scores, and a rule but decore"
            )
    sets = SetSweep.of(
        "steering_sweep",
        model,
        users,
        families,
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
    named = {name: method if isinstance(method, str) else method[0] for name, method in methods.items()}
    manifest = sets.fingerprint() | {"strengths": list(strengths), "rules": named}
    if weighted:
        manifest["weighted"] = sorted(weighted)
    folder = RunFolder(out, manifest, force=force) if out is not None else None
    units = sets.units(
        folder, lambda number, _: _measure(sets, number, rules, strengths, weighted), "steering", progress
    )
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


def _rule_of(name: str, method: Method) -> Rule:
    rule = find_rule(method if isinstance(method, str) else method[0])
    if rule.early:
        raise SteeringError(f"steering_sweep: method {name!r} rules tokens out, so that NLL is infinite; use generate")
    if rule.vector:
        raise SteeringError(f"steering_sweep: method {name!r} adds vectors, which are not offered here; use generate")
    if rule.needs_heads == isinstance(method, str):
        wanted = "needs heads, such as ('dps', scores)" if rule.needs_heads else "takes no heads"
        raise SteeringError(f"steering_sweep: the rule of method {name!r} {wanted}")
    return rule


@torch.inference_mode()
def _measure(
    sets: SetSweep, number: int, rules: Mapping[str, Rule], strengths: Sequence[float], weighted: Collection[str]
) -> dict[str, Float64[Tensor, "..."]]:
    """One example: `nll`, and by method `change.…` and `kl.…`, `[strength]`."""
    example = sets.examples[number]
    forced = Forced(sets.runner, sets.build(example, "own"), sets.positions)
    without = None
    if any(rule.prompt for rule in rules.values()):
        without = Forced(sets.runner, sets.build(example, "none")).logits()
    full = forced.logits()
    nll = token_losses(full, forced.targets).double().mean().cpu()
    found: dict[str, Tensor] = {"nll": nll}
    for name, rule in rules.items():
        for label, chosen in _sets_of(sets, number, name, name in weighted).items():
            measured = []
            for heads in chosen:
                edited = forced.edited(rule, heads) if rule.heads else None
                for strength in strengths:
                    if rule.amplify:
                        edited = forced.amplified(heads, strength)
                    steered = combine(rule, strength, full, edited, without)
                    loss = token_losses(steered, forced.targets).double().mean().cpu()
                    measured.append(torch.stack([loss - nll, divergence(steered, full).double().mean().cpu()]))
            change, kl = torch.stack(measured).reshape(len(chosen), len(strengths), 2).mean(0).unbind(-1)
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


def combine(
    rule: Rule,
    strength: float,
    full: Float[Tensor, "pos d_vocab"],
    edited: Float[Tensor, "pos d_vocab"] | None,
    without: Float[Tensor, "pos d_vocab"] | None,
) -> Float[Tensor, "pos d_vocab"]:
    """Steered logits at every position of a text."""
    steered = base = edited if rule.amplify and edited is not None else full
    if rule.heads and edited is not None:
        gamma = entropy(full).clamp(max=strength)[:, None] if rule.adaptive else strength
        steered = steered + gamma * (base - edited)
    if rule.prompt and without is not None:
        steered = steered + strength * (base - without)
    return steered


class Forced:
    """Logits of one prompt's response, token by token, also with heads edited."""

    def __init__(self, runner: Runner, prompt: Prompt, positions: Positions = "response") -> None:
        self.runner = runner
        start, stop = prompt.spans["response"]
        if stop <= start:
            raise ScoreError(f"example {prompt.example_id!r}: the prompt has no response to score")
        tokens = prompt.tokens[None].to(runner.device)
        self.targets = tokens[0, start:stop]
        # Edits that begin at the last prompt token share what is before it.
        shared = start - 1 if positions == "response" else 0
        self.tokens = tokens[:, shared : stop - 1]
        self.where = everywhere if positions == "response" else window(prompt, positions)
        with attention_for(runner.model, "zero"):
            self.cache = runner.prefill(tokens[:, :shared]) if shared else None

    def logits(self, edit: Edit | Scale | None = None) -> Float[Tensor, "pos d_vocab"]:
        """Of the full model, or under an edit."""
        model, uniform = self.runner.model, isinstance(edit, Edit)
        with attention_for(model, "uniform" if uniform else "zero"), edit.on(model) if edit else nullcontext():
            return self.runner.logits(self.tokens, prompt=self.cache, keep=len(self.targets))[0].float()

    def edited(self, rule: Rule, heads: Weights) -> Float[Tensor, "pos d_vocab"]:
        """Without heads, as a rule leaves them out."""
        if rule.uniform:
            return self.logits(Edit(HeadSet(heads).mask(self.runner.cfg)[None], "uniform", self.where))
        return self.amplified(heads, -1.0)

    def amplified(self, heads: Weights, strength: float) -> Float[Tensor, "pos d_vocab"]:
        """With the z of each head multiplied by 1 + weight · strength."""
        factors = torch.ones(self.runner.cfg.n_layers, self.runner.cfg.n_heads)
        for head, weight in heads.items():
            factors[head] += weight * strength
        return self.logits(Scale(factors[None], self.where))


def _random(name: str) -> str:
    return f"{name} (random)"


def _named(column: str, found: Mapping[str, float]) -> dict[str, float]:
    return {column if part == "mean" else f"{column}_{part}": value for part, value in found.items()}
