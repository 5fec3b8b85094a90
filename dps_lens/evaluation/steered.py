"""One example under every rule, set of heads and strength, teacher-forced: the units of `steering_sweep`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from dps_lens.data import Example, Prompt
from dps_lens.data.examples import choosing_examples, held_out_examples, unit_key
from dps_lens.digests import tensor_digest
from dps_lens.errors import SteeringError
from dps_lens.evaluation.forced import Steered, Weights, masking
from dps_lens.evaluation.sweep import random_of
from dps_lens.heads import Head
from dps_lens.model.losses import token_losses
from dps_lens.scores import HeadScores
from dps_lens.scoring import NLL, AnswersObjective, answers_of
from dps_lens.selection import random_sets
from dps_lens.steering.layout import check_vector
from dps_lens.steering.rules import Rule, check_patch
from dps_lens.steering.terms import kl_divergence
from dps_lens.steering.vector import Vector
from dps_lens.validation.work import HeldOutWork
from dps_lens.vectors.result import HeadVectors


class _Answer(NamedTuple):
    """What is measured of one answer.

    Attributes:
        nll: `Float64[Tensor, ""]`, of the full model.
        steered: label → `Float64[Tensor, "set strength 2"]`, NLL and KL under steering.
    """

    nll: Tensor
    steered: dict[str, Tensor]


@dataclass
class SweepWork(HeldOutWork):
    """The run of `steering_sweep`."""

    uses: ClassVar[tuple[str, ...]] = ("positions", "prompt_config")

    rules: Mapping[str, Rule] = field(default_factory=dict)
    vectors: Mapping[str, Mapping[str, Vector]] = field(default_factory=dict)
    strengths: tuple[float, ...] = ()

    @cached_property
    def examples(self) -> list[Example]:
        """Evaluation examples, or those that choose, user by user."""
        if self.config.on == "discovery":
            return choosing_examples(self.call, self.users, "history", self.max_examples)
        return held_out_examples(self.call, self.users, self.max_examples)

    def check_families(self) -> None:
        if self.config.on == "evaluation":
            super().check_families()
        elif self.select == "user" or (isinstance(self.select, Mapping) and "user" in self.select.values()):
            raise SteeringError(
                f"{self.call}: on='discovery' tests users with heads that others chose; select='user' chose on these "
                "examples"
            )

    def vector(self, name: str, example: Example) -> Vector:
        """The vector of an example's user, which the example was no part of."""
        vectors, user = self.vectors[name], example.user_id
        if self.config.on == "discovery" and isinstance(vectors, HeadVectors):
            # The text may stand in the profile of another example, from which it would be known.
            apart = [one.id for one in self._choosing[user] if not _holds(one, example) or vectors.generic]
            owned = [one for owner, one in zip(vectors.user_ids, vectors.example_ids, strict=True) if owner == user]
            if not (left := [one for one in owned if one in apart and one != example.id]):
                raise SteeringError(
                    f"{self.call}: the vector of user {user!r} is of no example that is apart from {example.id!r}, on "
                    "which strengths are to be chosen; lower max_examples, make vectors of more examples, or "
                    "against='generic'"
                )
            return vectors.made_of(user, left)
        vector = vectors[user]
        made, about = {*vector.manifest.get("examples", ())}, vector.manifest
        named = example.id in made and about.get("user") == user
        if self.config.on == "discovery" and (unit_key(example) in made or named):
            raise SteeringError(
                f"{self.call}: the vector of user {user!r} was made of example {example.id!r}, on which strengths are "
                "to be chosen; give head_vectors(…), or a vector of other examples"
            )
        return vector

    @cached_property
    def _choosing(self) -> dict[str, list[Example]]:
        return {user.id: list(user.discovery_examples()) for user in self.users}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.config.weighted:
            parted = name in self.rules and masking(self.rules[name]).name == "zero"
            if not isinstance(self.families.get(name), HeadScores) or not parted:
                raise SteeringError(
                    f"steering_sweep: method {name!r} cannot be weighted; it needs scores, and a rule but decore"
                )
        if not isinstance(self.settings.objective, NLL | AnswersObjective):
            raise SteeringError(
                f"steering_sweep: it measures nll, pair or choice, not {self.settings.objective.name!r}"
            )
        for rule in self.rules.values():
            check_patch("steering_sweep", rule.ablating.ablation if rule.ablating else None)
        if self.settings.positions != "response" and any(rule.patched for rule in self.rules.values()):
            raise SteeringError("steering_sweep: heads are patched where the two runs align; use positions='response'")
        for name, vectors in self.vectors.items():
            if self.settings.positions != "response":
                raise SteeringError(
                    "steering_sweep: vectors are added from the last prompt token on; use positions='response'"
                )
            for user in dict.fromkeys(example.user_id for example in self.examples):
                if user not in vectors:
                    raise SteeringError(f"steering_sweep: method {name!r} has no vector of user {user!r}")
                check_vector("steering_sweep", self.model, vectors[user], self.rules[name])
            for example in self.examples:
                self.vector(name, example)

    def fingerprint(self) -> dict[str, Any]:
        more: dict[str, Any] = {
            "on": self.config.on,
            "strengths": list(self.strengths),
            "rules": {name: rule.settings() for name, rule in self.rules.items()},
        }
        if self.config.weighted:
            # Sets are in the fingerprint; here the scores are weights, too.
            scores = {name: self.families[name] for name in sorted(self.config.weighted)}
            more["weighted"] = {
                name: [tensor_digest(one.values), *one.user_ids]
                for name, one in scores.items()
                if isinstance(one, HeadScores)
            }
        if self.vectors:
            more["vectors"] = {
                name: {user: [one.settings(), tensor_digest(one.values)] for user, one in sorted(vectors.items())}
                for name, vectors in self.vectors.items()
            }
        return super().fingerprint() | more

    @torch.inference_mode()
    def make(self, key: str, given: object = None) -> dict[str, Float64[Tensor, "..."]]:
        """One example: `nll`, the objective of the full model, and by method `change.…` and `kl.…`, `[strength]`."""
        example = self.by_key[key]
        needs_negative = any(rule.needs_negative for rule in self.rules.values())
        own = self.answers(self.build(example, "own"))
        none = self.answers(self.build(example, "none")) if needs_negative else [None] * len(own)
        sets = {name: self.sets(key, name) for name in self.rules}
        answers = [self._forced(example, *prompts, sets) for prompts in zip(own, none, strict=True)]
        lengths = [len(prompt.response_tokens) for prompt in own]
        full = self._measured([answer.nll for answer in answers], lengths)
        unit: dict[str, Tensor] = {"nll": full}
        for label in answers[0].steered:
            change = self._measured([answer.steered[label][..., 0] for answer in answers], lengths) - full
            kl = torch.stack([answer.steered[label][..., 1] for answer in answers]).mean(0)
            if not bool(torch.isfinite(change + kl).all()):
                raise SteeringError(
                    f"steering_sweep: example {example.id!r}: logits of {label!r} are NaN or infinite; lower "
                    "the strengths, load the model in float32 or bfloat16, or see check_model(model)"
                )
            unit |= {f"change.{label}": change.mean(0), f"kl.{label}": kl.mean(0)}
        return unit

    def answers(self, prompt: Prompt) -> list[Prompt]:
        """The answers that the objective looks at, as responses to one prompt."""
        return answers_of(prompt, self.settings.objective) if self.compares else [prompt]

    def _measured(self, means: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
        """The objective, from the mean NLL of every answer."""
        objective = self.settings.objective
        return objective.of_means(means, lengths) if isinstance(objective, AnswersObjective) else means[0]

    def _forced(
        self, example: Example, own: Prompt, none: Prompt | None, sets: Mapping[str, Mapping[str, list[Weights]]]
    ) -> "_Answer":
        """One answer under every method, set and strength."""
        steered = Steered(self.model, own, none, self.settings.positions)
        answer = _Answer(token_losses(steered.full, steered.targets).double().mean().cpu(), {})
        for name, rule in self.rules.items():
            vector = self.vector(name, example) if rule.needs_vectors else None
            for label, chosen in sets[name].items():
                measured = []
                for heads in chosen:
                    for strength in self.strengths:
                        given = {term.branch: strength for term in rule.terms}
                        logits = steered.logits(rule, given, heads, vector)
                        loss = token_losses(logits, steered.targets).double().mean().cpu()
                        measured.append(torch.stack([loss, kl_divergence(logits, steered.full).double().mean().cpu()]))
                answer.steered[label] = torch.stack(measured).reshape(len(chosen), len(self.strengths), 2)
        return answer

    def sets(self, key: str, name: str) -> dict[str, list[Weights]]:
        """What runs under a method's name, and its random sets; a rule without heads runs once, with none."""
        if name not in self.families:
            return {name: [{}]}
        if name not in self.ranked[0]:
            return {}  # the family is not defined
        user = self.by_key[key].user_id
        (heads,) = self.ranked[0][name][user]
        draws = self.draws_of(key)
        if not draws and self.n_random:
            # A user with more examples than there are draws.
            draws = [self.places[key] % self.n_random]
        # By layer, so that a random head has the weight of the one that it stands for.
        chosen = sorted(heads)
        scores = self.families[name]
        weights = [1.0] * len(chosen)
        if name in self.config.weighted and isinstance(scores, HeadScores):
            weights = _scored(scores, user, chosen)
        drawn = [sorted(one) for one in random_sets(self.model, heads, draws, self.seed)]
        sets = {name: [chosen]} | ({random_of(name): drawn} if drawn else {})
        return {label: [dict(zip(one, weights, strict=True)) for one in of] for label, of in sets.items()}


def _holds(example: Example, other: Example) -> bool:
    """Whether an example's profile may show what another one asks for."""
    name = other.task.target or other.task.body
    return any(str(document.fields.get(name)) == other.reference for document in example.profile)


def _scored(scores: HeadScores, user: str, heads: Sequence[Head]) -> list[float]:
    """Scores of heads by other users, as shares of the largest; 0 where one is negative."""
    mean = scores.without({user}).mean()
    values = torch.stack([mean[head] for head in heads]).clamp(min=0)
    return (values / values.max().clamp(min=1e-12)).tolist()
