"""What methods know of a user besides the documents in the prompt: vectors, an adapter and a description."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from dps_lens.adapters.tuning import UserLora, tune_lora
from dps_lens.data import Example, Note, PromptConfig, User, build_prompt
from dps_lens.data.examples import key_of
from dps_lens.evaluation.methods import Kind
from dps_lens.heads import HeadSet
from dps_lens.literals import VectorAgainst
from dps_lens.model import HookedModel
from dps_lens.steering import HeadVector, SteeringVector, generate
from dps_lens.vectors.heads import HeadDifferences
from dps_lens.vectors.steerx import NothingDrivenError, steerx_vectors
from dps_lens.vectors.style import style_differences

_ASK = "Describe in two sentences what this user writes about and in which style."
_NOTE = "About the user who asks: {description}\nAnswer as this user would write."
_DESCRIPTION_TOKENS = 64

Part: TypeAlias = dict[str, Tensor]


class Artifacts:
    """Made of discovery examples, in parts with keys of their own, when they are first asked for.

    Args:
        model: a hooked model.
        users: by their ids.
        prompt_config: how prompts are built.
        newest: the newest so many discovery examples make a vector or an adapter; None takes all.

    Attributes:
        made: the parts that are there.
    """

    def __init__(
        self,
        model: HookedModel,
        users: Sequence[User],
        prompt_config: PromptConfig,
        *,
        newest: int | None = None,
    ) -> None:
        self.model, self.prompt_config, self.newest = model, prompt_config, newest
        self._users = {user.id: user for user in users}
        # One user alone has no other, and a vector all the same.
        against: VectorAgainst = "other_user" if len(self._users) > 1 else "no_profile"
        self._heads = HeadDifferences(model, list(users), against=against, prompt_config=prompt_config)
        self.made: dict[str, Part] = {}

    def parts(self, kind: Kind, user_id: str, leave_out: int = 0) -> dict[str, Callable[[], Part]]:
        """The parts of a kind, without the newest `leave_out` discovery examples, and how each is made."""
        if kind == "description":
            return {key_of("description", user_id): partial(self._describe, self._users[user_id])}
        examples = self._examples(user_id, leave_out)
        if kind == "style":
            return {key_of("style", user_id, one.id): partial(self._difference, one) for one in examples}
        if kind == "heads":
            # What stands in an example's profile depends on what is left out.
            each = {key_of("heads", user_id, one.id, str(leave_out)): one for one in examples}
            return {key: partial(self._head_difference, one) for key, one in each.items()}
        make = self._driven if kind == "steerx" else self._tuned
        return {key_of(kind, user_id, examples[0].id, examples[-1].id): partial(make, examples)}

    def vector(self, kind: Kind, user_id: str, layer: int, leave_out: int = 0) -> SteeringVector:
        """The `style` or `steerx` vector of a user without the newest `leave_out` discovery examples.

        A user without preference-driven tokens has a `steerx` vector of zeros.
        """
        parts = self._whole(kind, user_id, leave_out)
        return SteeringVector(torch.stack([part["vector"] for part in parts]).mean(0)[layer], layer, kind)

    def head_vector(self, user_id: str, heads: HeadSet, leave_out: int = 0) -> HeadVector:
        """The user's vector of heads, a difference of means, without the newest `leave_out` discovery examples."""
        parts = self._whole("heads", user_id, leave_out)
        mean = torch.stack([part["vector"] for part in parts]).mean(0)
        cfg = self.model.cfg
        shaped = HeadSet(heads, heads.label, (cfg.n_layers, cfg.n_heads))
        return HeadVector(torch.stack([mean[layer, head] for layer, head in heads]), shaped, user_id)

    def adapter(self, user_id: str, leave_out: int = 0) -> UserLora:
        """The user's LoRA, trained without the newest `leave_out` discovery examples."""
        return UserLora(self._whole("lora", user_id, leave_out)[0])

    def note(self, user_id: str) -> Note:
        """The model's own description of a user, as an instruction."""
        tokens = self._whole("description", user_id)[0]["tokens"]
        text = self.model.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        return Note(_NOTE.format(description=text))

    def _whole(self, kind: Kind, user_id: str, leave_out: int = 0) -> list[Part]:
        parts = self.parts(kind, user_id, leave_out)
        for key, make in parts.items():
            if key not in self.made:
                self.made[key] = make()
        return [self.made[key] for key in parts]

    def _examples(self, user_id: str, leave_out: int) -> tuple[Example, ...]:
        examples = self._users[user_id].discovery_examples()
        kept, left = examples[: len(examples) - leave_out], {one.id for one in examples[len(examples) - leave_out :]}
        kept = kept[-self.newest :] if self.newest else kept
        # In an undated history, an example's profile holds what is newer, too.
        return tuple(replace(one, profile=tuple(d for d in one.profile if d.id not in left)) for one in kept)

    def _difference(self, example: Example) -> Part:
        return {"vector": style_differences(self.model, [example], prompt_config=self.prompt_config)[0]}

    def _head_difference(self, example: Example) -> Part:
        return {"vector": self._heads.of(example)}

    def _driven(self, examples: Sequence[Example]) -> Part:
        try:
            return {"vector": steerx_vectors(self.model, examples, prompt_config=self.prompt_config).values}
        except NothingDrivenError:
            return {"vector": torch.zeros(self.model.cfg.n_layers, self.model.cfg.d_model)}

    def _tuned(self, examples: Sequence[Example]) -> Part:
        return dict(tune_lora(self.model, examples, prompt_config=self.prompt_config).factors)

    def _describe(self, user: User) -> Part:
        asked = Example(f"{user.id}/description", user.id, user.task, _ASK, "", user.discovery_pool)
        config = replace(self.prompt_config, retrieval="recency", task_tokens=None)
        prompt = build_prompt(self.model, asked, config=config, response=False)
        written = generate(self.model, prompt, rule="greedy", max_new_tokens=_DESCRIPTION_TOKENS)
        return {"tokens": written.tokens[0]}
