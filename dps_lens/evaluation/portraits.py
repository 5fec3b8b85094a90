"""What methods know of a user besides the documents in the prompt: vectors, an adapter and a description."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.data import Example, Note, PromptConfig, User, build_prompt
from dps_lens.model import HookedModel
from dps_lens.runs import RunFolder, kept
from dps_lens.steering import SteeringVector, generate
from dps_lens.steering.steerx import NothingDrivenError, steerx_vectors
from dps_lens.steering.tuning import UserLora, tune_lora
from dps_lens.steering.vector import style_differences

_ASK = "Describe in two sentences what this user writes about and in which style."
_NOTE = "About the user who asks: {description}\nAnswer as this user would write."
_DESCRIPTION_TOKENS = 64


class Portraits:
    """Made of discovery examples when they are first asked for, and kept in a run folder.

    Args:
        model: a hooked model.
        users: by their ids.
        prompt: how prompts are built.
        newest: the newest so many discovery examples make a vector or an adapter; None takes all.
        folder: where they are kept, if anywhere.
    """

    def __init__(
        self,
        model: HookedModel,
        users: Sequence[User],
        prompt: PromptConfig,
        *,
        newest: int | None = None,
        folder: RunFolder | None = None,
    ) -> None:
        self.model, self.prompt, self.newest, self.folder = model, prompt, newest, folder
        self._users = {user.id: user for user in users}
        self._made: dict[str, dict[str, Tensor]] = {}

    def vector(self, kind: str, user_id: str, layer: int, leave_out: int = 0) -> SteeringVector:
        """The `style` or `steerx` vector of a user without the newest `leave_out` discovery examples.

        A user without preference-driven tokens has a `steerx` vector of zeros.
        """
        make = self._style if kind == "style" else self._steerx
        return SteeringVector(make(user_id, self._examples(user_id, leave_out))[layer], layer, kind)

    def adapter(self, user_id: str, leave_out: int = 0) -> UserLora:
        """The user's LoRA, trained without the newest `leave_out` discovery examples."""
        examples = self._examples(user_id, leave_out)

        def make() -> dict[str, Tensor]:
            return dict(tune_lora(self.model, examples, prompt=self.prompt).factors)

        return UserLora(self._once(f"lora|{user_id}|{examples[0].id}|{examples[-1].id}", make))

    def note(self, user_id: str) -> Note:
        """The model's own description of a user, as an instruction."""
        found = self._once(f"description|{user_id}", partial(self._describe, self._users[user_id]))
        text = self.model.tokenizer.decode(found["tokens"], skip_special_tokens=True).strip()
        return Note(_NOTE.format(description=text))

    def _examples(self, user_id: str, leave_out: int) -> tuple[Example, ...]:
        examples = self._users[user_id].discovery_examples()
        kept, left = examples[: len(examples) - leave_out], {one.id for one in examples[len(examples) - leave_out :]}
        kept = kept[-self.newest :] if self.newest else kept
        # In an undated history, an example's profile holds what is newer, too.
        return tuple(replace(one, profile=tuple(d for d in one.profile if d.id not in left)) for one in kept)

    def _once(self, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if key not in self._made:
            self._made[key] = kept(self.folder, key, make)
        return self._made[key]

    def _style(self, user_id: str, examples: Sequence[Example]) -> Float[Tensor, "layer d_model"]:
        def difference(example: Example) -> dict[str, Tensor]:
            return {"vector": style_differences(self.model, [example], prompt=self.prompt)[0]}

        found = [self._once(f"style|{user_id}|{one.id}", partial(difference, one))["vector"] for one in examples]
        return torch.stack(found).mean(0)

    def _steerx(self, user_id: str, examples: Sequence[Example]) -> Float[Tensor, "layer d_model"]:
        def make() -> dict[str, Tensor]:
            try:
                return {"vector": steerx_vectors(self.model, examples, prompt=self.prompt).values}
            except NothingDrivenError:
                return {"vector": torch.zeros(self.model.cfg.n_layers, self.model.cfg.d_model)}

        return self._once(f"steerx|{user_id}|{examples[0].id}|{examples[-1].id}", make)["vector"]

    def _describe(self, user: User) -> dict[str, Tensor]:
        asked = Example(f"{user.id}/description", user.id, user.task, _ASK, "", user.discovery_pool)
        config = replace(self.prompt, retrieval="recency", task_tokens=None)
        prompt = build_prompt(self.model, asked, config=config, response=False)
        written: Any = generate(self.model, prompt, heads={}, gamma=0.0, max_new_tokens=_DESCRIPTION_TOKENS)
        return {"tokens": written.tokens[0]}
