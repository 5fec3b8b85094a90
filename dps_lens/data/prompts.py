"""Build the prompt that scoring, evaluation and steering share.

A prompt is `profile + task input` in the tokenizer's chat template (plain text when it has none),
followed by the response. The response is tokenised on its own, so that its ids are the same whatever
stands before it. Spans of profile and task are read off the tokenizer's character offsets.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from dps_lens.checks import check_whole
from dps_lens.data.documents import Document
from dps_lens.data.records import Example, User
from dps_lens.data.retrieval import RetrievalMethod, retrieve
from dps_lens.data.tasks import TASKS, Task
from dps_lens.data.tokenizer import BETWEEN, PromptTokenizer, span
from dps_lens.data.words import RetrievalTokens
from dps_lens.errors import PromptError
from dps_lens.literals import ProfileIn
from dps_lens.model import HookedModel


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
        retrieval_tokens: what BM25 counts: `"whitespace"` tokens, as LaMP's code; `"script"`, words of any script;
            `"auto"`, `"script"` where a history is written in scripts without spaces, else `"whitespace"`.
        chat_template_kwargs: for the tokenizer's chat template, such as `{"enable_thinking": False}`; values as JSON
            knows them.
        profile_in: where the profile stands: `"message"`, before the task in one message; `"system"`, in the system
            turn; `"turn"`, in an earlier message of the user's. Where the chat template has no such place, and where
            there is none, it stands in the message, with a warning. A template's own system text, if it has one,
            stands in its place where no profile is shown.
    """

    items: int = 6
    profile_tokens: int = 256
    task_tokens: int | None = 256
    response_tokens: int | None = 128
    retrieval: RetrievalMethod = "bm25"
    seed: int = 0
    retrieval_tokens: RetrievalTokens = "auto"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    profile_in: ProfileIn = "message"

    def __post_init__(self) -> None:
        for name in ("items", "profile_tokens", "task_tokens", "response_tokens"):
            value = getattr(self, name)
            if value is not None or name in ("items", "profile_tokens"):
                check_whole(PromptError, f"PromptConfig: {name}", value, least=1)
        check_whole(PromptError, "PromptConfig: seed", self.seed, least=0)
        for name, value, known in (
            ("retrieval", self.retrieval, get_args(RetrievalMethod)),
            ("retrieval_tokens", self.retrieval_tokens, get_args(RetrievalTokens)),
            ("profile_in", self.profile_in, get_args(ProfileIn)),
        ):
            if value not in known:
                raise PromptError(f"PromptConfig: {name} {value!r} is unknown; use one of {', '.join(known)}")
        try:
            json.dumps(self.chat_template_kwargs)
        except TypeError as error:
            raise PromptError(f"PromptConfig: chat_template_kwargs must be plain JSON values ({error})") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a manifest."""
        return asdict(self)


@dataclass(frozen=True)
class Note:
    """A text that stands in a prompt where the profile would: a description of the user, say."""

    text: str


Shown: TypeAlias = Literal["own", "none"] | User | Note
"""What stands where the profile does: the own documents, nothing, another user's, or a text."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt with its response, as token ids.

    Attributes:
        tokens: `Int[Tensor, "pos"]`, prompt and response.
        spans: `"profile"`, `"task"` and `"response"` as `(start, stop)`; an absent profile is empty.
        text: the prompt as text, without the response.
        condition: `"own"`, `"none"`, `"note"`, or the id of the user whose profile is shown.
        shown: ids of the documents in the profile.
        items: `(start, stop)` of each of these documents.
        bodies: `(start, stop)` of the text of each, without its title, date and labels.
        rejected: `Int[Tensor, "pos"]`, the tokens of each rejected answer, which may stand where the response does.
    """

    tokens: Int[Tensor, " pos"]
    spans: dict[str, tuple[int, int]]
    text: str
    condition: str
    example_id: str
    user_id: str
    shown: tuple[str, ...]
    items: tuple[tuple[int, int], ...] = ()
    bodies: tuple[tuple[int, int], ...] = ()
    rejected: tuple[Int[Tensor, " _"], ...] = ()

    def __repr__(self) -> str:
        about = f"{self.example_id!r}, profile: {self.condition}, {len(self.shown)} documents"
        return f"Prompt({about}, {len(self.prompt_tokens)} tokens and {len(self.response_tokens)} of the response)"

    @property
    def prompt_tokens(self) -> Int[Tensor, " pos"]:
        """What the model sees before it answers."""
        return self.tokens[: self.spans["response"][0]]

    @property
    def response_tokens(self) -> Int[Tensor, " pos"]:
        """The user's own answer."""
        return self.tokens[self.spans["response"][0] :]

    @property
    def answers(self) -> list["Prompt"]:
        """The same prompt with each answer as its response: the user's own first, then the rejected ones."""
        start = self.spans["response"][0]
        return [self] + [
            replace(
                self,
                tokens=torch.cat([self.prompt_tokens, answer]),
                spans={**self.spans, "response": (start, start + len(answer))},
                rejected=(),
            )
            for answer in self.rejected
        ]


def build_prompt(
    model: HookedModel,
    example: Example,
    profile: Shown = "own",
    *,
    config: PromptConfig | None = None,
    response: bool = True,
) -> Prompt:
    """Build the prompt of an example.

    Args:
        model: its tokenizer and context length are used.
        example: what is asked, and by whom.
        profile: `"own"`, `"none"`, another user whose documents are shown instead, or a `Note`.
        config: how much is shown; `PromptConfig()` by default.
        response: append the user's own answer, and keep the rejected ones beside it.

    Raises:
        PromptError: the prompt does not fit the context, or nothing is left of the response.
    """
    config = config or PromptConfig()
    tokenizer = PromptTokenizer(model, config.chat_template_kwargs)
    documents = _documents(example, profile, config)
    heading = example.task.header + "\n"
    own = tokenizer.cut(tokenizer.defuse(example.input.strip()), config.task_tokens).strip()
    header, snippets, pieces = _header(tokenizer, example.task, documents, config.profile_tokens)
    if isinstance(profile, Note):
        if not profile.text.strip():
            raise PromptError(f"build_prompt: example {example.id!r}: the note is empty; use profile='none'")
        header = tokenizer.cut(tokenizer.defuse(profile.text.strip()), config.profile_tokens)
    text, shown_at, asked_at = tokenizer.place(header, own, config.profile_in)
    ids, offsets = tokenizer.encode(text)
    spans = {
        "profile": span(offsets, *shown_at) if header else (0, 0),
        "task": span(offsets, asked_at, asked_at + len(own)),
    }
    answer = tokenizer.answer(example.reference, config.response_tokens) if response else []
    if response and not answer:
        reason = (
            "a first character that is longer than response_tokens"
            if example.reference.strip()
            else "an empty reference"
        )
        raise PromptError(f"build_prompt: example {example.id!r} has {reason}")
    # What compares answers refuses those that cannot be compared; to everything else they do not matter.
    rejected = [tokenizer.answer(text, config.response_tokens) for text in example.rejected] if response else []
    if not header:
        spans["profile"] = (spans["task"][0], spans["task"][0])
    spans["response"] = (len(ids), len(ids) + len(answer))
    limit = model.cfg.n_ctx
    if len(ids) + len(answer) > limit:
        raise PromptError(
            f"build_prompt: example {example.id!r} takes {len(ids) + len(answer)} tokens, the model's context is "
            f"{limit}; lower profile_tokens, task_tokens or response_tokens in PromptConfig"
        )
    condition = profile.id if isinstance(profile, User) else "note" if isinstance(profile, Note) else profile
    shown = tuple(document.id for document in documents[: len(pieces)])
    items, bodies, begin = [], [], shown_at[0] + len(heading)
    for piece, (before, body, _) in zip(pieces, snippets, strict=True):
        items.append(span(offsets, begin, begin + len(piece)))
        bodies.append(span(offsets, begin + len(before), begin + len(before) + len(body)))
        begin += len(piece) + 1
    return Prompt(
        torch.tensor(ids + answer),
        spans,
        text,
        condition,
        example.id,
        example.user_id,
        shown,
        tuple(items),
        tuple(bodies),
        tuple(torch.tensor(tokens, dtype=torch.long) for tokens in rejected),
    )


def chat_prompt(
    model: HookedModel,
    text: str,
    turns: Sequence[tuple[str, str]] = (),
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Prompt:
    """A bare text as a prompt: a user's message where the tokenizer has a chat template, else as it is.

    Args:
        model: a hooked model.
        text: the message.
        turns: earlier messages with their answers; need a chat template.
        chat_template_kwargs: for the tokenizer's chat template, as in `PromptConfig`.

    Raises:
        PromptError: there are turns or keywords and no chat template.
    """
    tokenizer = PromptTokenizer(model, chat_template_kwargs)
    message = tokenizer.defuse(text)
    if turns and not tokenizer.chat:
        raise PromptError("chat_prompt: the tokenizer has no chat template for earlier turns; start over")
    earlier = [(tokenizer.defuse(said), tokenizer.defuse(answer)) for said, answer in turns]
    rendered, offset = tokenizer.render(message, earlier) if tokenizer.chat else (message, 0)
    ids, offsets = tokenizer.encode(rendered)
    spans = {"task": span(offsets, offset, offset + len(message)), "response": (len(ids), len(ids))}
    spans["profile"] = (spans["task"][0], spans["task"][0])
    return Prompt(torch.tensor(ids), spans, rendered, "none", "", "", ())


def conversation_prompt(
    model: HookedModel,
    messages: Sequence[Mapping[str, str]],
    history: Sequence[Document] = (),
    *,
    task: Task = TASKS["questions"],
    config: PromptConfig | None = None,
) -> Prompt:
    """A conversation as a prompt for its next answer, with a user's documents before the last message.

    Args:
        model: a hooked model, whose tokenizer has a chat template.
        messages: each with its `role`, as the template knows it, and its `content`.
        history: documents; those that go with the last message are shown, in the words of `build_prompt`.
        task: how the documents read.
        config: how much of them is shown, and keywords of the template.

    Raises:
        PromptError: there is no template, or it refuses these messages; or they do not fit the context.
    """
    config = config or PromptConfig()
    tokenizer = PromptTokenizer(model, config.chat_template_kwargs)
    said = [{"role": one["role"], "content": tokenizer.defuse(one["content"])} for one in messages]
    if not said or not said[-1]["content"].strip():
        raise PromptError("the last message is empty")
    query = said[-1]["content"]
    documents = _retrieved(history, task, query, config) if history else ()
    header, _, pieces = _header(tokenizer, task, documents, config.profile_tokens)
    said[-1]["content"] = header + BETWEEN + query if header else query
    text, begin = tokenizer.converse(said)
    ids, offsets = tokenizer.encode(text)
    asked = begin + (len(header + BETWEEN) if header else 0)
    spans = {"task": span(offsets, asked, asked + len(query)), "response": (len(ids), len(ids))}
    spans["profile"] = span(offsets, begin, asked) if header else (spans["task"][0], spans["task"][0])
    if len(ids) >= model.cfg.n_ctx:
        raise PromptError(f"the messages take {len(ids)} tokens, and the model's context is {model.cfg.n_ctx}")
    shown = tuple(document.id for document in documents[: len(pieces)])
    return Prompt(torch.tensor(ids), spans, text, "own" if header else "none", "", "", shown)


def _documents(example: Example, profile: Shown, config: PromptConfig) -> tuple[Document, ...]:
    if profile == "none" or isinstance(profile, Note):
        return ()
    task = example.task
    if isinstance(profile, User):
        pool = example.showable_of(profile)
    elif profile == "own":
        pool = example.showable
    else:
        raise PromptError(f"build_prompt: profile {profile!r} is unknown; use 'own', 'none' or another User")
    if not pool:
        raise PromptError(
            f"build_prompt: example {example.id!r} has no documents to show beside what it asks for; use profile='none'"
        )
    return _retrieved(pool, task, task.query(example.input), config)


def _retrieved(pool: Sequence[Document], task: Task, query: str, config: PromptConfig) -> tuple[Document, ...]:
    return retrieve(
        pool,
        query,
        config.items,
        task=task,
        method=config.retrieval,
        seed=config.seed,
        tokens=config.retrieval_tokens,
    )


def _header(
    tokenizer: PromptTokenizer, task: Task, documents: Sequence[Document], budget: int
) -> tuple[str, list[tuple[str, str, str]], list[str]]:
    """What shows the documents: the text, and each of them in parts and whole."""
    snippets = _snippets(tokenizer, task, documents, budget)
    pieces = [tokenizer.defuse("".join(parts)) for parts in snippets]
    return task.header + "\n" + "\n".join(pieces) if pieces else "", snippets, pieces


def _snippets(
    tokenizer: PromptTokenizer, task: Task, documents: Sequence[Document], budget: int
) -> list[tuple[str, str, str]]:
    """The documents as text before their bodies, the bodies, cut so that all fit the budget, and the text behind.

    The last documents are left out when not even the first words of all would fit; one always stays.
    """
    parts = [tuple(map(tokenizer.defuse, task.parts(document.fields))) for document in documents]
    frames = [tokenizer.count(before + after + "\n") for before, _, after in parts]
    budget -= tokenizer.count(task.header + "\n" + BETWEEN)
    least = task.least
    while len(parts) > 1 and sum(frames) + least * len(parts) > budget:
        del parts[-1], frames[-1]
    wanted = [tokenizer.count("".join(part) + "\n") for part in parts]
    snippets = []
    for (before, body, after), frame, want, share in zip(
        parts, frames, wanted, share_budget(wanted, budget), strict=True
    ):
        # One token of slack for a merge across the cut.
        kept = body if share >= want else tokenizer.cut(body, max(share - frame - 1, 0))
        snippets.append((before, kept, after))
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
