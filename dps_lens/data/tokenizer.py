"""A model's tokenizer, as prompts need it: chat template, character offsets, harmless control tokens."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias
from warnings import warn

import regex
import torch
from jaxtyping import Int
from torch import Tensor

from dps_lens.data.templates import ChatTemplate
from dps_lens.errors import PromptError
from dps_lens.literals import ProfileIn
from dps_lens.model import HookedModel

BETWEEN = "\n\n"
_ANSWER = "\n\nAnswer:"
_NOTED = "Thank you. I will keep that in mind."

_GRAPHEME = regex.compile(r"\X")
# Something in brackets, as <think>, [INST], {{user}} or <|im_end|>; not runs of spaces, words or single signs.
_CONTROL = regex.compile(r"\s*(?:<.*\w.*>|\[.*\w.*\]|\{.*\w.*\}|[｜|].*\w.*[｜|]|«.*\w.*»)\s*", regex.DOTALL)


def without_special(model: HookedModel, tokens: Int[Tensor, " pos"]) -> Int[Tensor, " _"]:
    """Ids without those of special tokens, such as the ones that end an answer."""
    special = torch.tensor(sorted({*model.tokenizer.all_special_ids}), dtype=tokens.dtype, device=tokens.device)
    return tokens[~torch.isin(tokens, special)]


def start_token(tokenizer: Any) -> int | None:
    """The token that opens a text, where the tokenizer has one of its own.

    A bridge gives a tokenizer without one its end token instead; that is not the tokenizer's own.
    """
    lent = tokenizer.bos_token == tokenizer.eos_token and getattr(tokenizer, "init_kwargs", {}).get("bos_token") is None
    return None if lent else tokenizer.bos_token_id


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """Tokens that are no text: special ones, and added ones that stand in brackets, such as `<think>`; by their ids."""
    added = {number: token for number, token in tokenizer.added_tokens_decoder.items()}
    found = {number: str(one) for number, one in added.items() if one.special or _CONTROL.fullmatch(str(one))}
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return {number: token for number, token in (found | special).items() if len(token) > 1}


def end_of_turn_ids(model: HookedModel, chat_template_kwargs: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    """The control tokens that the chat template writes after an assistant's text; none where there is no template."""
    template = ChatTemplate(model.tokenizer, chat_template_kwargs or {})
    after = template.after_answer() if template.there else None
    if not after:
        return ()
    control = control_tokens(model.tokenizer)
    ids = model.tokenizer(after, add_special_tokens=False)["input_ids"]
    return tuple(dict.fromkeys(one for one in ids if one in control))


def end_tokens(model: HookedModel) -> set[int]:
    """Ids that end a text: the tokenizer's, those of the generation config, and the chat template's end of a turn."""
    config = getattr(getattr(model, "original_model", None), "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    every = (*(ends if isinstance(ends, (list, tuple)) else [ends]), model.tokenizer.eos_token_id)
    return {int(token) for token in (*every, *end_of_turn_ids(model)) if token is not None}


def tokenizer_digest(model: HookedModel, chat_template_kwargs: Mapping[str, Any] | None = None) -> str:
    """A digest of everything in the tokenizer that decides a prompt's ids, the same in every process.

    It covers vocabulary, merges and added tokens, special tokens, the chat template, and a fixed conversation as the
    template renders it with these keywords: a template may write today's date. Padding and truncation, which
    a call sets for itself, do not count.

    Args:
        model: whose tokenizer it is.
        chat_template_kwargs: for the chat template.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        return ""
    template = ChatTemplate(tokenizer, chat_template_kwargs or {})
    said = [dict(sorted(tokenizer.special_tokens_map.items())), str(tokenizer.chat_template), template.shown()]
    digest = hashlib.sha256(_written(tokenizer).encode())
    digest.update(json.dumps(said, default=str).encode())
    return digest.hexdigest()[:16]


def _written(tokenizer: Any) -> str:
    """The tokenizer's own file, without the padding and truncation that stand before its added tokens."""
    if not tokenizer.is_fast:
        return json.dumps(sorted(tokenizer.get_vocab().items()))
    return str(tokenizer.backend_tokenizer.to_str().partition('"added_tokens"')[2])


Offsets: TypeAlias = list[tuple[int, int] | None]
"""Where in the text each token starts and stops; None for a token that stands for no text."""


def span(offsets: Offsets, begin: int, end: int) -> tuple[int, int]:
    """Tokens whose first character lies in `[begin, end)`."""
    inside = [index for index, offset in enumerate(offsets) if offset and begin <= offset[0] < end]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


class PromptTokenizer:
    """What prompt building asks of a model's tokenizer.

    Args:
        model: whose tokenizer it is.
        chat_template_kwargs: for the chat template, such as `{"enable_thinking": False}`.

    Raises:
        PromptError: the model has no tokenizer, one without character offsets, or a template that knows nothing of the
            keywords.
    """

    def __init__(self, model: HookedModel, chat_template_kwargs: Mapping[str, Any] | None = None) -> None:
        self.inner = model.tokenizer
        if self.inner is None:
            raise PromptError("build_prompt: the model has no tokenizer; load it with one")
        if not self.inner.is_fast:
            raise PromptError("build_prompt: character offsets need a fast tokenizer; load it with use_fast=True")
        self._control = control_tokens(self.inner)
        longest_first = sorted(map(regex.escape, self._control.values()), key=len, reverse=True)
        self._written = regex.compile("|".join(longest_first)) if longest_first else None
        self._template = ChatTemplate(self.inner, chat_template_kwargs or {})
        self.chat = self._template.there

    def count(self, text: str) -> int:
        return len(self._plain(text)["input_ids"])

    def cut(self, text: str, tokens: int | None) -> str:
        """A beginning of `text` that is at most `tokens` tokens long, and ends between two whole characters."""
        if tokens is None:
            return text
        encoded = self._plain(text)
        if len(encoded["input_ids"]) <= tokens:
            return text
        stop = encoded["offset_mapping"][tokens - 1][1] if tokens > 0 else 0
        ends = [end for one in _GRAPHEME.finditer(text, 0, min(len(text), stop + 1)) if (end := one.end()) <= stop]
        # A character may take several tokens, and a text without its end may be split otherwise.
        while ends and self.count(text[: ends[-1]]) > tokens:
            ends.pop()
        return text[: ends[-1]] if ends else ""

    def defuse(self, text: str) -> str:
        """Break up what would read as a control token: a user's text may hold anything."""
        if self._written is None:
            return text
        while (broken := self._written.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)) != text:
            text = broken
        # A tokenizer may read more than what is written so, such as other cases or widths.
        while inside := self._control_in(text):
            start, stop = inside
            broken = f"{text[: start + 1]} {text[start + 1 :]}"
            again = self._control_in(broken)
            text = broken if again is None or again[0] > start + 1 else text[:start] + text[stop:]
        return text

    def _control_in(self, text: str) -> tuple[int, int] | None:
        """Where the first control token begins and ends, its spaces left out."""
        encoded = self._plain(text)
        for number, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if number in self._control and number != self.inner.unk_token_id and stop > start:
                inside = text[start:stop]
                return start + len(inside) - len(inside.lstrip()), stop
        return None

    def render(self, content: str, turns: Sequence[tuple[str, str]] = ()) -> tuple[str, int]:
        """The prompt as text after earlier turns, and where `content` begins in it."""
        content = content.strip()
        return self._template.ask(content, turns) if self.chat else (content + _ANSWER, 0)

    def converse(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, int]:
        """A conversation as text, up to its next answer, and where the last message's content begins in it.

        Raises:
            PromptError: there is no chat template, or it refuses these messages.
        """
        if not self.chat:
            raise PromptError("the model's tokenizer has no chat template; send a text to be completed")
        return self._template.converse(messages)

    def place(self, profile: str, content: str, where: ProfileIn) -> tuple[str, tuple[int, int], int]:
        """The prompt as text, where the profile begins and ends in it, and where `content` begins.

        Args:
            profile: nothing where none is shown.
            content: the task input.
            where: the profile is put; in the message where the template has no such place.
        """
        if profile and where != "message":
            if found := self._apart(profile, content, where):
                return found
            lacking = f"chat template with a place for {where!r}" if self.chat else "chat template"
            warn(f"build_prompt: the tokenizer has no {lacking}; the profile stands in the message", stacklevel=4)
        before = profile + BETWEEN if profile else ""
        text, begin = self.render(before + content)
        return text, (begin, begin + len(before)), begin + len(before)

    def _apart(self, profile: str, content: str, where: ProfileIn) -> tuple[str, tuple[int, int], int] | None:
        from jinja2 import TemplateError

        if not self.chat:
            return None
        turns = [(profile, _NOTED)] if where == "turn" else []
        try:
            text, asked = self._template.ask(content.strip(), turns, system=profile if where == "system" else "")
        except TemplateError:
            return None
        begin = text.rfind(profile, 0, asked)
        return (text, (begin, begin + len(profile)), asked) if begin >= 0 else None

    def encode(self, text: str) -> tuple[list[int], Offsets]:
        """Token ids of a rendered prompt, and where they stand in the text."""
        encoded = self._plain(text)
        ids = list(encoded["input_ids"])
        offsets: Offsets = [(start, stop) if stop > start else None for start, stop in encoded["offset_mapping"]]
        opening = [] if self.chat else self._opening(ids)
        return [*opening, *ids], [*(None for _ in opening), *offsets]

    def plain(self, text: str) -> list[int]:
        """Token ids of a text outside any chat, after the start token where the tokenizer has one."""
        ids = list(self._plain(self.defuse(text))["input_ids"])
        return [*self._opening(ids), *ids]

    def _opening(self, ids: list[int]) -> list[int]:
        bos = start_token(self.inner)
        return [] if bos is None or ids[:1] == [bos] else [bos]

    def answer(self, reference: str, tokens: int | None) -> list[int]:
        """Ids of the response alone; after plain text it begins with a space, and it ends after a whole character."""
        text = self.defuse(reference.strip())
        encoded = self._plain(text if self.chat or not text else " " + text)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        stop = len(ids) if tokens is None else min(tokens, len(ids))
        while 0 < stop < len(ids) and offsets[stop][0] < offsets[stop - 1][1]:
            stop -= 1
        return list(ids[:stop])

    def _plain(self, text: str) -> Any:
        return self.inner(text, add_special_tokens=False, return_offsets_mapping=True)
