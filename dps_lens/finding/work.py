"""What `find_heads` runs: trials, fits to all users, folds and resamples, and what the sets are measured to do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from warnings import warn

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.checks import check_flag, check_number, check_whole
from dps_lens.data import Example, Prompt, PromptConfig, User
from dps_lens.data.conditions import DONORS, check_same_answers, neutral_prompt, prompts_in
from dps_lens.data.examples import choosing_examples, key_of, unit_key
from dps_lens.data.identity import describe_inputs
from dps_lens.digests import json_digest
from dps_lens.errors import HeadError, RunError, ScoreError
from dps_lens.families import shipped_paragraphs
from dps_lens.finding.finder import Bounds, Finder, Fit
from dps_lens.finding.sets import limits
from dps_lens.finding.trial import Trial
from dps_lens.found import FoundHeads
from dps_lens.heads import Head, HeadSet
from dps_lens.intervene import Patch
from dps_lens.literals import COUNTERFACTUALS, QUANTITIES, Counterfactual, Discovery, Quantity
from dps_lens.model import HookedModel
from dps_lens.scoring import NLL, CleanRun, Objective, ObjectiveLike, example_run, find_objective, nll_run
from dps_lens.scoring.paths import STEPS
from dps_lens.scoring.work import ExampleWork
from dps_lens.selection import folds
from dps_lens.work import BatchSize, Run

# Nats per token: what rounding may add to a set that was measured in another batch.
_SLACK, _ROUGH_SLACK = 1e-5, 0.01


@dataclass(frozen=True)
class FindConfig:
    """Rare settings of `find_heads`.

    Attributes:
        discovery: `"history"`, or `"labelled"` for tasks whose histories hold no pairs; then evaluate on other users.
        n_donors: other users whose profiles are counterfactuals of one example, drawn with `seed`.
        ig_steps: nodes of the path integrals.
        n_bootstraps: resamples of users; by default as the method's cost allows, 20 for `"rank"`.
        folds: fit without each fold of users, too, so that the same users can be tested.
        neutral: neutral texts, of which each example takes one; by default prose of the package, from its last
            paragraph backwards, for calls that test heads begin at the first. None at all measures no neutral cost.
        strict: refuse a user without a discovery example, who else is left out with a warning.
        objective: what necessity and sufficiency are changes of, as in `score_heads`; `"pair"` and `"choice"` need
            examples with rejected answers. The costs are of the NLL of the user's own answer, whatever it is.
    """

    discovery: Discovery = "history"
    n_donors: int = DONORS
    ig_steps: int = STEPS
    n_bootstraps: int | None = None
    folds: bool = True
    neutral: Sequence[str] | None = None
    strict: bool = False
    objective: ObjectiveLike | None = None

    def __post_init__(self) -> None:
        find_objective(self.objective)
        check_whole(ScoreError, "FindConfig: n_donors", self.n_donors, least=1)
        check_whole(ScoreError, "FindConfig: ig_steps", self.ig_steps, least=1)
        if self.n_bootstraps is not None:
            check_whole(ScoreError, "FindConfig: n_bootstraps", self.n_bootstraps, least=0)
        check_flag(ScoreError, "FindConfig: folds", self.folds)
        check_flag(ScoreError, "FindConfig: strict", self.strict)


@dataclass
class FindWork(ExampleWork):
    """One setting of `find_heads`: units are the paths of an example, some fits, or what an example's sets do.

    Attributes:
        paths: by example, the integrated scores that were made before fits.
    """

    model: HookedModel
    users: Sequence[User]
    k: int
    finder: Finder
    against: Counterfactual
    bounds: Bounds
    max_examples: int | None
    prompt_config: PromptConfig
    config: FindConfig
    seed: int
    batch_size: BatchSize = "auto"
    paths: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        cfg = self.model.cfg
        check_whole(ScoreError, "find_heads: k", self.k, least=1)
        if self.k > cfg.n_layers * cfg.n_heads:
            raise HeadError(f"find_heads: asked for {self.k} of {cfg.n_layers * cfg.n_heads} heads")
        for name, most in (("max_task_cost", self.bounds.task_cost), ("max_neutral_cost", self.bounds.neutral_cost)):
            if most is not None:
                check_number(ScoreError, f"find_heads: {name}", most, why="nats per token")
        if self.against not in COUNTERFACTUALS:
            raise ScoreError(f"find_heads: against {self.against!r} is unknown; use one of {COUNTERFACTUALS}")
        if not self.users:
            raise ScoreError("find_heads: there are no users")
        if self.against != "no_profile" and len(self.users) < 2:
            raise ScoreError(f"find_heads: against={self.against!r} needs at least two users; use 'no_profile'")
        if self.bounds.neutral_cost is not None and not self.texts:
            raise ScoreError(
                "find_heads: max_neutral_cost needs neutral texts; give FindConfig(neutral=…) some, or no bound"
            )

    @cached_property
    def texts(self) -> list[str]:
        """Neutral texts, in the order that examples take them."""
        given = self.config.neutral
        return list(given) if given is not None else list(reversed(shipped_paragraphs()))

    @cached_property
    def examples(self) -> list[Example]:
        """Discovery examples, user by user."""
        config = self.config
        return choosing_examples("find_heads", self.users, config.discovery, self.max_examples, strict=config.strict)

    @cached_property
    def places(self) -> dict[str, int]:
        """A number for each example, whatever the order of users."""
        return {key: place for place, key in enumerate(sorted(self.by_key))}

    @cached_property
    def _trials(self) -> dict[str, Trial]:
        return {}

    def trial(self, key: str) -> Trial:
        """The clean runs of an example, made once in this process, with nothing measured yet."""
        if key not in self._trials:
            self._trials[key] = self._made(key)
        return replace(self._trials[key], paths=self.paths.get(key, {}), memo={})

    def _made(self, key: str) -> Trial:
        example = self.by_key[key]
        wanted = {"both": ("other_user", "no_profile")}.get(self.against, (self.against,))
        (own,), (plain,) = self._prompts(example, "own"), self._prompts(example, "no_profile")
        others = self._prompts(example, "other_user") if "other_user" in wanted else []
        check_same_answers((own, plain, *others))
        base, runs = self._clean(own), [self._clean(prompt) for prompt in others]
        if "no_profile" in wanted:
            runs.append(self._clean(plain))
        # Whatever is gained, what a set costs is what it does to the model's language.
        shared = "no_profile" in wanted and isinstance(self.objective, NLL)
        task = nll_run(runs[-1]) if shared else self._costing(plain)
        neutral = None
        if self.texts:
            neutral = self._costing(neutral_prompt(self.model, self.texts[self.places[key] % len(self.texts)]))
        necessity = tuple(base.patched_from(run, Patch()) for run in runs)
        sufficiency = tuple(run.patched_from(base, Patch(direction="denoising")) for run in runs)
        # Both kinds weigh the same, however many donors stand for one of them.
        each = [len(others), 1] if len(wanted) > 1 else [len(runs)]
        shares = tuple(1 / (len(each) * n) for n in each for _ in range(n))
        return Trial(example.user_id, necessity, sufficiency, task, neutral, shares, self.config.ig_steps)

    def _prompts(self, example: Example, condition: str) -> list[Prompt]:
        options: dict[str, Any] = {"n_donors": self.config.n_donors, "seed": self.seed, "config": self.prompt_config}
        return prompts_in(self.model, example, condition, self.users, **options)

    @cached_property
    def objective(self) -> Objective:
        return find_objective(self.config.objective)

    def _clean(self, prompt: Prompt) -> Any:
        """What is gained is measured on; its kind is the objective's."""
        options: dict[str, Any] = {"objective": self.objective, "batch_size": self.batch_size}
        return example_run(self.runner, prompt, keep_z=True, **options)

    def _costing(self, prompt: Prompt) -> CleanRun:
        return CleanRun(self.runner, prompt, batch_size=self.batch_size)

    @property
    def measures(self) -> tuple[Quantity, ...]:
        """What sets are measured to do."""
        return QUANTITIES if self.texts else QUANTITIES[:-1]

    def owner(self, key: str) -> str:
        return key

    def make(self, key: str, given: object = None) -> dict[str, Tensor]:
        """Integrated scores and clean NLLs of an example, the sets of some fits, or what an example's sets do."""
        if isinstance(given, tuple):
            of, masks = given
            trial = self.trial(of)
            return {name: trial.measured(name, masks) for name in self.measures}
        if isinstance(given, dict):
            return self._fitted(given)
        trial = self.trial(key)
        wanted: tuple[Quantity, ...] = ("necessity", *limits(self.bounds))
        against = sum(share * run.nll for share, run in zip(trial.shares, trial.sufficiency, strict=True))
        nll = {"own": trial.necessity[0].nll, "against": against, "no_profile": trial.task.nll}
        clean = {f"nll.{name}": torch.tensor(value, dtype=torch.float64) for name, value in nll.items()}
        return {name: trial.path(name) for name in wanted} | clean

    def given(self, key: str) -> Any:
        return self._given.get(key)

    def _fitted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sets of fits, by their names."""
        rows = torch.stack(list(weights.values()))
        used = rows.sum(0).nonzero().flatten().tolist()
        keys = list(self.paths)
        fits = self.finder.fit([self.trial(keys[one]) for one in used], rows[:, used], self.k, self.bounds, self.seed)
        if len(fits) != len(rows):
            raise ScoreError(f"find_heads: finder {self.finder.name!r} gave {len(fits)} sets for {len(rows)} fits")
        made: dict[str, Tensor] = {}
        for name, fit in zip(weights, fits, strict=True):
            if len(fit.heads) > self.k:
                raise ScoreError(f"find_heads: finder {self.finder.name!r} gave {len(fit.heads)} heads for k={self.k}")
            sets = {"heads": fit.heads, **{f"role.{role}": heads for role, heads in fit.roles.items()}}
            made |= {f"{name}.{what}": _indices(heads) for what, heads in sets.items()}
            made[f"{name}.values"] = fit.values.detach().float().cpu()
        return made

    @cached_property
    def folds(self) -> list[list[str]]:
        """Groups of users who are left out together; none where nobody would be left."""
        there = {example.user_id for example in self.examples}
        if not self.config.folds or len(there) < 2:
            return []
        return folds([user for user in self.users if user.id in there], self.seed)

    def weights(self, keys: Sequence[str]) -> dict[str, Float[Tensor, " example"]]:
        """By fit, what each example weighs; users weigh equally, in a resample as often as they were drawn."""
        owners = [self.by_key[key].user_id for key in keys]
        users = sorted(set(owners))
        counts: dict[str, np.ndarray] = {"all": np.ones(len(users))}
        for number, fold in enumerate(self.folds):
            counts[f"fold{number}"] = np.array([float(user not in fold) for user in users])
        n = self.config.n_bootstraps
        for number in range((self.finder.n_bootstraps if n is None else n) if len(users) > 1 else 0):
            rng = np.random.default_rng([self.seed, number])
            counts[f"bootstrap{number}"] = rng.multinomial(len(users), np.full(len(users), 1 / len(users)))
        size = {user: owners.count(user) for user in users}
        rows = {name: dict(zip(users, of_user / of_user.sum(), strict=True)) for name, of_user in counts.items()}
        return {
            name: torch.tensor([row[user] / size[user] for user in owners], dtype=torch.float64)
            for name, row in rows.items()
        }

    def run(self, run: Run) -> FoundHeads:
        """Make paths, fits and what the sets do; finished units are read from the run's folder."""
        self._given: dict[str, Any] = {}
        made = run.units(self, list(self.by_key), "paths of heads", split=False).made
        self.paths = made
        weights = self.weights(list(made))
        at_once = self.finder.together or len(weights)
        names = list(weights)
        groups = [names[start : start + at_once] for start in range(0, len(names), at_once)]
        # A fit belongs to the examples and weights that it was given, should some be made later.
        keys = [
            key_of("fits", group[0], group[-1], json_digest([list(made), [weights[name].tolist() for name in group]]))
            for group in groups
        ]
        self._given = {key: {name: weights[name] for name in group} for key, group in zip(keys, groups, strict=True)}
        units = run.units(self, keys, "finding sets", unit="unit", split=False).made
        if lost := {key: why for key, why in run.manifest.get("quarantined", {}).items() if key in keys}:
            raise RunError(f"find_heads: fits could not be made, the first because of {next(iter(lost.values()))}")
        fits = {name: self._read(units[key], name) for key, group in zip(keys, groups, strict=True) for name in group}
        return self._evidence(run, fits)

    def _read(self, unit: Mapping[str, Tensor], name: str) -> Fit:
        cfg = self.model.cfg
        sets = {
            what.removeprefix(f"{name}."): HeadSet(
                (Head(*one) for one in value.tolist()), "found", (cfg.n_layers, cfg.n_heads)
            )
            for what, value in unit.items()
            if what.startswith(f"{name}.") and not what.endswith(".values")
        }
        roles = {what.removeprefix("role."): heads for what, heads in sets.items() if what != "heads"}
        return Fit(sets["heads"], unit[f"{name}.values"], roles)

    def _evidence(self, run: Run, fits: Mapping[str, Fit]) -> FoundHeads:
        """What the set of all users, and each user's fold set, do on the examples; the whole result."""
        found = fits["all"]
        if not len(found.heads):
            cure = "raise the bound" if limits(self.bounds) else "give more users or examples, or another method"
            raise ScoreError(f"find_heads: {self.finder.name!r} found no head that helps{self._and_keeps()}; {cure}")
        of_fold = {user: fits[f"fold{number}"].heads for number, fold in enumerate(self.folds) for user in fold}
        owners = {key: self.by_key[key].user_id for key in self.paths}
        sets = {key: [found.heads, *([of_fold[user]] if of_fold else [])] for key, user in owners.items()}
        named = {key: key_of("effects", key, *map(str, of)) for key, of in sets.items()}
        self._given = {
            named[key]: (key, torch.stack([heads.mask(self.model.cfg) for heads in of])) for key, of in sets.items()
        }
        units = run.units(self, list(self._given), "measuring sets", split=False).made
        made = {key: units[name] for key, name in named.items() if name in units}
        effects, crossed = (
            {str(name): torch.stack([unit[name][place] for unit in made.values()]) for name in self.measures}
            for place in (0, -1)
        )
        result = FoundHeads(
            found.heads,
            found.values,
            roles=found.roles,
            folds=self.folds,
            by_fold=[fits[f"fold{number}"].heads for number in range(len(self.folds))],
            resampled=[fit.heads for name, fit in fits.items() if name.startswith("bootstrap")],
            example_ids=[self.by_key[key].id for key in made],
            user_ids=[self.by_key[key].user_id for key in made],
            effects=effects,
            crossed=crossed if of_fold else {},
            nll={name: torch.stack([self.paths[key][f"nll.{name}"] for key in made]) for name in _NLL},
            manifest={**run.manifest, "unit": self.objective.unit},
        )
        self._check(result)
        return result

    def _check(self, result: FoundHeads) -> None:
        """Refuse a set that breaks its bounds; warn of one that they keep short."""
        bounded = limits(self.bounds)
        if not bounded:
            return
        slack = _SLACK if next(self.model.parameters()).dtype == torch.float32 else _ROUGH_SLACK
        means = result.evidence().query("sample == 'in-sample'").set_index("measure")["mean"]
        for name, most in bounded.items():
            if means[name] > most + slack:
                raise ScoreError(
                    f"find_heads: the set of finder {self.finder.name!r} costs {means[name]:.4g}, and max_{name} is "
                    f"{most}; a finder measures its sets with trial.measured({name!r}, …)"
                )
        if len(result.heads) < self.k:
            reached = ", ".join(f"{name} {means[name]:.3g}" for name in bounded)
            warn(
                f"find_heads: the set holds {len(result.heads)} of {self.k} heads ({reached}): {self.finder.name!r} "
                f"found no larger one that helps{self._and_keeps()}",
                stacklevel=5,
            )
        empty = sum(not len(heads) for heads in (*result.by_fold, *result.resampled))
        if empty:
            fits = len(result.by_fold) + len(result.resampled)
            warn(f"find_heads: in {empty} of {fits} folds and resamples no head helps{self._and_keeps()}", stacklevel=5)

    def _and_keeps(self) -> str:
        """The bounds, for messages."""
        bounds = " and ".join(f"max_{name}={most}" for name, most in limits(self.bounds).items())
        return f" and keeps {bounds}" if bounds else ""

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the result, for the run folder and the manifest."""
        n = self.config.n_bootstraps
        return {
            "call": "find_heads",
            "method": self.finder.settings(),
            "k": self.k,
            "ablation": Patch.name,
            "against": self.against,
            "objective": self.objective.settings(),
            "positions": "response",
            "max_task_cost": self.bounds.task_cost,
            "max_neutral_cost": self.bounds.neutral_cost,
            "discovery": self.config.discovery,
            "n_donors": self.config.n_donors,
            "ig_steps": self.config.ig_steps,
            "n_bootstraps": self.finder.n_bootstraps if n is None else n,
            "folds": self.folds,
            "neutral": self.texts,
            "max_examples": self.max_examples,
            "seed": self.seed,
            **describe_inputs(self.model, self.users, self.examples, self.prompt_config),
            "examples": [unit_key(example) for example in self.examples],
        }


_NLL = ("own", "against", "no_profile")


def _indices(heads: HeadSet) -> Tensor:
    return torch.tensor([list(head) for head in heads], dtype=torch.long).reshape(-1, 2)
