"""Build the prompt that scoring, evaluation and steering share.

A prompt is `profile + task input` in the tokenizer's chat template (plain text when it has none),
followed by the response. The response is tokenised on its own, so that its ids are the same whatever
stands before it. Spans of profile and task are read off the tokenizer's character offsets.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from dps_lens.data.records import Document, Example, User
from dps_lens.data.retrieval import Retrieval, retrieve
from dps_lens.errors import PromptError
from dps_lens.model import HookedModel

_HEADER = "Earlier texts by this user:\n"
_BETWEEN = "\n\n"
_ANSWER = "\n\nAnswer:"


@dataclass(frozen=True)
class PromptConfig:
    """How prompts are built.

    Attributes:
        items: documents shown in a profile, at most.
        profile_tokens: tokens for all of them; split evenly, and what short ones leave goes to the others.
        task_tokens: a longer task input is cut at its end; None keeps it whole.
        response_tokens: a longer reference is cut at its end; None keeps it whole.
        retrieval: `"bm25"`, `"recency"` or `"random"`.
        seed: of random retrieval.
    """

    items: int = 6
    profile_tokens: int = 256
    task_tokens: int | None = 256
    response_tokens: int | None = 128
    retrieval: Retrieval = "bm25"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("items", "profile_tokens", "task_tokens", "response_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PromptError(f"PromptConfig: {name} is {value}; it must be at least 1")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a manifest."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt with its response, as token ids.

    Attributes:
        tokens: `Int[Tensor, "pos"]`, prompt and response.
        spans: `"profile"`, `"task"` and `"response"` as `(start, stop)`; an absent profile is empty.
        text: the prompt as text, without the response.
        condition: `"own"`, `"none"`, or the id of the user whose profile is shown.
        shown: ids of the documents in the profile.
    """

    tokens: Int[Tensor, " pos"]
    spans: dict[str, tuple[int, int]]
    text: str
    condition: str
    example_id: str
    user_id: str
    shown: tuple[str, ...]

    @property
    def prompt_tokens(self) -> Int[Tensor, " pos"]:
        """What the model sees before it answers."""
        return self.tokens[: self.spans["response"][0]]

    @property
    def response_tokens(self) -> Int[Tensor, " pos"]:
        """The user's own answer."""
        return self.tokens[self.spans["response"][0] :]


def build_prompt(
    model: HookedModel,
    example: Example,
    profile: "Literal['own', 'none'] | User" = "own",
    *,
    config: PromptConfig | None = None,
    response: bool = True,
) -> Prompt:
    """Build the prompt of an example.

    Args:
        model: its tokenizer and context length are used.
        example: what is asked, and by whom.
        profile: `"own"`, `"none"`, or another user whose documents are shown instead.
        config: how much is shown; `PromptConfig()` by default.
        response: append the user's own answer.

    Raises:
        PromptError: the prompt does not fit the context, or nothing is left of the response.
    """
    config = config or PromptConfig()
    tokenizer = _Tokenizer(model)
    documents = _documents(example, profile, config)
    own = tokenizer.defuse(tokenizer.cut(example.input.strip(), config.task_tokens)).strip()
    pieces = [tokenizer.defuse(piece) for piece in _snippets(tokenizer, example, documents, config.profile_tokens)]
    header = _HEADER + "\n".join(pieces) + _BETWEEN if pieces else ""
    text, offset = tokenizer.render(header + own)
    ids, starts = tokenizer.encode(text)
    spans = {
        "profile": _span(starts, offset, offset + len(header)) if pieces else (0, 0),
        "task": _span(starts, offset + len(header), offset + len(header) + len(own)),
    }
    answer = tokenizer.answer(example.reference, config.response_tokens) if response else []
    if response and not answer:
        raise PromptError(f"build_prompt: example {example.id!r} has an empty reference")
    if not pieces:
        spans["profile"] = (spans["task"][0], spans["task"][0])
    spans["response"] = (len(ids), len(ids) + len(answer))
    limit = model.cfg.n_ctx
    if len(ids) + len(answer) > limit:
        raise PromptError(
            f"build_prompt: example {example.id!r} takes {len(ids) + len(answer)} tokens, the model's context is "
            f"{limit}; lower profile_tokens, task_tokens or response_tokens in PromptConfig"
        )
    condition = profile.id if isinstance(profile, User) else profile
    shown = tuple(document.id for document in documents[: len(pieces)])
    return Prompt(torch.tensor(ids + answer), spans, text, condition, example.id, example.user_id, shown)


def chat_prompt(model: HookedModel, text: str) -> Prompt:
    """A bare text as a prompt: a user's message where the tokenizer has a chat template, else as it is."""
    tokenizer = _Tokenizer(model)
    message = tokenizer.defuse(text)
    rendered, offset = tokenizer.render(message) if tokenizer.chat else (message, 0)
    ids, starts = tokenizer.encode(rendered)
    spans = {"task": _span(starts, offset, offset + len(message)), "response": (len(ids), len(ids))}
    spans["profile"] = (spans["task"][0], spans["task"][0])
    return Prompt(torch.tensor(ids), spans, rendered, "none", "", "", ())


def _documents(example: Example, profile: Any, config: PromptConfig) -> tuple[Document, ...]:
    if profile == "none":
        return ()
    task = example.task
    if isinstance(profile, User):
        own = {document.id for document in example.profile}
        pool = [
            document
            for document in profile.history
            if document.id not in own and not task.is_same_text(document.fields, document.id, example)
        ]
    elif profile == "own":
        pool = list(example.profile)
    else:
        raise PromptError(f"build_prompt: profile {profile!r} is unknown; use 'own', 'none' or another User")
    if not pool:
        raise PromptError(f"build_prompt: example {example.id!r} has no documents to show; use profile='none'")
    query = task.query(example.input)
    return retrieve(pool, query, config.items, task=task, method=config.retrieval, seed=config.seed)


def _snippets(tokenizer: "_Tokenizer", example: Example, documents: Sequence[Document], budget: int) -> list[str]:
    """The documents as text, their bodies cut so that all fit the budget.

    The last documents are left out when not even the first words of all would fit; one always stays.
    """
    parts = [example.task.parts(document.fields) for document in documents]
    frames = [tokenizer.count(before + after + "\n") for before, _, after in parts]
    budget -= tokenizer.count(_HEADER + _BETWEEN)
    while len(parts) > 1 and sum(frames) > budget:
        del parts[-1], frames[-1]
    wanted = [tokenizer.count("".join(part) + "\n") for part in parts]
    snippets = []
    for (before, body, after), frame, want, share in zip(
        parts, frames, wanted, share_budget(wanted, budget), strict=True
    ):
        # One token of slack for a merge across the cut.
        kept = body if share >= want else tokenizer.cut(body, max(share - frame - 1, 0))
        snippets.append(before + kept + after)
    return snippets


def share_budget(wanted: Sequence[int], budget: int) -> list[int]:
    """Split a budget evenly; what small wants leave is shared by the others.

    >>> share_budget([2, 50, 50], 62)
    [2, 30, 30]
    """
    shares = [0] * len(wanted)
    left = max(budget, 0)
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    for position, index in enumerate(order):
        shares[index] = min(wanted[index], left // (len(order) - position))
        left -= shares[index]
    return shares


def _span(starts: list[int | None], begin: int, end: int) -> tuple[int, int]:
    """Tokens whose first character lies in `[begin, end)`."""
    inside = [index for index, start in enumerate(starts) if start is not None and begin <= start < end]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


class _Tokenizer:
    """What prompt building asks of a model's tokenizer."""

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

    def render(self, content: str) -> tuple[str, int]:
        """The prompt as text, and where `content` begins in it."""
        content = content.strip()
        if not self.chat:
            return content + _ANSWER, 0
        messages = [{"role": "user", "content": content}]
        text = self.inner.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        offset = text.rfind(content)
        if offset < 0:
            raise PromptError("build_prompt: the tokenizer's chat template changes the text of a message")
        return text, offset

    def encode(self, text: str) -> tuple[list[int], list[int | None]]:
        """Token ids of a rendered prompt, and where in the text each token starts."""
        encoded = self._plain(text)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        starts: list[int | None] = [start if stop > start else None for start, stop in offsets]
        bos = self.inner.bos_token_id
        if not self.chat and bos is not None and ids[:1] != [bos]:
            ids, starts = [bos, *ids], [None, *starts]
        return ids, starts

    def answer(self, reference: str, tokens: int | None) -> list[int]:
        """Ids of the response alone; after plain text it begins with a space."""
        text = self.defuse(reference.strip())
        ids = self._plain(text if self.chat or not text else " " + text)["input_ids"]
        return list(ids[:tokens])

    def _plain(self, text: str) -> Any:
        return self.inner(text, add_special_tokens=False, return_offsets_mapping=True)
