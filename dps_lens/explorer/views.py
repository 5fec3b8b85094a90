"""What heads look at in an example, and what its profile does to the answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from dps_lens.data import Example, PromptConfig, User, build_prompt
from dps_lens.data.examples import by_key
from dps_lens.data.identity import describe_inputs
from dps_lens.heads import Head, HeadSet
from dps_lens.model import HookedModel, PromptCache, runner_of
from dps_lens.scoring import CleanRun
from dps_lens.validation.attention import attention_pattern
from dps_lens.work import Run, Work

_MAX_BY_TOKEN = 300_000
"""Values of attention of one example, token by token, that a page may hold, for the first of its heads."""


class Answer(NamedTuple):
    """An answer, and what the user's own profile does to it.

    Attributes:
        pieces: text of each token.
        gains: log p with the own profile minus log p without one, nats, of each token.
    """

    pieces: tuple[str, ...]
    gains: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class ExampleView:
    """What heads look at in one prompt, and what its profile does to the answers.

    Attributes:
        user: who asks.
        example: its id.
        pieces: text of each token of the prompt and its response.
        spans: `"profile"`, `"task"` and `"response"`, `(start, stop)`.
        heads: whose attention is there.
        attention: mean over the positions that give the response.
        answers: the user's own, then the rejected ones.
        documents: `(start, stop)` of each document of the profile.
        by_token: attention from each position that gives the response, of the first heads.
    """

    user: str
    example: str
    pieces: tuple[str, ...]
    spans: dict[str, tuple[int, int]]
    heads: tuple[Head, ...]
    attention: Float[Tensor, "head pos"]
    answers: tuple[Answer, ...] = ()
    documents: tuple[tuple[int, int], ...] = ()
    by_token: "Float[Tensor, 'some_heads query pos'] | None" = None


@dataclass
class ViewWork(Work):
    """Attention of heads in the newest evaluation example of every user, and what the profile does to its answers."""

    model: HookedModel
    users: Sequence[User]
    heads: HeadSet
    n_by_token: int
    prompt_config: PromptConfig

    @cached_property
    def by_key(self) -> dict[str, Example]:
        return by_key([user.examples[-1] for user in self.users])

    def make(self, key: str, given: object = None) -> dict[str, Tensor]:
        own, none = (
            build_prompt(self.model, self.by_key[key], of, config=self.prompt_config) for of in ("own", "none")
        )
        found = attention_pattern(self.model, own, self.heads)
        n_by_token = max(1, _MAX_BY_TOKEN // found.pattern[0].numel())
        unit = {"attention": found.mean, "by_token": found.pattern[: min(n_by_token, self.n_by_token)].clone()}
        caches: dict[str, PromptCache | None] = {"own": None, "none": None}
        for place, answers in enumerate(zip(own.answers, none.answers, strict=True)):
            losses = []
            for name, prompt in zip(caches, answers, strict=True):
                run = CleanRun(runner_of(self.model), prompt, prompt_cache=caches[name])
                caches[name] = run.prompt_cache
                losses.append(run.losses)
            unit[f"gains.{place}"] = losses[1] - losses[0]
        return unit

    def views(self, run: Run) -> tuple[ExampleView, ...]:
        """What the page shows of each."""
        inputs = describe_inputs(self.model, self.users, list(self.by_key.values()), self.prompt_config)
        run.open(lambda: {"call": "views", "heads": str(self.heads), "by_token": self.n_by_token, **inputs})
        units = run.units(self, list(self.by_key), "attention")
        views = []
        for key, unit in units.made.items():
            example = self.by_key[key]
            prompt = build_prompt(self.model, example, config=self.prompt_config)
            pieces = tuple(self.model.tokenizer.decode([token]) for token in prompt.tokens.tolist())
            heads = tuple(self.heads)
            answers = tuple(
                Answer(
                    tuple(self.model.tokenizer.decode([token]) for token in one.response_tokens.tolist()),
                    tuple(unit[f"gains.{place}"].tolist()),
                )
                for place, one in enumerate(prompt.answers)
            )
            views.append(
                ExampleView(
                    example.user_id,
                    example.id,
                    pieces,
                    prompt.spans,
                    heads,
                    unit["attention"],
                    answers,
                    prompt.items,
                    unit["by_token"],
                )
            )
        return tuple(views)
