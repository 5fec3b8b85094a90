"""A model's tokenizer, as prompts need it: chat template, character offsets, harmless special tokens."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from dps_lens.errors import PromptError
from dps_lens.model import HookedModel

_ANSWER = "\n\nAnswer:"


def without_special(model: HookedModel, tokens: Int[Tensor, " pos"]) -> Int[Tensor, " _"]:
    """Ids without those of special tokens, such as the ones that end an answer."""
    special = torch.tensor(sorted({*model.tokenizer.all_special_ids}), dtype=tokens.dtype, device=tokens.device)
    return tokens[~torch.isin(tokens, special)]


Offsets: TypeAlias = list[tuple[int, int] | None]
"""Where in the text each token starts and stops; None for a token that stands for no text."""


def span(offsets: Offsets, begin: int, end: int) -> tuple[int, int]:
    """Tokens whose first character lies in `[begin, end)`."""
    inside = [index for index, offset in enumerate(offsets) if offset and begin <= offset[0] < end]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


class PromptTokenizer:
    """What prompt building asks of a model's tokenizer.

    Raises:
        PromptError: the model has no tokenizer, or one without character offsets.
    """

    def __init__(self, model: HookedModel) -> None:
        self.inner = model.tokenizer
        if self.inner is None:
            raise PromptError("build_prompt: the model has no tokenizer; load it with one")
        if not self.inner.is_fast:
            raise PromptError("build_prompt: character offsets need a fast tokenizer; load it with use_fast=True")
        added = (str(token) for token in self.inner.added_tokens_decoder.values() if token.special)
        self.special = [token for token in {*self.inner.all_special_tokens, *added} if len(token) > 1]
        self.chat = bool(getattr(self.inner, "chat_template", None))

    def count(self, text: str) -> int:
        return len(self._plain(text)["input_ids"])

    def cut(self, text: str, tokens: int | None) -> str:
        """The longest beginning of `text` that is at most `tokens` tokens long."""
        if tokens is None:
            return text
        encoded = self._plain(text)
        if len(encoded["input_ids"]) <= tokens:
            return text
        return text[: encoded["offset_mapping"][tokens - 1][1]] if tokens > 0 else ""

    def defuse(self, text: str) -> str:
        """Break up what would read as a special token: a user's text may hold anything."""
        for token in self.special:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def render(self, content: str, turns: Sequence[tuple[str, str]] = ()) -> tuple[str, int]:
        """The prompt as text after earlier turns, and where `content` begins in it."""
        content = content.strip()
        if not self.chat:
            return content + _ANSWER, 0
        roles = ("user", "assistant")
        messages = [{"role": role, "content": said} for turn in turns for role, said in zip(roles, turn, strict=True)]
        messages.append({"role": "user", "content": content})
        text = self.inner.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        offset = text.rfind(content)
        if offset < 0:
            raise PromptError("build_prompt: the tokenizer's chat template changes the text of a message")
        return text, offset

    def encode(self, text: str) -> tuple[list[int], Offsets]:
        """Token ids of a rendered prompt, and where they stand in the text."""
        encoded = self._plain(text)
        ids = list(encoded["input_ids"])
        offsets: Offsets = [(start, stop) if stop > start else None for start, stop in encoded["offset_mapping"]]
        if not self.chat and self._lacks_bos(ids):
            ids, offsets = [self.inner.bos_token_id, *ids], [None, *offsets]
        return ids, offsets

    def plain(self, text: str) -> list[int]:
        """Token ids of a text outside any chat, after the start token where the tokenizer has one."""
        ids = list(self._plain(self.defuse(text))["input_ids"])
        return [self.inner.bos_token_id, *ids] if self._lacks_bos(ids) else ids

    def _lacks_bos(self, ids: list[int]) -> bool:
        bos = self.inner.bos_token_id
        return bos is not None and ids[:1] != [bos]

    def answer(self, reference: str, tokens: int | None) -> list[int]:
        """Ids of the response alone; after plain text it begins with a space."""
        text = self.defuse(reference.strip())
        ids = self._plain(text if self.chat or not text else " " + text)["input_ids"]
        return list(ids[:tokens])

    def _plain(self, text: str) -> Any:
        return self.inner(text, add_special_tokens=False, return_offsets_mapping=True)
