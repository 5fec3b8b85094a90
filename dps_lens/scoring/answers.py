"""The clean runs of an example's answers, and what ablations change of what an objective makes of them."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from dps_lens.data import Prompt
from dps_lens.errors import PromptError, ScoreError
from dps_lens.intervene import Patch
from dps_lens.model import Runner
from dps_lens.scoring.clean_run import CleanRun
from dps_lens.scoring.objectives import AnswersObjective, Objective, ObjectiveLike, find_objective


class AnswersRun:
    """The unablated runs of every answer to one prompt, which they share, and what ablations change of an objective.

    To score heads it is what `CleanRun` is, with one number an example where that has one a position.

    Args:
        runs: of the answers, the user's own first.
        objective: what is measured.

    Attributes:
        losses: `Float64[Tensor, "1"]`, the objective.
        value: the same.
        nll: of the user's own answer, nats per token.
    """

    def __init__(self, runs: Sequence[CleanRun], objective: AnswersObjective) -> None:
        self.runs, self.objective = tuple(runs), objective
        self.losses = self._put_together(torch.tensor([run.value], dtype=torch.float64) for run in runs)
        self.value = float(self.losses)
        own = runs[0]
        self.nll, self.runner, self.prompt, self.positions = own.nll, own.runner, own.prompt, own.positions
        self.ablation, self.idle = own.ablation, own.idle

    @property
    def batch_size(self) -> int:
        """Rows of a batch that every answer allows."""
        return min(run.batch_size for run in self.runs)

    def ablated(self, masks: Bool[Tensor, "row layer head"]) -> Float64[Tensor, " row"]:
        """The objective with the heads of each row ablated."""
        return self._put_together(run.ablated(masks) for run in self.runs)

    def ablated_losses(self, masks: Bool[Tensor, "row layer head"]) -> Float64[Tensor, "row 1"]:
        """The objective with the heads of each row ablated; a row without heads is clean."""
        return self.ablated(masks)[:, None]

    def gated(self, gates: Float[Tensor, "row layer head"]) -> Float[Tensor, " row"]:
        """The objective with the heads of each row let through by its gates, as `CleanRun.gated`."""
        return self._put_together(run.gated(gates) for run in self.runs)

    def patched_from(self, source: "AnswersRun", patch: Patch) -> "AnswersRun":
        """The same run, to be patched with the z of another one of the same answers."""
        return self.each(source, lambda own, other: own.patched_from(other, patch))

    def each(self, source: "AnswersRun", make: Callable[[CleanRun, CleanRun], CleanRun]) -> "AnswersRun":
        """The same run, with what is made of each answer's run and of the other's."""
        pairs = zip(self.runs, source.runs, strict=True)
        return AnswersRun([make(own, other) for own, other in pairs], self.objective)

    def slopes(self) -> Float64[Tensor, " answer"]:
        """How the objective changes with the mean NLL of each answer, where nothing is ablated."""
        means = torch.tensor([run.value for run in self.runs], dtype=torch.float64, requires_grad=True)
        with torch.inference_mode(False), torch.enable_grad():
            value = self._put_together(means[:, None].unbind())
            (slopes,) = torch.autograd.grad(value.sum(), means)
        return slopes

    def _put_together(self, means: Iterable[Tensor]) -> Tensor:
        return self.objective.of_means(list(means), [len(run.targets) for run in self.runs])


ExampleRun: TypeAlias = CleanRun | AnswersRun
"""What the unablated model does with one example, to be ablated."""


def example_run(
    runner: Runner, prompt: Prompt, *, objective: ObjectiveLike | None = None, **options: object
) -> ExampleRun:
    """The clean run of a prompt, or of all its answers where the objective compares them.

    Args:
        runner: of the model.
        prompt: with its response.
        objective: what is measured.
        options: of `CleanRun`.

    Raises:
        ScoreError: the objective compares answers, and the example has one only.
    """
    objective = find_objective(objective)
    if not isinstance(objective, AnswersObjective):
        return CleanRun(runner, prompt, objective=objective, **options)  # type: ignore[arg-type]
    runs: list[CleanRun] = []
    for answer in answers_of(prompt, objective):
        if len(answer.tokens) > runner.cfg.n_ctx:
            raise PromptError(
                f"example {prompt.example_id!r} takes {len(answer.tokens)} tokens with one of its rejected answers, "
                f"the model's context is {runner.cfg.n_ctx}; lower profile_tokens, task_tokens or response_tokens in "
                "PromptConfig"
            )
        shared = runs[0].prompt_cache if runs else None
        runs.append(CleanRun(runner, answer, prompt_cache=shared, **options))  # type: ignore[arg-type]
    return AnswersRun(runs, objective)


def answers_of(prompt: Prompt, objective: Objective) -> list[Prompt]:
    """The answers that an objective compares, the user's own first.

    Raises:
        ScoreError: there is one only.
        PromptError: an answer is empty, or two of them are the same tokens.
    """
    if not prompt.rejected:
        raise ScoreError(
            f"example {prompt.example_id!r}: the objective {objective.name!r} compares answers, and this one has no "
            "rejected answer; load pairs or choices, or give each text one of another user's: make_pairs(users), "
            "--pairs any"
        )
    found: list[list[int]] = []
    for answer in prompt.answers:
        tokens = answer.response_tokens.tolist()
        if not tokens or tokens in found:
            why = "are the same for response_tokens" if tokens else "hold one without a token"
            raise PromptError(
                f"example {prompt.example_id!r}: its answers {why}, so that they cannot be compared; raise "
                "response_tokens in PromptConfig, or leave the example out"
            )
        found.append(tokens)
    return prompt.answers


def nll_run(run: ExampleRun) -> CleanRun:
    """The run of the user's own answer alone."""
    return run.runs[0] if isinstance(run, AnswersRun) else run
