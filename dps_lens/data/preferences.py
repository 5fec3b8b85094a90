"""Read preferences as people state them: pairs of answers, choices among options, stated preferences, conversations.

Besides records of our own form, the layouts of Personalized-RewardBench (arXiv 2604.07343), PRISM (arXiv 2404.16019),
PersonalLLM's interaction database (arXiv 2409.20296), PersonaMem (arXiv 2504.14225) and PrefEval (arXiv 2502.09597).
"""

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias

from dps_lens.data.dates import iso_dates
from dps_lens.data.documents import Document, Pool, Profile
from dps_lens.data.fields import Record, TooShortError, id_of
from dps_lens.data.records import Example, User
from dps_lens.data.same import normalised
from dps_lens.data.tasks import TASKS, Task
from dps_lens.errors import DataError

Load: TypeAlias = Callable[[str | Path], tuple[str, list[Any]]]
"""Reads a second file: its name and its records."""

_USER = ("user_id", "user", "person_id")
_QUESTION = ("prompt", "question", "input")
_HISTORY = ("profile", "history", "conversation")
_DATE = ("date", "year")
_EMPTY = "EMPTY STRING"  # how PRISM writes an answer that is none
_SPEAKER = re.compile(r"^(User|Assistant|System): ")
_OPTION = re.compile(r"^\(([a-z])\)\s*", re.DOTALL)
_TURN = {
    "query": "User",
    "assistant_options": "Assistant",
    "user_selection": "User",
    "assistant_acknowledgment": "Assistant",
}


@dataclass(frozen=True)
class _Asked:
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


def holds_preferences(first: Record) -> bool:
    """Whether records are pairs, choices or stated preferences, by the first of them."""

    def has(*names: str) -> bool:
        return all(first.has(name) for name in names)

    asked = first.first_of(_QUESTION) is not None
    return (
        (asked and has("chosen", "rejected"))
        or (asked and has("options", "answer") and not first.has("output"))
        or has("preference", "question")
        or has("user_question_or_message", "all_options")
        or has("user_prompt", "model_response", "if_chosen")
        or has("person_id", "prompt_1", "chosen_1")
        or has("prompt", "response_1")
    )


def read_preferences(
    items: Sequence[Record], outputs: str | Path | None, load: Load, n_newest: int
) -> dict[str, Callable[[], User]]:
    """Users by id, whose records are looked at when they are made.

    What is asked of one who has a profile of his own is for evaluation, else the newest are.

    Args:
        items: the records of a file.
        outputs: a second file: PersonaMem's contexts, or PrefEval's options in the order of the records.
        load: reads it.
        n_newest: how many of a user's pairs are kept for evaluation where the others are the history.
    """
    first = items[0]
    if first.has("if_chosen"):
        return _users(items, lambda record: record.field("user_id"), _prism, n_newest)
    if first.has("chosen_1"):
        return _users(items, lambda record: record.field("person_id"), _each(_interactions), n_newest)
    if first.has("all_options"):
        contexts = _contexts(items, outputs, load)
        read = _each(partial(_personamem, contexts))
        return _users(items, lambda record: record.field("persona_id"), read, n_newest)
    if first.has("preference"):
        options = _options(items, outputs, load)
        read = _each(partial(_prefeval, options))
        return _users(items, lambda record: f"{Path(record.file).stem}/{record.index}", read, n_newest)
    if first.has("response_1"):
        raise first.error(
            "these are answers with scores, without users; load PersonalLLM's interaction database, or write "
            '{"user_id", "prompt", "chosen", "rejected"}'
        )
    return _users(items, _owner, _each(_plain), n_newest)


def _users(
    items: Sequence[Record],
    owner: Callable[[Record], Any],
    read: Callable[[Sequence[Record]], list[_Asked]],
    n_newest: int,
) -> dict[str, Callable[[], User]]:
    by_user: dict[str, list[Record]] = {}
    for record in items:
        by_user.setdefault(str(owner(record)), []).append(record)
    return {user_id: partial(_user, user_id, own, read, n_newest) for user_id, own in by_user.items()}


def _each(read: Callable[[Record], Iterable[_Asked]]) -> Callable[[Sequence[Record]], list[_Asked]]:
    return lambda records: [asked for record in records for asked in read(record)]


def _user(
    user_id: str, records: Sequence[Record], read: Callable[[Sequence[Record]], list[_Asked]], n_newest: int
) -> User:
    asked = read(records)
    if not asked:
        raise records[0].error(f"user {user_id!r} has no pair of a chosen and a rejected answer", TooShortError)
    seen: dict[str, _Asked] = {}
    for one in asked:
        if one.id in seen:
            raise one.record.error(f"field 'id' {one.id!r} stands twice for user {user_id!r}")
        if (one.task, one.history is None) != (asked[0].task, asked[0].history is None):
            raise one.record.error(f"user {user_id!r} has profiles of several kinds; they must be of one")
        seen[one.id] = one
    return _with_profiles(user_id, asked) if asked[0].history is not None else _from_pairs(user_id, asked, n_newest)


def _with_profiles(user_id: str, asked: Sequence[_Asked]) -> User:
    """Every question has a profile of its own; the history is everything that they hold."""
    task, history = asked[0].task, dict[str, Document]()
    pools: dict[tuple[str, ...], Pool] = {}
    examples = []
    for one in asked:
        own: dict[str, Document] = {}
        for record, document in one.history or ():
            if history.setdefault(document.id, document) != document:
                raise record.error(f"field 'id' {document.id!r} stands twice for user {user_id!r}, with other contents")
            own[document.id] = document
        pool = pools.setdefault(tuple(own), Pool(own.values(), task))
        examples.append(Example(one.id, user_id, task, one.prompt, one.chosen, Profile(pool), one.rejected))
    return User(user_id, task, tuple(history.values()), tuple(examples))


def _from_pairs(user_id: str, asked: Sequence[_Asked], n_newest: int) -> User:
    """The user's earlier answers are the profile, oldest first when dated."""
    if len(asked) <= n_newest:
        raise asked[-1].record.error(
            f"user {user_id!r} has {len(asked)} pairs and no profile; more than {n_newest} are needed, because the "
            f"newest {n_newest} are kept for evaluation",
            TooShortError,
        )
    dated = [one.record.first_of(_DATE) for one in asked]
    dates = iso_dates(
        [one.record.value[name] if name else None for one, name in zip(asked, dated, strict=True)],
        lambda index, message: asked[index].record.error(f"field {dated[index]!r}: {message}"),
    )
    ordered = list(zip(asked, dates, strict=True))
    if all(dates):
        ordered.sort(key=lambda one: one[1] or "")
    task, held_out = asked[0].task, [one for one, _ in ordered[-n_newest:]]
    documents = (
        Document(one.id, {"prompt": one.prompt, "chosen": one.chosen}, date, one.rejected)
        for one, date in ordered[:-n_newest]
    )
    pool = Pool(documents, task)
    examples = (Example(one.id, user_id, task, one.prompt, one.chosen, Profile(pool), one.rejected) for one in held_out)
    return User(user_id, task, pool.documents, tuple(examples))


def _owner(record: Record) -> str:
    """The user of a pair or a choice; where each has a profile, it may be a user of its own."""
    name = record.first_of(_USER)
    if name is None and record.first_of(_HISTORY) is None:
        raise record.error("field 'user_id' is missing, and there is no 'profile' that makes each record a user")
    return str(record.field(name)) if name is not None else _number(record)


def _number(record: Record) -> str:
    return str(record.value["id"]) if record.has("id") else str(record.index)


def _plain(record: Record) -> Iterator[_Asked]:
    """A pair or a choice with, perhaps, a profile: Personalized-RewardBench's layout, and ours."""
    history, asked = record.first_of(_HISTORY), record.first_of(_QUESTION)
    if asked is None:
        raise record.error(f"field 'prompt' is missing (any of {', '.join(_QUESTION)})")
    options = record.has("options")
    if options:
        chosen, rejected = _chosen_of(record, record.field("options", (list, tuple)), record.field("answer"))
    else:
        chosen, lost = _answer(record, "chosen"), record.field("rejected", (str, list, tuple))
        several = not isinstance(lost, str) and all(isinstance(one, str) for one in lost)
        rejected = tuple(lost) if several else (_answer(record, "rejected"),)
    task, documents = TASKS["choices" if options else "pairs"], None
    if history is not None:
        task, documents = _profile(record, history)
    yield _Asked(record, _number(record), _prompt(record, asked), chosen, rejected, task, documents)


def _prompt(record: Record, name: str) -> str:
    """A text, or a single message."""
    value = record.field(name, (str, list, tuple))
    if isinstance(value, str):
        return value
    if len(value) != 1:
        raise record.error(f"field {name!r} holds {len(value)} messages; put those before the last into 'history'")
    return _message(record, name, value[0], "user")


def _answer(record: Record, name: str) -> str:
    """A text, or the last message of a conversation."""
    value = record.field(name, (str, list, tuple))
    return value if isinstance(value, str) else _message(record, name, value[-1] if value else None, "assistant")


def _message(record: Record, field: str, message: object, role: str) -> str:
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
        raise record.error(f"field {field!r} is neither a text nor messages with 'role' and 'content'")
    if message.get("role", role) != role:
        raise record.error(f"field {field!r} ends with a message of role {message['role']!r}, not {role!r}")
    return str(message["content"])


def _chosen_of(record: Record, options: Sequence[Any], answer: object) -> tuple[str, tuple[str, ...]]:
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


def _profile(record: Record, name: str) -> tuple[Task, tuple[tuple[Record, Document], ...]]:
    """A profile's documents: texts, messages of earlier conversations, or pairs; and how they read in a prompt."""
    items = record.field(name, (str, list, tuple, Mapping))
    where = f"{record.file}, record {record.index}, {name}"
    if isinstance(items, str):
        return TASKS["preferences"], _texts(record, [items])
    if isinstance(items, Mapping):
        return TASKS["sessions"], _texts(record, _turns_of(record, items))
    held = [Record(where, index, {"text": item} if isinstance(item, str) else item) for index, item in enumerate(items)]
    if not held:
        raise record.error(f"field {name!r} is empty; without a history there are no preferences", TooShortError)
    if held[0].has("role"):
        return TASKS["sessions"], _texts(record, _exchanges(held))
    task = TASKS["pairs"] if held[0].has("chosen") else TASKS["questions"]
    documents = []
    for one in held:
        fields = {each: one.field(each, str) for each in task.fields}
        rejected = (one.field("rejected", str),) if one.has("rejected") else ()
        documents.append((one, Document(id_of(one, fields), fields, rejected=rejected)))
    return task, tuple(documents)


def _texts(record: Record, texts: Iterable[str]) -> tuple[tuple[Record, Document], ...]:
    """Texts as documents that are known by their contents; none twice."""
    bare = Record(record.file, record.index, {})
    return tuple((record, Document(id_of(bare, {"text": text}), {"text": text})) for text in dict.fromkeys(texts))


def _exchanges(messages: Iterable[Record]) -> Iterator[str]:
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


def _prism(records: Sequence[Record]) -> list[_Asked]:
    """PRISM's utterances: opening prompts with the answers of up to four models; without those that show no choice."""
    by_interaction: dict[str, list[Record]] = {}
    for record in records:
        if record.field("turn", int) == 0:
            by_interaction.setdefault(str(record.field("interaction_id")), []).append(record)
    found = []
    for number, own in by_interaction.items():
        answers: dict[str, tuple[str, bool]] = {}
        for one in own:
            text = one.field("model_response", str)
            if text != _EMPTY and normalised(text):
                _, chosen = answers.get(normalised(text), (text, False))
                answers[normalised(text)] = text, chosen or one.field("if_chosen", bool)
        taken = [text for text, chosen in answers.values() if chosen]
        rejected = tuple(text for text, chosen in answers.values() if not chosen)
        if len(taken) == 1 and rejected:
            found.append(_Asked(own[0], number, own[0].field("user_prompt", str), taken[0], rejected))
    return found


def _interactions(record: Record) -> Iterator[_Asked]:
    """PersonalLLM's interaction database: a row a person, pair j in `prompt_j`, `response_j_a` and `response_j_b`."""
    j = 1
    while record.has(f"prompt_{j}"):
        chosen = record.field(f"chosen_{j}", str)
        if chosen not in ("a", "b"):
            raise record.error(f"field 'chosen_{j}' is {chosen!r}; it says 'a' or 'b'")
        answers = {side: record.field(f"response_{j}_{side}", str) for side in "ab"}
        lost = answers["b" if chosen == "a" else "a"]
        if normalised(lost) != normalised(answers[chosen]):  # two models may say the same
            yield _Asked(record, str(j), record.field(f"prompt_{j}", str), answers[chosen], (lost,))
        j += 1


def _contexts(items: Sequence[Record], outputs: str | Path | None, load: Load) -> dict[str, list[Any]]:
    """PersonaMem's conversations by their ids."""
    if outputs is None:
        name = items[0].file
        raise items[0].error(
            f"its conversations stand in another file; give outputs='{name.replace('questions', 'shared_contexts')}'"
            if "questions" in name
            else "its conversations stand in another file; give outputs='shared_contexts_….jsonl'"
        )
    name, rows = load(outputs)
    found: dict[str, list[Any]] = {}
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping) or not all(isinstance(messages, list) for messages in row.values()):
            raise DataError(f"{name}, record {index}: expected an object that holds a list of messages by its id")
        found |= {str(key): messages for key, messages in row.items()}
    return found


def _personamem(contexts: Mapping[str, list[Any]], record: Record) -> Iterator[_Asked]:
    """A question of PersonaMem with the conversations before it."""
    key, stop = record.field("shared_context_id", str), str(record.field("end_index_in_shared_context"))
    if key not in contexts:
        raise record.error(f"there is no context {key!r} in the file of contexts")
    if not stop.isdecimal():
        raise record.error(f"field 'end_index_in_shared_context' {stop!r} is no number of messages")
    messages = [Record(f"context {key}", index, one) for index, one in enumerate(contexts[key][: int(stop)])]
    options = record.field("all_options", (str, list, tuple))
    if isinstance(options, str):
        try:
            options = ast.literal_eval(options)
        except (SyntaxError, ValueError):
            options = None
    if not isinstance(options, (list, tuple)):
        raise record.error("field 'all_options' is no list of texts")
    right, rejected = _chosen_of(record, options, record.field("correct_answer", str))
    history = _texts(record, _exchanges(messages))
    if not history:
        raise record.error(f"context {key!r} holds nothing before the question", TooShortError)
    yield _Asked(
        record,
        str(record.field("question_id")),
        record.field("user_question_or_message", str),
        _OPTION.sub("", right),
        tuple(_OPTION.sub("", one) for one in rejected),
        TASKS["sessions"],
        history,
    )


def _options(items: Sequence[Record], outputs: str | Path | None, load: Load) -> list[Record]:
    """The records that hold PrefEval's options, in the order of the preferences."""
    if outputs is None:
        return list(items)
    name, rows = load(outputs)
    if len(rows) != len(items):
        held = f"{name} holds {len(rows)} records, {items[0].file} {len(items)}"
        raise DataError(f"{held}; give the file of the same topic")
    return [Record(name, index, row) for index, row in enumerate(rows)]


def _prefeval(options: Sequence[Record], record: Record) -> Iterator[_Asked]:
    """PrefEval: a preference, stated or shown in a conversation, and a question with four answers, the first right."""
    answered, question = options[record.index], record.field("question", str)
    if not answered.has("classification_task_options"):
        raise answered.error(
            "field 'classification_task_options' is missing: these preferences come without answers; give the file "
            "of the same topic in mcq_options as outputs="
        )
    if answered.field("question", str) != question:
        raise answered.error(f"its question is not that of {record.file}; give the file of the same topic")
    chosen, rejected = _chosen_of(answered, answered.field("classification_task_options", (list, tuple)), 0)
    shown = record.has("conversation")
    task, history = _profile(record, "conversation") if shown else _profile(record, "preference")
    yield _Asked(record, str(record.index), question, chosen, rejected, task, history)
