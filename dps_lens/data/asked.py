"""What a user was asked, with the answers and the profile that a record holds, whatever its layout."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from dps_lens.data.documents import Document
from dps_lens.data.fields import Record, TooShortError, id_of
from dps_lens.data.same import normalised
from dps_lens.data.tasks import TASKS, Task

_SPEAKER = re.compile(r"^(User|Assistant|System): ")
_TURN = {
    "query": "User",
    "assistant_options": "Assistant",
    "user_selection": "User",
    "assistant_acknowledgment": "Assistant",
}


@dataclass(frozen=True)
class Asked:
    """What a user was asked, the answer that is the user's, and those that are not.

    Attributes:
        history: the profile of this question, with the record of each document; None where earlier answers are it.
    """

    record: Record
    id: str
    prompt: str
    chosen: str
    rejected: tuple[str, ...]
    task: Task = TASKS["pairs"]
    history: tuple[tuple[Record, Document], ...] | None = None

    def __post_init__(self) -> None:
        answers = (self.chosen, *self.rejected)
        named = {"prompt": [self.prompt], "chosen": [self.chosen], "rejected": self.rejected}
        for name, texts in named.items():
            if not all(text.strip() for text in texts):
                raise self.record.error(f"field {name!r} is empty")
        if not self.rejected:
            raise self.record.error("there is no rejected answer")
        for one, other in combinations(answers, 2):
            if normalised(one) == normalised(other):
                raise self.record.error(f"two answers are the same: {one[:60]!r}; leave ties and repetitions out")


def chosen_of(record: Record, options: Sequence[Any], answer: object) -> tuple[str, tuple[str, ...]]:
    """The right option, and the others; the answer is the option itself, its letter or its place, from 0."""
    texts = [str(one) for one in options]
    if len(texts) < 2:
        raise record.error(f"field 'options' holds {len(texts)} of them; a choice needs two")
    place = -1
    if isinstance(answer, str):
        letter = answer.strip().strip("().").lower()
        if answer in texts:
            place = texts.index(answer)
        elif len(letter) == 1 and letter.isalpha():
            place = ord(letter) - ord("a")
    elif isinstance(answer, int) and not isinstance(answer, bool):
        place = answer
    if not 0 <= place < len(texts):
        raise record.error(f"field 'answer' {answer!r} is none of the {len(texts)} options, no letter and no place")
    return texts[place], tuple(text for index, text in enumerate(texts) if index != place)


def profile_of(record: Record, name: str) -> tuple[Task, tuple[tuple[Record, Document], ...]]:
    """A profile's documents: texts, messages of earlier conversations, or pairs; and how they read in a prompt."""
    items = record.field(name, (str, list, tuple, Mapping))
    where = f"{record.file}, record {record.index}, {name}"
    if isinstance(items, str):
        return TASKS["preferences"], texts_of(record, [items])
    if isinstance(items, Mapping):
        return TASKS["sessions"], texts_of(record, _turns_of(record, items))
    held = [Record(where, index, {"text": item} if isinstance(item, str) else item) for index, item in enumerate(items)]
    if not held:
        raise record.error(f"field {name!r} is empty; without a history there are no preferences", TooShortError)
    if held[0].has("role"):
        return TASKS["sessions"], texts_of(record, exchanges(held))
    task = TASKS["pairs"] if held[0].has("chosen") else TASKS["questions"]
    documents = []
    for one in held:
        fields = {each: one.field(each, str) for each in task.fields}
        rejected = (one.field("rejected", str),) if one.has("rejected") else ()
        documents.append((one, Document(id_of(one, fields), fields, rejected=rejected)))
    return task, tuple(documents)


def texts_of(record: Record, texts: Iterable[str]) -> tuple[tuple[Record, Document], ...]:
    """Texts as documents that are known by their contents; none twice."""
    bare = Record(record.file, record.index, {})
    return tuple((record, Document(id_of(bare, {"text": text}), {"text": text})) for text in dict.fromkeys(texts))


def exchanges(messages: Iterable[Record]) -> Iterator[str]:
    """A conversation in exchanges: what a user said with the answers to it; what a system says stands alone."""
    held: list[str] = []
    for message in messages:
        role, content = str(message.field("role", str)), _SPEAKER.sub("", str(message.field("content", str)))
        if role != "assistant" and held:
            yield "\n".join(held)
            held = []
        held.append(content if role == "system" else f"{role.capitalize()}: {content}")
    if held:
        yield "\n".join(held)


def _turns_of(record: Record, turns: Mapping[str, Any]) -> Iterator[str]:
    """PrefEval's conversations: `{"0": {user, assistant}, …}`, or a query, its options and what was selected."""
    if "query" in turns:
        if missing := [name for name in _TURN if not isinstance(turns.get(name), str)]:
            raise record.error(f"field 'conversation' lacks {missing[0]!r}")
        yield "\n".join(f"{who}: {turns[name]}" for name, who in _TURN.items())
        return
    # The Hub's copy has columns for turns that a conversation does not reach.
    for turn in (turn for turn in turns.values() if turn is not None):
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(who), str) for who in ("user", "assistant")):
            raise record.error("field 'conversation': a turn lacks what 'user' or 'assistant' said")
        yield f"User: {turn['user']}\nAssistant: {turn['assistant']}"
