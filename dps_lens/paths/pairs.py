"""Runs of evaluation examples with the own profile, and with what it is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from dps_lens.checks import check_whole
from dps_lens.data import Example, Prompt, PromptConfig, User, build_prompt
from dps_lens.data.conditions import prompts_in
from dps_lens.data.examples import held_out_examples, unit_key
from dps_lens.data.identity import describe_inputs
from dps_lens.errors import ScoreError
from dps_lens.literals import AGAINST, Against
from dps_lens.model import HookedModel
from dps_lens.scoring import CleanRun
from dps_lens.scoring.work import ExampleWork
from dps_lens.work import BatchSize


@dataclass(kw_only=True)
class PairWork(ExampleWork):
    """A run over evaluation examples, a unit each, that looks at two runs of a response.

    Attributes:
        call: the public function, for errors and the manifest.
        against: the other run: with other users' profiles, or without one.
    """

    call: ClassVar[str]

    model: HookedModel
    users: Sequence[User]
    against: Against = "other_user"
    n_donors: int = 1
    max_examples: int | None = 1
    prompt_config: PromptConfig = field(default_factory=PromptConfig)
    seed: int = 0
    batch_size: BatchSize = "auto"

    def __post_init__(self) -> None:
        if self.against not in AGAINST:
            raise ScoreError(f"{self.call}: against {self.against!r} is unknown; use 'other_user' or 'no_profile'")
        if self.against == "other_user" and len(self.users) < 2:
            raise ScoreError(f"{self.call}: against='other_user' needs at least two users; use 'no_profile'")
        check_whole(ScoreError, f"{self.call}: n_donors", self.n_donors, least=1)

    @cached_property
    def examples(self) -> list[Example]:
        """Evaluation examples, user by user."""
        return held_out_examples(self.call, self.users, self.max_examples)

    def prompts(self, example: Example) -> tuple[Prompt, list[Prompt]]:
        """With the own profile, and with each of the others."""
        config = self.prompt_config
        others = prompts_in(
            self.model, example, self.against, self.users, n_donors=self.n_donors, seed=self.seed, config=config
        )
        return build_prompt(self.model, example, config=config), others

    def clean_run(self, prompt: Prompt) -> CleanRun:
        return CleanRun(self.runner, prompt, keep_z=True, batch_size=self.batch_size)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the result, for the run folder and the manifest."""
        return {
            "call": self.call,
            "against": self.against,
            "n_donors": self.n_donors,
            "max_examples": self.max_examples,
            "seed": self.seed,
            **describe_inputs(self.model, self.users, self.examples, self.prompt_config),
            "examples": [unit_key(example) for example in self.examples],
        }
