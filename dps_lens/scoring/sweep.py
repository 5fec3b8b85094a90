"""What `score_heads` runs for one example, and how the results are put together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dps_lens.checks import check_number, check_whole
from dps_lens.data import Example, Prompt, PromptConfig, User
from dps_lens.data.conditions import DONORS, check_same_answers, prompts_in
from dps_lens.data.examples import choosing_examples, unit_key
from dps_lens.data.identity import describe_inputs
from dps_lens.errors import PromptError, ScoreError
from dps_lens.intervene import Ablation, Context, Mean, Patch, Where, record_z
from dps_lens.literals import (
    METHODS,
    POSITIONS,
    SCORE_AGAINST,
    Against,
    Discovery,
    Positions,
    ScoreAgainst,
    ScoreMethod,
)
from dps_lens.model import HookedModel
from dps_lens.scores import HeadScores
from dps_lens.scoring.answers import AnswersRun, ExampleRun, example_run, nll_run
from dps_lens.scoring.attribution import attribute
from dps_lens.scoring.clean_run import CleanRun, single_heads
from dps_lens.scoring.means import MeanWork
from dps_lens.scoring.objectives import NLL, Objective
from dps_lens.scoring.paths import STEPS, PathScores, integrated
from dps_lens.scoring.work import ExampleWork
from dps_lens.work import BatchSize, Run, Units

_SHARES: dict[ScoreAgainst, dict[Against, float]] = {
    "other_user": {"other_user": 1.0},
    "no_profile": {"no_profile": 1.0},
    "both": {"other_user": 0.5, "no_profile": 0.5},
    "other_user-no_profile": {"other_user": 1.0, "no_profile": -1.0},
    "no_profile-other_user": {"no_profile": 1.0, "other_user": -1.0},
}


@dataclass(frozen=True)
class ScoreConfig:
    """Rare settings of `score_heads`.

    Attributes:
        discovery: `"history"`, or `"labelled"` for tasks whose histories hold no pairs; then evaluate on other users.
        n_donors: other users whose profiles stand in for the own one, drawn with `seed`.
        ig_steps: for `"integrated"`, nodes of the path integral.
        exact_layers: for `"screened"`, layers that are always exact.
        confirm: for `"screened"`, share of all heads that estimates may choose beyond these layers.
        strict: refuse a user without a discovery example, who else is left out with a warning.
    """

    discovery: Discovery = "history"
    n_donors: int = DONORS
    ig_steps: int = STEPS
    exact_layers: int = 2
    confirm: float = 0.15
    strict: bool = False

    def __post_init__(self) -> None:
        check_whole(ScoreError, "ScoreConfig: n_donors", self.n_donors, least=1)
        check_whole(ScoreError, "ScoreConfig: ig_steps", self.ig_steps, least=1)
        check_whole(ScoreError, "ScoreConfig: exact_layers", self.exact_layers, least=0)
        check_number(ScoreError, "ScoreConfig: confirm", self.confirm, least=0, most=1, why="a share of all heads")


@dataclass(frozen=True)
class Part:
    """One clean run whose heads are ablated, and its part in the score of an example.

    Attributes:
        component: which component of the score it belongs to; the mean of its parts is the component.
        weight: of this part in the score.
        sign: −1 where the ablation helps (denoising) and the recovered log-probability is scored.
        clean: the run.
    """

    component: str
    weight: float
    sign: int
    clean: ExampleRun

    def exact(self, chosen: Bool[Tensor, "layer head"]) -> Float[Tensor, "layer head"]:
        """Measured effect of the chosen heads; 0 elsewhere."""
        rows = single_heads(*chosen.shape)[chosen.flatten()]
        effect = torch.zeros(chosen.shape)
        if len(rows):
            effect[chosen] = (self.clean.ablated(rows) - self.clean.value).float()
        return self.sign * effect

    def attributed(self) -> Float[Tensor, "layer head"]:
        """First-order estimate of the effect of every head."""
        return self.sign * attribute(self.clean)

    def integrated(self, steps: int) -> PathScores:
        """What every head contributes along the path to the run with all heads ablated."""
        values, change = integrated(self.clean, steps)
        return PathScores(self.sign * values, self.sign * change)


@dataclass(frozen=True)
class Sweep(ExampleWork):
    """One setting of `score_heads`: what is run for an example, and how results are put together.

    Attributes:
        means: for `Mean`, `[layer head d_head]` over the edited positions of all examples, by condition.
    """

    model: HookedModel
    users: Sequence[User]
    ablation: Ablation
    against: ScoreAgainst | None
    objective: Objective
    positions: Positions
    method: ScoreMethod
    max_examples: int | None
    prompt_config: PromptConfig
    config: ScoreConfig
    seed: int
    batch_size: BatchSize
    means: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("positions", self.positions, POSITIONS),
            ("against", self.against, (*SCORE_AGAINST, None)),
            ("method", self.method, METHODS),
        ):
            if value not in known:
                raise ScoreError(f"score_heads: {name} {value!r} is unknown; use one of {known}")
        if not self.users:
            raise ScoreError("score_heads: there are no users")
        if isinstance(self.ablation, Patch) and self.against is None:
            raise ScoreError(
                "score_heads: 'patch' needs the other run; use against='other_user' or 'no_profile', or for the "
                "paper's PCS ablation='zero', against=None, method='exact'"
            )
        if "other_user" in self.shares and len(self.users) < 2:
            raise ScoreError(
                f"score_heads: against={self.against!r} needs at least two users; with one, use against='no_profile'"
            )
        if self.method == "integrated" and self.ablation.site != "hook_z":
            raise ScoreError(
                f"score_heads: there is no path to {self.ablation.name!r}, which edits attention scores; use "
                "method='exact'"
            )

    @property
    def shares(self) -> Mapping[Against, float]:
        """Conditions that the own profile is compared with, and their weights."""
        return _SHARES[self.against] if self.against else {}

    @cached_property
    def examples(self) -> list[Example]:
        config = self.config
        return choosing_examples("score_heads", self.users, config.discovery, self.max_examples, strict=config.strict)

    def make(self, key: str, given: object = None) -> dict[str, Tensor]:
        """Components `[layer head]` and clean NLLs of one example; `exact` says which values are measured."""
        parts, nlls = self.parts(self.by_key[key])
        effects, unit = self.effects(parts)
        for name in dict.fromkeys(part.component for part in parts):
            own = [effect for part, effect in zip(parts, effects, strict=True) if part.component == name]
            unit[f"component.{name}"] = torch.stack(own).mean(0)
        return unit | {f"nll.{name}": torch.tensor(each, dtype=torch.float64).mean() for name, each in nlls.items()}

    def effects(
        self, parts: Sequence[Part], heads: Bool[Tensor, "layer head"] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The effect of every head in every part, and what a unit says of how they were found.

        Args:
            parts: of an example.
            heads: where heads are ablated one by one, these only; the others get 0.
        """
        if self.method == "exact":
            every = torch.ones(self.model.cfg.n_layers, self.model.cfg.n_heads, dtype=torch.bool)
            return [part.exact(every if heads is None else heads) for part in parts], {}
        unit = {}
        # Along a path that zeroes all heads together, a head's share says little of what it does alone.
        if self.method == "integrated" or (self.method == "screened" and isinstance(self.ablation, Patch)):
            paths = [part.integrated(self.config.ig_steps) for part in parts]
            effects = [path.values for path in paths]
            gaps = [
                part.weight * (float(path.values.sum()) - path.change) for part, path in zip(parts, paths, strict=True)
            ]
            unit = {"gap": torch.tensor(sum(gaps), dtype=torch.float64)} if self.method == "integrated" else {}
        else:
            effects = [part.attributed() for part in parts]
        weighted = [part.weight * effect for part, effect in zip(parts, effects, strict=True)]
        chosen = self.confirmed(sum(weighted, torch.zeros(())))
        if chosen.any():
            effects = [torch.where(chosen, part.exact(chosen), one) for part, one in zip(parts, effects, strict=True)]
        return effects, unit | {"exact": chosen}

    def prompts(self, example: Example, condition: str) -> list[Prompt]:
        options = {"n_donors": self.config.n_donors, "seed": self.seed, "config": self.prompt_config}
        return prompts_in(self.model, example, condition, self.users, **options)  # type: ignore[arg-type]

    def parts(self, example: Example) -> tuple[list[Part], dict[str, list[float]]]:
        """The clean runs of an example whose heads are ablated, and the clean NLLs by condition."""
        own = self.prompts(example, "own")[0]
        others = {name: self.prompts(example, name) for name in self.shares}
        check_same_answers([own, *(prompt for prompts in others.values() for prompt in prompts)])
        if isinstance(self.ablation, Patch):
            return self.patched(self.ablation, own, others)
        parts = [Part("own", sum(self.shares.values()) if self.shares else 1.0, 1, self.clean_run(own, "own"))]
        for name, share in self.shares.items():
            weight = -share / len(others[name])
            parts += [Part(name, weight, 1, self.clean_run(prompt, name)) for prompt in others[name]]
        nlls: dict[str, list[float]] = {}
        for part in parts:
            nlls.setdefault(part.component, []).append(part.clean.nll)
        return parts, nlls

    def patched(
        self, patch: Patch, own: Prompt, others: Mapping[Against, Sequence[Prompt]]
    ) -> tuple[list[Part], dict[str, list[float]]]:
        """Heads patched between the user's own prompt and counterfactual ones; every prompt is run once."""
        noising, keep = patch.direction == "noising", self.positions == "response"

        def run(prompt: Prompt) -> ExampleRun:
            options: dict[str, Any] = {"objective": self.objective, "batch_size": self.batch_size}
            return example_run(self.runner, prompt, positions=self.positions, keep_z=keep, **options)

        of_own, parts, nlls = run(own), [], {}
        nlls["own"] = [of_own.nll]
        for name, share in self.shares.items():
            runs = [run(prompt) for prompt in others[name]]
            nlls[str(name)] = [one.nll for one in runs]
            for other in runs:
                base, source = (of_own, other) if noising else (other, of_own)
                # A denoising patch lowers the NLL; what it recovers is counted as positive.
                clean = patch_between(self.model, base, source, patch)
                parts.append(Part(f"patch.{name}", share / len(runs), 1 if noising else -1, clean))
        return parts, nlls

    def clean_run(self, prompt: Prompt, condition: str) -> ExampleRun:
        return example_run(
            self.runner,
            prompt,
            ablation=self.ablation,
            positions=self.positions,
            objective=self.objective,
            context=Context(self.model, self.examples, condition, self.positions, self.prompt_config, self.means),
            batch_size=self.batch_size,
        )

    def confirmed(self, estimate: Float[Tensor, "layer head"]) -> Bool[Tensor, "layer head"]:
        """Heads that are measured: the earliest layers, where gradients mislead, and the best estimates."""
        chosen = torch.zeros_like(estimate, dtype=torch.bool)
        if self.method != "screened":
            return chosen
        chosen[: self.config.exact_layers] = True
        rest = estimate.masked_fill(chosen, -torch.inf).flatten()
        count = min(round(self.config.confirm * estimate.numel()), int((~chosen).sum()))
        chosen.view(-1)[rest.topk(count).indices] = True
        return chosen

    def with_means(self, run: Run) -> "Sweep":
        """For mean ablation, the same sweep that knows the mean z of every head."""
        if not isinstance(self.ablation, Mean) or self.ablation.z is not None:
            return self
        conditions = ("own", *self.shares)
        work = MeanWork(
            self.model,
            self.users,
            self.examples,
            conditions,
            self.positions,
            self.prompt_config,
            self.config.n_donors,
            self.seed,
        )
        return replace(self, means=work.means(run))

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the result, for the run folder and the manifest."""
        more: dict[str, Any] = {}
        if self.method == "screened":
            more |= {"exact_layers": self.config.exact_layers, "confirm": self.config.confirm}
        if self.method == "integrated" or (self.method == "screened" and isinstance(self.ablation, Patch)):
            more["ig_steps"] = self.config.ig_steps
        if isinstance(self.ablation, Patch):
            more["direction"] = self.ablation.direction
        if "other_user" in self.shares:
            more["n_donors"] = self.config.n_donors
        return {
            "call": "score_heads",
            "method": self.method,
            "ablation": self.ablation.settings(),
            "against": self.against,
            "objective": self.objective.settings(),
            "positions": self.positions,
            "discovery": self.config.discovery,
            "max_examples": self.max_examples,
            "seed": self.seed,
            **more,
            **describe_inputs(self.model, self.users, self.examples, self.prompt_config),
            "examples": [unit_key(example) for example in self.examples],
        }

    @property
    def _sign(self) -> str:
        of = "the NLL of the user's own text" if isinstance(self.objective, NLL) else f"{self.objective.name!r}"
        return f"positive: ablating the head raises {of}"

    def weight(self, component: str) -> float:
        """Of a component in the score."""
        shares = {str(name): share for name, share in self.shares.items()}
        if component == "own":
            return sum(shares.values()) if shares else 1.0
        return shares[component.removeprefix("patch.")] * (1 if component.startswith("patch.") else -1)

    def collect(self, units: Units, manifest: dict[str, Any]) -> HeadScores:
        """Scores of the examples whose units were made."""
        made, examples = list(units.made.values()), [self.by_key[key] for key in units.made]

        def gather(prefix: str) -> dict[str, Tensor]:
            # Every unit is asked for what any of them holds.
            names = dict.fromkeys(name for unit in made for name in unit if name.startswith(prefix))
            return {name[len(prefix) :]: torch.stack([unit[name] for unit in made]) for name in names}

        components = gather("component.")
        values = sum((self.weight(name) * part for name, part in components.items()), torch.zeros(()))
        dated = {user.id: "strictly older documents" if user.dated else "leave-one-out" for user in self.users}
        return HeadScores(
            values,
            example_ids=[example.id for example in examples],
            user_ids=[example.user_id for example in examples],
            components=components,
            nll=gather("nll."),
            **({"exact": torch.stack([unit["exact"].bool() for unit in made])} if "exact" in made[0] else {}),
            **({"gap": torch.stack([unit["gap"] for unit in made])} if "gap" in made[0] else {}),
            tensors={f"mean.{name}": mean for name, mean in self.means.items()},
            manifest={**manifest, "sign": self._sign, "unit": self.objective.unit, "profiles": dated},
        )


def patch_between(model: HookedModel, base: ExampleRun, source: ExampleRun, patch: Patch) -> ExampleRun:
    """The clean run `base`, to be patched with z of the clean run `source` of the same example.

    Raises:
        PromptError: as `aligned_z`.
    """
    if isinstance(base, AnswersRun) and isinstance(source, AnswersRun):
        return base.each(source, partial(_patch_between, model, patch))
    return _patch_between(model, patch, nll_run(base), nll_run(source))


def _patch_between(model: HookedModel, patch: Patch, base: CleanRun, source: CleanRun) -> CleanRun:
    if source.z is not None and base.positions == "response":
        return base.patched_from(source, patch)
    z, where = aligned_z(model, base.prompt, source.prompt, base.positions)
    return base.with_values(replace(patch, z=z), where)


def aligned_z(
    model: HookedModel, base: Prompt, source: Prompt, positions: Positions
) -> tuple[Float[Tensor, "layer pos head d_head"], Where]:
    """z of `source` at the positions of `base` that may be patched, and which these are.

    Response positions align by their offset. Elsewhere the two prompts must have equal spans, and
    outside the profile only positions with equal ids are patched.
    """
    if positions == "response":
        z = record_z(model, source, positions="response")
        return z[:, : len(base.response_tokens)], lambda n_pos: slice(None)
    if base.spans != source.spans:
        raise PromptError(
            f"example {base.example_id!r}: patching positions={positions!r} needs profiles of equal token length, "
            f"found {base.spans['profile']} and {source.spans['profile']}; use positions='response', or ablation='zero'"
        )
    same = base.tokens == source.tokens
    first, stop = base.spans["profile"]
    same[first:stop] = True
    if positions == "profile":
        same[:first], same[stop:] = False, False
    chosen = same[:-1]
    z = record_z(model, source, positions="all")[:, :-1][:, chosen]
    return z, lambda n_pos: chosen[None, :n_pos]
