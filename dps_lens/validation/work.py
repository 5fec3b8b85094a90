"""Held-out runs: sets of heads, chosen and random, and the evaluation examples that they meet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from dps_lens.checks import check_whole
from dps_lens.data import Example, Prompt, PromptConfig, Shown, User, build_prompt
from dps_lens.data.examples import held_out_examples, unit_key
from dps_lens.data.identity import describe_inputs
from dps_lens.digests import tensor_digest
from dps_lens.errors import ScoreError
from dps_lens.found import FoundHeads
from dps_lens.heads import HeadSet
from dps_lens.intervene import Ablation, AblationLike, Context, Mean, Where
from dps_lens.literals import CONDITIONS, PATCHED, MeasuredOn, Positions, Select
from dps_lens.model import HookedModel, ModelConfig
from dps_lens.scores import HeadScores
from dps_lens.scoring import AnswersObjective, ExampleRun, ObjectiveLike, example_run
from dps_lens.scoring.means import MeanWork
from dps_lens.scoring.work import ExampleWork
from dps_lens.selection import (
    SHARED,
    HeadSource,
    Rankings,
    Settings,
    check_held_out,
    inherited,
    random_sets,
    rankings,
    undefined_of,
)
from dps_lens.work import BatchSize, Run

Self = TypeVar("Self", bound="HeldOutWork")


@dataclass(frozen=True)
class HeldOutConfig:
    """Rare settings of the calls that test heads on evaluation examples.

    Attributes:
        exclude: family → heads that its ranking by scores may not hold, such as
            `{"preference": refs["induction"].top_share(0.02)}` (Yin & Steinhardt 2025, arXiv 2502.14010).
        positions: where heads are edited; by default as for the scores.
        patched: let `ablation_curve` and `ablation_cost` patch the same sets between the own run and another user's,
            too; at positions other than `"response"`, where the two runs do not align, they never do.
        controls: conditions that random sets are measured in, out of `own`, `no_profile`, `other_user`, `neutral`,
            `noising_other` and `denoising_other`. Of what is left out, nothing is claimed beside random sets.
        ngram: a response token counts as copied when it ends an n-gram of the response that the profile holds.
        neutral: texts to measure the neutral cost on; by default prose of the package.
        objective: what is measured, as in `score_heads`; by default as for the scores, else the NLL of the response;
            `steering_sweep` takes the NLL where none is given.
            With `"pair"` and `"choice"`, both off-target costs stay changes of NLL: of the user's own answer without a
            profile, and of neutral text.
        on: `"discovery"` lets `steering_sweep` measure on the examples that choose.
        weighted: methods of `steering_sweep` whose heads are edited in proportion to their score, the best one wholly:
            scores of the other users, so that none is weighted by its own.
    """

    exclude: Mapping[str, HeadSet] = field(default_factory=dict)
    positions: Positions | None = None
    patched: bool = True
    controls: tuple[str, ...] = (*CONDITIONS, *PATCHED)
    ngram: int = 2
    neutral: Sequence[str] | None = None
    objective: ObjectiveLike | None = None
    weighted: Sequence[str] = ()
    on: MeasuredOn = "evaluation"

    def __post_init__(self) -> None:
        if self.on not in get_args(MeasuredOn):
            raise ScoreError(f"HeldOutConfig: on {self.on!r} is unknown; use 'evaluation' or 'discovery'")
        check_whole(ScoreError, "HeldOutConfig: ngram", self.ngram, least=1)


@dataclass
class HeldOutWork(ExampleWork):
    """A run over evaluation examples, one unit each.

    Attributes:
        call: the public function, for errors.
        settings: shared with the scores.
        spread: deal the random sets of a user out to the user's examples, so that more examples cost no more draws;
            else every example measures all of them.
        optional: go on where no family is given or defined.
        uses: settings of the scores that matter here.
    """

    uses: ClassVar[tuple[str, ...]] = SHARED

    call: str
    model: HookedModel
    users: Sequence[User]
    families: Mapping[str, HeadSource]
    ks: tuple[int, ...]
    n_random: int
    select: Select | Mapping[str, Select]
    max_examples: int | None
    seed: int
    settings: Settings
    config: HeldOutConfig
    batch_size: BatchSize = "auto"
    spread: bool = True
    optional: bool = False
    means: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls: type[Self],
        call: str,
        model: HookedModel,
        users: Sequence[User],
        families: Mapping[str, HeadSource],
        ks: Sequence[int],
        *,
        ablation: AblationLike | None = None,
        prompt_config: PromptConfig | None = None,
        config: HeldOutConfig | None = None,
        inherit: Mapping[str, HeadSource] | None = None,
        **options: Any,
    ) -> Self:
        """With the settings that the families, or those of `inherit`, were scored with, where none are given.

        Raises:
            ScoreError: as `inherited`, or an example was scored on.
        """
        config = config or HeldOutConfig()
        shared = inherited(
            call,
            inherit or families,
            ablation=ablation,
            positions=config.positions,
            objective=config.objective,
            prompt_config=prompt_config,
            uses=cls.uses,
        )
        return cls(
            call, model, list(users), families, tuple(ks), settings=shared, config=config, means=shared.means, **options
        )

    def __post_init__(self) -> None:
        if self.n_random < 0:
            raise ScoreError(f"{self.call}: n_random is not negative")
        self.check_families()

    def check_families(self) -> None:
        """Refuse families that were chosen on one of the examples."""
        if self.config.on != "evaluation":
            raise ScoreError(f"{self.call}: it tests on evaluation examples; HeldOutConfig(on=…) is for steering_sweep")
        for family in self.families.values():
            if isinstance(family, HeadScores | FoundHeads):
                check_held_out(self.call, family, self.examples)

    @cached_property
    def examples(self) -> list[Example]:
        """Evaluation examples, user by user."""
        return held_out_examples(self.call, self.users, self.max_examples)

    @cached_property
    def ranked(self) -> tuple[Rankings, dict[str, str]]:
        """Sets of every family, user and k, and the families that are not defined."""
        undefined = undefined_of(self.families)
        if self.optional and len(undefined) == len(self.families):
            return {}, undefined
        return rankings(self.call, self.families, self.users, self.ks, self.select, self.config.exclude, self.seed)

    def build(self, example: Example, profile: Shown) -> Prompt:
        return build_prompt(self.model, example, profile, config=self.settings.prompt_config)

    def clean_run(
        self,
        prompt: Prompt,
        condition: str,
        *,
        ablation: Ablation | None = None,
        where: Where | None = None,
        keep_z: bool = False,
    ) -> ExampleRun:
        return example_run(
            self.runner,
            prompt,
            ablation=ablation or self.settings.ablation,
            positions=self.settings.positions,
            # Neutral text has one answer.
            objective=None if condition == "neutral" and self.compares else self.settings.objective,
            context=self.context(condition),
            where=where,
            keep_z=keep_z,
            batch_size=self.batch_size,
        )

    @property
    def compares(self) -> bool:
        """The objective compares the answers of an example."""
        return isinstance(self.settings.objective, AnswersObjective)

    def context(self, condition: str) -> Context:
        """What an ablation may look at: discovery examples only."""
        settings = self.settings
        return Context(self.model, self.discovery, condition, settings.positions, settings.prompt_config, self.means)

    @cached_property
    def discovery(self) -> list[Example]:
        pairs = [user for user in self.users if user.task.has_pairs]
        return [example for user in pairs for example in user.discovery_examples()]

    def fit(self, run: Run) -> None:
        """For mean ablation, find the means on discovery examples where the scores do not hold them."""
        ablation = self.settings.ablation
        if not isinstance(ablation, Mean) or ablation.z is not None or self.means:
            return
        if not self.discovery:
            raise ScoreError(f"{self.call}: mean ablation needs discovery examples; the users have none")
        settings = self.settings
        work = MeanWork(
            self.model, self.users, self.discovery, ("own", "no_profile"), settings.positions, settings.prompt_config,
            1, self.seed,
        )  # fmt: skip
        self.means = work.means(run)

    def ablation_in(self, condition: str) -> Ablation:
        """The ablation for calls that know nothing of examples: a mean with its values."""
        ablation = self.settings.ablation
        return replace(ablation, z=self.means[condition]) if isinstance(ablation, Mean) and self.means else ablation

    @cached_property
    def places(self) -> dict[str, int]:
        """A number for each example, whatever the order of users."""
        return {key: place for place, key in enumerate(sorted(self.by_key))}

    def draws_of(self, key: str) -> list[int]:
        """Random draws that this example measures: all, or its part where those of a user are dealt out."""
        example = self.by_key[key]
        own = [name for name, one in self.by_key.items() if one.user_id == example.user_id]
        return list(range(own.index(key), self.n_random, len(own)) if self.spread else range(self.n_random))

    def masks(self, key: str) -> tuple[Bool[Tensor, "chosen layer head"], Bool[Tensor, "random layer head"]]:
        """Chosen sets by family and k, and their random sets by family, k and draw."""
        cfg, user = self.model.cfg, self.by_key[key].user_id
        chosen = [heads for sets in self.ranked[0].values() for heads in sets[user]]
        draws = self.draws_of(key)
        random = [drawn for heads in chosen for drawn in random_sets(self.model, heads, draws, self.seed)]
        return _stacked(chosen, cfg), _stacked(random, cfg)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the result, for the run folder and the manifest."""
        sets, undefined = self.ranked
        tested = {
            family: {user: [str(heads) for heads in of_k] for user, of_k in by_user.items()}
            for family, by_user in sets.items()
        }
        means = {name: tensor_digest(mean) for name, mean in self.settings.means.items()}
        return {
            "call": self.call,
            "ablation": self.settings.ablation.settings(),
            **({"means": means} if means else {}),
            "positions": self.settings.positions,
            "objective": self.settings.objective.settings(),
            "unit": self.settings.objective.unit,
            "compares": self.compares,
            "ks": self.ks,
            "n_random": self.n_random,
            "spread": self.spread,
            "select": self.select if isinstance(self.select, str) else dict(self.select),
            "ngram": self.config.ngram,
            "seed": self.seed,
            **describe_inputs(self.model, self.users, self.examples, self.settings.prompt_config),
            "families": list(sets),
            "sets": tested,
            "undefined": undefined,
            "examples": [unit_key(example) for example in self.examples],
        }


def _stacked(sets: Sequence[HeadSet], cfg: ModelConfig) -> Bool[Tensor, "set layer head"]:
    empty = torch.zeros(0, cfg.n_layers, cfg.n_heads, dtype=torch.bool)
    return torch.stack([heads.mask(cfg) for heads in sets]) if sets else empty
