"""How an answer is steered."""

from dataclasses import dataclass, field

from dps_lens.data import Document
from dps_lens.errors import HeadError, SteeringError
from dps_lens.heads import HeadSet
from dps_lens.model import HookedModel
from dps_lens.steering import DecodeConfig
from dps_lens.steering.plan import check_strengths
from dps_lens.steering.rules import find_rule
from dps_lens.steering.vector import Vector


@dataclass(frozen=True)
class Steering:
    """How an answer is steered, whole.

    Attributes:
        rule: `"greedy"` where nothing is steered: the plain model.
        heads: of the rule.
        vector: of the rule.
        gamma: its strength.
        alpha: its second strength.
        max_kl: cap on KL(steered ‖ full).
        target_kl: what it is made.
        history: documents that a chat shows.
        task: how they read.
        negative_prompt: of a completion.
    """

    rule: str = "greedy"
    heads: HeadSet = field(default_factory=HeadSet)
    vector: Vector | None = None
    gamma: float = 1.0
    alpha: float = 0.5
    max_kl: float | None = None
    target_kl: float | None = None
    history: tuple[Document, ...] = ()
    task: str = "questions"
    negative_prompt: str | None = None

    def check(self, whose: str, model: HookedModel) -> None:
        """Refuse what no answer of a model could be steered by.

        Raises:
            SteeringError: the strengths are none of the rule, or it lacks its heads or vector, or these are not of this
                model; says whose it is.
        """
        rule = find_rule(self.rule)
        config = DecodeConfig(max_kl=self.max_kl, target_kl=self.target_kl)
        check_strengths(rule, config, [self.gamma], [self.alpha])
        try:
            self.heads.mask(model.cfg)
        except HeadError as error:
            raise SteeringError(f"{whose}: {error}") from error
        if rule.needs_heads and not len(self.heads):
            raise SteeringError(f"{whose} names no heads, which rule {self.rule!r} needs")
        if rule.needs_vectors and self.vector is None:
            raise SteeringError(f"{whose} has no vector, which rule {self.rule!r} adds")
        if self.vector is not None:
            self.vector.check(whose, model)
