"""Logits of a user's own text, token by token: of the model, of the branches that rules contrast, and steered."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.data import Prompt
from dps_lens.errors import ScoreError
from dps_lens.heads import Head, HeadSet
from dps_lens.intervene import (
    Ablation,
    Edit,
    Patch,
    Scale,
    Zero,
    attention_for,
    everywhere,
    find_ablation,
    recording_z,
    window,
)
from dps_lens.literals import Positions
from dps_lens.model import HookedModel, Hooks, Residuals, Runner, runner_of
from dps_lens.model.positions import check_switch
from dps_lens.steering.decoder import adding
from dps_lens.steering.layout import layers_to_contrast
from dps_lens.steering.rules import Rule
from dps_lens.steering.terms import Branch, combine, farthest_early
from dps_lens.steering.vector import Vector

Weights: TypeAlias = Mapping[Head, float]
"""Heads and how much of the edit each gets, from 0 to 1."""

Added: TypeAlias = Mapping[str, Float[Tensor, "1 ..."]]
"""By hook, what is added to every position there."""


class Forced:
    """Logits of one prompt's response, also with heads edited or a vector added."""

    def __init__(self, runner: Runner, prompt: Prompt, positions: Positions = "response") -> None:
        self.runner = runner
        start, stop = prompt.spans["response"]
        if stop <= start:
            raise ScoreError(f"example {prompt.example_id!r}: the prompt has no response to score")
        tokens = prompt.tokens[None].to(runner.device)
        self.targets = tokens[0, start:stop]
        # Edits that begin at the last prompt token share what is before it.
        shared = start - 1 if positions == "response" else 0
        check_switch(runner.model, f"example {prompt.example_id!r}", shared or stop - 1, stop - 1)
        self.tokens = tokens[:, shared : stop - 1]
        self.where = everywhere if positions == "response" else window(prompt, positions)
        with attention_for(runner.model, Zero()):
            self.cache = runner.prefill(tokens[:, :shared]) if shared else None

    def logits(
        self, edit: Edit | Scale | None = None, record: Residuals | None = None, added: Added | None = None
    ) -> Float[Tensor, "pos d_vocab"]:
        """Of the full model, or under an edit and with what is added behind it; `record` as in `Runner.logits`."""
        model, keep = self.runner.model, len(self.targets)
        ablation = edit.ablation if isinstance(edit, Edit) else Zero()
        with (
            attention_for(model, ablation),
            edit.on(model) if edit else nullcontext(),
            Hooks(model, adding(added or {})),
        ):
            return self.runner.logits(self.tokens, prompt=self.cache, keep=keep, record=record)[0].float()

    def z(self) -> Float[Tensor, "layer pos head d_head"]:
        """z of every head in the full model's run, at the positions that `logits` runs."""
        with attention_for(self.runner.model, Zero()), recording_z(self.runner.model) as recorded:
            self.runner.logits(self.tokens, prompt=self.cache, keep=1)
        return torch.stack([recorded[layer][0] for layer in sorted(recorded)])

    def ablated(self, ablation: Ablation, heads: Weights, added: Added | None = None) -> Float[Tensor, "pos d_vocab"]:
        """Without heads, as a rule leaves them out; `Patch` holds the z of the other run."""
        if isinstance(ablation, Zero):
            return self.scaled(heads, -1.0, added)
        masks = HeadSet(heads).mask(self.runner.cfg)[None]
        values = ablation.z if isinstance(ablation, Patch) else ablation.standalone("steering_sweep")
        return self.logits(Edit(masks, ablation, self.where, values), added=added)

    def scaled(self, heads: Weights, strength: float, added: Added | None = None) -> Float[Tensor, "pos d_vocab"]:
        """With the z of each head multiplied by 1 + weight · strength."""
        factors = torch.ones(self.runner.cfg.n_layers, self.runner.cfg.n_heads)
        for head, weight in heads.items():
            factors[head] += weight * strength
        return self.logits(Scale(factors[None], self.where), added=added)

    def added(self, vector: Vector, strength: float) -> Added:
        """What strength times a vector adds, from the last prompt token on."""
        return {name: values[None].to(self.runner.device) for name, values in vector.additions(strength).items()}

    def early(
        self, full: Float[Tensor, "pos d_vocab"], layers: Sequence[int], added: Added | None = None
    ) -> Float[Tensor, "pos d_vocab"]:
        """Log-probabilities read off the layer, of these, that DoLa contrasts `full` with at each position."""
        record: Residuals = dict.fromkeys(layers)
        self.logits(record=record, added=added)
        kept = torch.cat([record[layer][:, -len(full) :] for layer in layers])
        early = self.runner.resume({self.runner.cfg.n_layers: kept}, self.tokens[:, -len(full) :]).float()
        return farthest_early(full, early)


class Steered:
    """Logits of one prompt's response under rules; what does not depend on the strength is computed once.

    Args:
        model: a hooked model.
        own: the prompt that is steered, with its response.
        none: the negative prompt with the same response, for rules that need one.
        positions: where heads are edited.

    Attributes:
        full: `Float[Tensor, "pos d_vocab"]`, of the model itself.
        targets: `Int[Tensor, "pos"]`, the response.
    """

    def __init__(
        self, model: HookedModel, own: Prompt, none: Prompt | None = None, positions: Positions = "response"
    ) -> None:
        self._model, self._none = model, none
        self._forced = Forced(runner_of(model), own, positions)
        self.full, self.targets = self._forced.logits(), self._forced.targets
        self._ablated: tuple[Rule, Weights, Tensor] | None = None

    def logits(
        self,
        rule: Rule,
        given: Mapping[Branch, float],
        heads: Weights | None = None,
        vector: Vector | None = None,
    ) -> Float[Tensor, "pos d_vocab"]:
        """Under a rule.

        Args:
            rule: how the branches are put together; its `min_p` is left out, as a text would have no likelihood.
            given: strengths of its terms by branch, or caps of those that every step finds.
            heads: of the rule.
            vector: of the rule.
        """
        base, heads = self.full, heads or {}
        others: dict[Branch, Tensor] = {}
        added: Added | None = None
        if rule.has("scaled"):
            base = others["scaled"] = self._forced.scaled(heads, given["scaled"])
        elif rule.in_place:
            assert vector is not None
            added = self._forced.added(vector, given[rule.in_place.branch])
            base = others[rule.in_place.branch] = self._forced.logits(added=added)
        if rule.has("negative"):
            others["negative"] = self._negative
        if rule.ablating:
            others["ablated"] = self._without(rule, heads, added)
        if rule.has("early"):
            others["early"] = self._early if added is None else self._early_of(base, added)
        return combine(rule.terms, base, others, given)

    def _without(self, rule: Rule, heads: Weights, added: Added | None) -> Tensor:
        ablation = self._patch if rule.patched else masking(rule)
        if added is not None:
            return self._forced.ablated(ablation, heads, added)
        # One at a time: the logits of fifty random sets would fill the memory.
        if self._ablated is None or self._ablated[0] is not rule or self._ablated[1] != heads:
            self._ablated = (rule, heads, self._forced.ablated(ablation, heads))
        return self._ablated[2]

    @cached_property
    def _other(self) -> Forced:
        assert self._none is not None
        return Forced(self._forced.runner, self._none)

    @cached_property
    def _patch(self) -> Patch:
        return Patch(z=self._other.z())

    @cached_property
    def _negative(self) -> Tensor:
        return self._other.logits()

    @cached_property
    def _early(self) -> Tensor:
        return self._early_of(self.full)

    def _early_of(self, base: Tensor, added: Added | None = None) -> Tensor:
        return self._forced.early(base, layers_to_contrast(self._model), added)


def masking(rule: Rule) -> Ablation:
    """What the masked branch of a rule does."""
    term = rule.ablating
    return find_ablation(term.ablation if term is not None and term.ablation is not None else "zero")
