"""Read preferences as people state them: pairs of answers, choices among options, stated preferences, conversations.

Besides records of our own form, the layouts of Personalized-RewardBench (arXiv 2604.07343), PRISM (arXiv 2404.16019),
PersonalLLM's interaction database (arXiv 2409.20296), PersonaMem (arXiv 2504.14225) and PrefEval (arXiv 2502.09597).
"""

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from warnings import warn

from dps_lens.data.documents import Document, Pool, Profile
from dps_lens.data.fields import Record, TooShortError
from dps_lens.data.records import Example, User
from dps_lens.data.same import normalised
from dps_lens.data.tasks import TASKS, Task
from dps_lens.errors import DataError

Load: TypeAlias = Callable[[str | Path], tuple[str, list[Any]]]
"""Reads a second file: its name and its records."""

_USER = ("user_id", "user", "person_id")
_QUESTION = ("prompt", "question", "input")
_HISTORY = ("profile", "history", "conversation")
_EMPTY = "EMPTY STRING"  # how PRISM writes an answer that is none
_SPEAKER = re.compile(r"^(User|Assistant|System): ")
_OPTION = re.compile(r"^\(([a-z])\)\s*", re.DOTALL)


@dataclass(frozen=True)
class _Asked:
    """What a user was asked, the answer that is the user's, and those that are not."""

    record: Record
    user_id: str
    id: str
    prompt: str
    chosen: str
    rejected: tuple[str, ...]
    task: Task = TASKS["pairs"]
    history: tuple[Document, ...] = field(default=())


def holds_preferences(first: Record) -> bool:
    """Whether records are pairs, choices or stated preferences, by the first of them."""
    if first.has("chosen") and first.has("rejected"):
        return True
    # LaMP's and LongLaMP's records may hold any field beside their own.
    marks = (
        "options",
        "all_options",
        "classification_task_options",
        "preference",
        "if_chosen",
        "chosen_1",
        "response_1",
    )
    return not (first.has("input") and first.has("profile")) and any(first.has(mark) for mark in marks)


def read_preferences(
    items: Sequence[Record], outputs: str | Path | None, load: Load, n_newest: int
) -> dict[str, Callable[[], User]]:
    """Users by id; what is asked of one who has a profile of his own is for evaluation, else the newest are.

    Args:
        items: the records of a file.
        outputs: a second file: PersonaMem's contexts, or PrefEval's options in the order of the records.
        load: reads it.
        n_newest: how many of a user's pairs are kept for evaluation where the others are the history.
    """
    first = items[0]
    if first.has("if_chosen"):
        asked = _prism(items)
    elif first.has("chosen_1"):
        asked = [one for record in items for one in _interactions(record)]
    elif first.has("all_options"):
        asked = list(_personamem(items, outputs, load))
    elif first.has("preference"):
        asked = list(_prefeval(items, outputs, load))
    elif first.has("response_1"):
        raise first.error(
            "these are answers with scores, without users; load PersonalLLM's interaction database, or write "
            '{"user_id", "prompt", "chosen", "rejected"}'
        )
    else:
        asked = [_plain(record) for record in items]
    by_user: dict[str, list[_Asked]] = {}
    for one in asked:
        by_user.setdefault(one.user_id, []).append(one)
    return {user_id: partial(_user, user_id, own, n_newest) for user_id, own in by_user.items()}


def _user(user_id: str, asked: Sequence[_Asked], n_newest: int) -> User:
    seen: dict[str, _Asked] = {}
    for one in asked:
        if one.id in seen:
            raise one.record.error(f"field 'id' {one.id!r} stands twice for user {user_id!r}")
        seen[one.id] = one
    task = asked[0].task
    if any(one.history for one in asked):
        if empty := [one for one in asked if not one.history]:
            raise empty[0].record.error(f"user {user_id!r} has a profile in other records, and none here")
        history = {document.id: document for one in asked for document in one.history}
        pools: dict[tuple[str, ...], Pool] = {}
        examples = []
        for one in asked:
            pool = pools.setdefault(tuple(each.id for each in one.history), Pool(one.history, task))
            examples.append(_example(one, task, pool))
        return User(user_id, task, tuple(history.values()), tuple(examples))
    if len(asked) <= n_newest:
        raise asked[-1].record.error(
            f"user {user_id!r} has {len(asked)} pairs and no profile; more than {n_newest} are needed, because the "
            f"newest {n_newest} are kept for evaluation",
            TooShortError,
        )
    documents = [Document(one.id, {"prompt": one.prompt, "chosen": one.chosen}, rejected=one.rejected) for one in asked]
    pool = Pool(documents[:-n_newest], task)
    return User(user_id, task, pool.documents, tuple(_example(one, task, pool) for one in asked[-n_newest:]))


def _example(one: _Asked, task: Task, pool: Pool) -> Example:
    return Example(one.id, one.user_id, task, one.prompt, one.chosen, Profile(pool), one.rejected)


def _plain(record: Record) -> _Asked:
    """A pair or a choice with, perhaps, a profile: Personalized-RewardBench's layout, and ours."""
    name = record.first_of(_USER)
    history = record.first_of(_HISTORY)
    if name is None and history is None:
        raise record.error(
            "field 'user_id' is missing, and there is no 'profile' that would make a user of each record"
        )
    asked = record.first_of(_QUESTION)
    if asked is None:
        raise record.error(f"field 'prompt' is missing (any of {', '.join(_QUESTION)})")
    prompt = _text(record, asked)
    if record.has("options"):
        chosen, rejected = _chosen_of(record, record.field("options", (list, tuple)), record.field("answer"))
    else:
        chosen, lost = _text(record, "chosen"), record.field("rejected", (str, list, tuple))
        several = not isinstance(lost, str) and all(isinstance(one, str) for one in lost)
        rejected = tuple(lost) if several else (_text(record, "rejected"),)
    number = str(record.value["id"]) if record.has("id") else str(record.index)
    user_id = str(record.field(name)) if name is not None else number
    task, documents = _profile(record, history) if history is not None else (TASKS["pairs"], ())
    return _checked(_Asked(record, user_id, number, prompt, chosen, rejected, task, documents))


def _text(record: Record, name: str) -> str:
    """A text, or the last message of a conversation."""
    value = record.field(name, (str, list, tuple))
    if isinstance(value, str):
        return value
    last = value[-1] if value else None
    if not isinstance(last, Mapping) or not isinstance(last.get("content"), str):
        raise record.error(f"field {name!r} is neither a text nor messages with 'role' and 'content'")
    return str(last["content"])


def _chosen_of(record: Record, options: Sequence[Any], answer: Any) -> tuple[str, tuple[str, ...]]:
    """The right option, and the others; the answer is the option itself, its letter or its place, from 0."""
    texts = [str(one) for one in options]
    if len(texts) < 2:
        raise record.error(f"field 'options' holds {len(texts)} of them; a choice needs two")
    letter = str(answer).strip().strip("().").lower()
    if isinstance(answer, str) and answer in texts:
        place = texts.index(answer)
    elif isinstance(answer, str) and len(letter) == 1 and letter.isalpha() and ord(letter) - ord("a") < len(texts):
        place = ord(letter) - ord("a")
    elif isinstance(answer, int) and 0 <= answer < len(texts):
        place = answer
    else:
        raise record.error(f"field 'answer' {answer!r} is none of the {len(texts)} options, no letter and no place")
    return texts[place], tuple(text for index, text in enumerate(texts) if index != place)


def _checked(one: _Asked) -> _Asked:
    """Refuse an example that cannot tell anything."""
    for name, text in (("prompt", one.prompt), ("chosen", one.chosen), *(("rejected", text) for text in one.rejected)):
        if not text.strip():
            raise one.record.error(f"field {name!r} is empty")
    if not one.rejected:
        raise one.record.error("there is no rejected answer")
    if normalised(one.chosen) in map(normalised, one.rejected):
        raise one.record.error(f"the chosen answer is rejected, too: {one.chosen[:60]!r}; leave ties out")
    return one


def _profile(record: Record, name: str) -> tuple[Task, tuple[Document, ...]]:
    """A profile's documents: texts, messages of earlier conversations, or pairs; and how they read in a prompt."""
    items = record.field(name, (str, list, tuple, Mapping))
    if isinstance(items, str):
        return TASKS["preferences"], (Document("0", {"text": items}),)
    if isinstance(items, Mapping):
        return TASKS["sessions"], _numbered(_turns_of_mapping(record, items))
    where = f"{record.file}, record {record.index}, {name}"
    held = [Record(where, index, {"text": item} if isinstance(item, str) else item) for index, item in enumerate(items)]
    if not held:
        raise record.error(f"field {name!r} is empty; without a history there are no preferences", TooShortError)
    if held[0].has("role"):
        return TASKS["sessions"], _numbered(_exchanges(held))
    task = TASKS["pairs"] if held[0].has("chosen") else TASKS["questions"]
    documents = []
    for one in held:
        fields = {each: one.field(each, str) for each in task.fields}
        rejected = (one.field("rejected", str),) if one.has("rejected") else ()
        documents.append(Document(str(one.value.get("id", one.index)), fields, rejected=rejected))
    return task, tuple(documents)


def _numbered(texts: Iterable[str]) -> tuple[Document, ...]:
    return tuple(Document(str(index), {"text": text}) for index, text in enumerate(texts))


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


def _turns_of_mapping(record: Record, turns: Mapping[str, Any]) -> Iterator[str]:
    """PrefEval's conversations: `{"0": {user, assistant}, …}`, or a query, its options and what was selected."""
    if "query" in turns:
        names = {
            "query": "User", "assistant_options": "Assistant", "user_selection": "User",
            "assistant_acknowledgment": "Assistant",
        }  # fmt: skip
        if missing := [name for name in names if not isinstance(turns.get(name), str)]:
            raise record.error(f"field 'conversation' lacks {missing[0]!r}")
        yield "\n".join(f"{who}: {turns[name]}" for name, who in names.items())
        return
    for turn in turns.values():
        if turn is None:
            continue  # the Hub's copy has columns for turns that a conversation does not reach
        if not isinstance(turn, Mapping) or not {"user", "assistant"} <= turn.keys():
            raise record.error("field 'conversation': a turn lacks 'user' or 'assistant'")
        yield f"User: {turn['user']}\nAssistant: {turn['assistant']}"


def _prism(items: Sequence[Record]) -> list[_Asked]:
    """PRISM's utterances: opening prompts with the answers of up to four models, one of which was chosen."""
    by_interaction: dict[str, list[Record]] = {}
    for record in items:
        if record.field("turn", int) == 0:
            by_interaction.setdefault(str(record.field("interaction_id")), []).append(record)
    found, ties = [], 0
    for number, records in by_interaction.items():
        answers = [one for one in records if one.field("model_response", str) != _EMPTY]
        chosen = [one for one in answers if one.field("if_chosen", bool)]
        taken = {str(one.value["model_response"]) for one in chosen}
        rejected = tuple(dict.fromkeys(str(one.value["model_response"]) for one in answers if one not in chosen))
        if len(taken) != 1 or not rejected or {*map(normalised, taken)} & {*map(normalised, rejected)}:
            ties += 1
            continue
        first = records[0]
        found.append(
            _Asked(first, str(first.field("user_id")), number, first.field("user_prompt", str), taken.pop(), rejected)
        )
    if ties:
        warn(
            f"{items[0].file}: {ties} interactions without one chosen and another rejected answer are left out",
            stacklevel=5,
        )
    if not found:
        raise items[0].error("no opening prompt (turn 0) has a chosen and a rejected answer")
    return found


def _interactions(record: Record) -> Iterator[_Asked]:
    """PersonalLLM's interaction database: a row a person, pair j in `prompt_j`, `response_j_a` and `response_j_b`."""
    user_id = str(record.field("person_id"))
    j = 1
    while record.has(f"prompt_{j}"):
        chosen = record.field(f"chosen_{j}", str)
        if chosen not in ("a", "b"):
            raise record.error(f"field 'chosen_{j}' is {chosen!r}; it says 'a' or 'b'")
        answers = {side: record.field(f"response_{j}_{side}", str) for side in "ab"}
        lost = answers["b" if chosen == "a" else "a"]
        yield _checked(_Asked(record, user_id, str(j), record.field(f"prompt_{j}", str), answers[chosen], (lost,)))
        j += 1


def _personamem(items: Sequence[Record], outputs: str | Path | None, load: Load) -> Iterator[_Asked]:
    """PersonaMem's questions, each with the conversations before it, out of the file of shared contexts."""
    if outputs is None:
        name = items[0].file
        raise items[0].error(
            f"its conversations stand in another file; give outputs='{name.replace('questions', 'shared_contexts')}'"
            if "questions" in name
            else "its conversations stand in another file; give outputs='shared_contexts_….jsonl'"
        )
    name, rows = load(outputs)
    contexts = {key: messages for row in rows for key, messages in row.items()}
    for record in items:
        key = record.field("shared_context_id", str)
        if key not in contexts:
            raise record.error(f"{name} holds no context {key!r}")
        stop = int(record.field("end_index_in_shared_context"))
        messages = [Record(f"{name}, {key}", index, one) for index, one in enumerate(contexts[key][:stop])]
        options = record.value["all_options"]
        try:
            texts = ast.literal_eval(options) if isinstance(options, str) else list(options)
        except (SyntaxError, ValueError):
            raise record.error("field 'all_options' is no list of texts") from None
        right, rejected = _chosen_of(record, texts, record.field("correct_answer", str))
        history = _numbered(_exchanges(messages))
        yield _checked(
            _Asked(
                record,
                str(record.field("persona_id")),
                str(record.field("question_id")),
                record.field("user_question_or_message", str),
                _OPTION.sub("", right),
                tuple(_OPTION.sub("", one) for one in rejected),
                TASKS["sessions"],
                tuple(Document(f"{key}/{one.id}", one.fields) for one in history),
            )
        )


def _prefeval(items: Sequence[Record], outputs: str | Path | None, load: Load) -> Iterator[_Asked]:
    """PrefEval: a preference, stated or shown in a conversation, and a question with four answers, the first right."""
    name, rows = load(outputs) if outputs is not None else (items[0].file, [record.value for record in items])
    if len(rows) != len(items):
        raise DataError(
            f"{name} holds {len(rows)} records, {items[0].file} {len(items)}; give the file of the same topic"
        )
    for record, row in zip(items, rows, strict=True):
        answered = Record(name, record.index, row)
        if not answered.has("classification_task_options"):
            raise answered.error(
                "field 'classification_task_options' is missing: these preferences come without answers; give the file "
                "of the same topic in mcq_options as outputs="
            )
        question = record.field("question", str)
        if answered.field("question", str) != question:
            raise answered.error(f"its question is not that of {record.file}; give the file of the same topic")
        options = answered.field("classification_task_options", (list, tuple))
        chosen, rejected = _chosen_of(answered, options, 0)
        number = str(record.index)
        if record.has("conversation"):
            task, history = _profile(record, "conversation")
        else:
            task, history = TASKS["preferences"], (Document(number, {"text": record.field("preference", str)}),)
        yield _checked(
            _Asked(record, f"{Path(record.file).stem}/{number}", number, question, chosen, rejected, task, history)
        )
