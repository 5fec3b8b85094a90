"""What a score is a change of."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from dps_lens.checks import check_flag
from dps_lens.errors import ScoreError
from dps_lens.extensions import settings_of
from dps_lens.model.losses import token_losses


class Objective(ABC):
    """One number a response position; a head's score is what its ablation adds to their mean.

    Subclass it, give a `name` and `losses`, and pass an object wherever `objective=` is taken.

    Attributes:
        name: as it stands in manifests.
        unit: of a score.
    """

    name: ClassVar[str]

    @property
    def unit(self) -> str:
        return "nats per token"

    def settings(self) -> Any:
        """The name, with the fields where there are any, for a manifest."""
        return settings_of(self.name, self)

    @abstractmethod
    def losses(
        self,
        logits: Float[Tensor, "pos d_vocab"],
        targets: Int[Tensor, " pos"],
        clean: Float[Tensor, "pos d_vocab"],
    ) -> Float[Tensor, " pos"]:
        """One number a position; gradients flow through it where scores are estimated.

        Args:
            logits: under the ablation, or of the clean run itself.
            targets: the response's tokens.
            clean: logits of the clean run.
        """


class NLL(Objective):
    """−log p of the response's tokens."""

    name: ClassVar[str] = "nll"

    def losses(
        self,
        logits: Float[Tensor, "pos d_vocab"],
        targets: Int[Tensor, " pos"],
        clean: Float[Tensor, "pos d_vocab"],
    ) -> Float[Tensor, " pos"]:
        return token_losses(logits, targets)


@dataclass(frozen=True)
class AnswersObjective(Objective):
    """One number an example, from the NLLs of all its answers: of the user's own, and of the rejected ones.

    Attributes:
        per_token: an answer's NLL is its mean over tokens, so that long and short answers are alike; else their sum,
            which is −log p of the whole answer and favours short ones.
    """

    per_token: bool = True

    @property
    def unit(self) -> str:
        return "nats per token" if self.per_token else "nats"

    def __post_init__(self) -> None:
        check_flag(ScoreError, f"{type(self).__name__}: per_token", self.per_token)

    def settings(self) -> Any:
        found = super().settings()
        return self.name if found == {"name": self.name, "per_token": True} else found

    def losses(
        self,
        logits: Float[Tensor, "pos d_vocab"],
        targets: Int[Tensor, " pos"],
        clean: Float[Tensor, "pos d_vocab"],
    ) -> Float[Tensor, " pos"]:
        """Refuses: one answer has no such objective.

        Raises:
            ScoreError: always.
        """
        raise ScoreError(f"objective {self.name!r} compares the answers of an example; `example_run` runs them all")

    def of_means(self, means: Sequence[Tensor], lengths: Sequence[int]) -> Float[Tensor, "*rows"]:
        """The objective of each row, from the mean NLL of every answer in that row.

        Args:
            means: one `Float[Tensor, "*rows"]` an answer, the user's own first.
            lengths: tokens of each answer.
        """
        nlls = [mean if self.per_token else mean * length for mean, length in zip(means, lengths, strict=True)]
        return self.combined(torch.stack(nlls, dim=-1))

    @abstractmethod
    def combined(self, nlls: Float[Tensor, "*rows answer"]) -> Float[Tensor, "*rows"]:
        """The objective, from the NLLs of the answers, the user's own first; lower is better."""


@dataclass(frozen=True)
class Pair(AnswersObjective):
    """`NLL(own) − NLL(rejected)`, the log-odds by which the model prefers what the user rejected.

    Of several rejected answers their mean NLL counts. What any text needs changes both NLLs alike and cancels. Minus
    this is the margin, which with `per_token=False` is the difference of log-probabilities that direct preference
    optimisation learns from (arXiv 2305.18290).
    """

    name: ClassVar[str] = "pair"

    def combined(self, nlls: Float[Tensor, "*rows answer"]) -> Float[Tensor, "*rows"]:
        return nlls[..., 0] - nlls[..., 1:].mean(-1)


@dataclass(frozen=True)
class Choice(AnswersObjective):
    """−log of the probability that the model gives to the user's answer among the answers of the example.

    The probability is a softmax over the answers' log-probabilities, or over their means per token.
    """

    name: ClassVar[str] = "choice"

    @property
    def unit(self) -> str:
        return "nats"

    def combined(self, nlls: Float[Tensor, "*rows answer"]) -> Float[Tensor, "*rows"]:
        return nlls[..., 0] + (-nlls).logsumexp(-1)


OBJECTIVES: dict[str, type[Objective]] = {one.name: one for one in (NLL, Pair, Choice)}

ObjectiveLike: TypeAlias = Objective | str


def find_objective(asked: ObjectiveLike | None) -> Objective:
    """An objective by name, or the object itself; the NLL where none is asked for.

    Raises:
        ScoreError: the name is unknown.
    """
    if isinstance(asked, Objective):
        return asked
    if asked is not None and asked not in OBJECTIVES:
        raise ScoreError(
            f"objective {asked!r} is unknown; use one of {', '.join(OBJECTIVES)}, or an Objective of your own"
        )
    return OBJECTIVES[asked or NLL.name]()


def objective_of(settings: Any) -> Objective | None:
    """The objective that stands in a manifest; None where it is somebody's own."""
    name, given = (settings.get("name"), {**settings}) if isinstance(settings, dict) else (settings, {})
    given.pop("name", None)
    return OBJECTIVES[name](**given) if name in OBJECTIVES else None


def measured_name(manifest: Mapping[str, Any]) -> str:
    """What a result measured, for people: NLL, or the objective by its name."""
    objective = manifest.get("objective", NLL.name)
    name = objective["name"] if isinstance(objective, dict) else str(objective)
    return "NLL" if name == NLL.name else name


def losses_of_rows(
    objective: Objective,
    logits: Float[Tensor, "row pos d_vocab"],
    targets: Int[Tensor, " pos"],
    clean: Float[Tensor, "pos d_vocab"],
) -> Float64[Tensor, "row pos"]:
    """An objective row by row: over a large vocabulary the temporaries of a whole batch would be fresh memory."""
    return torch.stack([objective.losses(row, targets, clean) for row in logits]).cpu().double()
