"""Read preferences as people state them: pairs of answers, choices among options, stated preferences, conversations.

Records of our own form, which is Personalized-RewardBench's (arXiv 2604.07343), too, and those of
`dps_lens.data.published`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dps_lens.data.asked import Asked, chosen_of, profile_of
from dps_lens.data.dates import iso_dates
from dps_lens.data.documents import Document, Pool, Profile
from dps_lens.data.fields import Record, TooShortError
from dps_lens.data.published import Load, contexts_of, interactions, options_of, personamem, prefeval, prism
from dps_lens.data.records import Example, User
from dps_lens.data.tasks import TASKS

_USER = ("user_id", "user", "person_id")
_QUESTION = ("prompt", "question", "input")
_HISTORY = ("profile", "history", "conversation")
_DATE = ("date", "year")


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
    items: Sequence[Record], outputs: str | Path | None, load: Load, n_newest: int, undecided: list[Record]
) -> dict[str, Callable[[], User]]:
    """Users by id, whose records are looked at when they are made.

    What is asked of one who has a profile of his own is for evaluation, else the newest are.

    Args:
        items: the records of a file.
        outputs: a second file: PersonaMem's contexts, or PrefEval's options in the order of the records.
        load: reads it.
        n_newest: how many of a user's pairs are kept for evaluation where the others are the history.
        undecided: gets a record for every question that is left out, because no answer is chosen beside another.
    """
    first = items[0]
    if first.has("if_chosen"):
        return _users(items, lambda record: record.field("user_id"), partial(prism, undecided), n_newest)
    if first.has("chosen_1"):
        pairs = _each(partial(interactions, undecided))
        return _users(items, lambda record: record.field("person_id"), pairs, n_newest)
    if first.has("all_options"):
        contexts = contexts_of(items, outputs, load)
        read = _each(partial(personamem, contexts))
        return _users(items, lambda record: record.field("persona_id"), read, n_newest)
    if first.has("preference"):
        options = options_of(items, outputs, load)
        read = _each(partial(prefeval, options))
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
    read: Callable[[Sequence[Record]], list[Asked]],
    n_newest: int,
) -> dict[str, Callable[[], User]]:
    by_user: dict[str, list[Record]] = {}
    for record in items:
        by_user.setdefault(str(owner(record)), []).append(record)
    return {user_id: partial(_user, user_id, own, read, n_newest) for user_id, own in by_user.items()}


def _each(read: Callable[[Record], Iterable[Asked]]) -> Callable[[Sequence[Record]], list[Asked]]:
    return lambda records: [asked for record in records for asked in read(record)]


def _user(
    user_id: str, records: Sequence[Record], read: Callable[[Sequence[Record]], list[Asked]], n_newest: int
) -> User:
    asked = read(records)
    if not asked:
        raise records[0].error(f"user {user_id!r} has no pair of a chosen and a rejected answer", TooShortError)
    seen: dict[str, Asked] = {}
    for one in asked:
        if one.id in seen:
            raise one.record.error(f"field 'id' {one.id!r} stands twice for user {user_id!r}")
        if (one.task, one.history is None) != (asked[0].task, asked[0].history is None):
            raise one.record.error(f"user {user_id!r} has profiles of several kinds; they must be of one")
        seen[one.id] = one
    return _with_profiles(user_id, asked) if asked[0].history is not None else _from_pairs(user_id, asked, n_newest)


def _with_profiles(user_id: str, asked: Sequence[Asked]) -> User:
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


def _from_pairs(user_id: str, asked: Sequence[Asked], n_newest: int) -> User:
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


def _plain(record: Record) -> Iterator[Asked]:
    """A pair or a choice with, perhaps, a profile: Personalized-RewardBench's layout, and ours."""
    history, asked = record.first_of(_HISTORY), record.first_of(_QUESTION)
    if asked is None:
        raise record.error(f"field 'prompt' is missing (any of {', '.join(_QUESTION)})")
    options = record.has("options")
    if options:
        chosen, rejected = chosen_of(record, record.field("options", (list, tuple)), record.field("answer"))
    else:
        chosen, lost = _answer(record, "chosen"), record.field("rejected", (str, list, tuple))
        several = not isinstance(lost, str) and all(isinstance(one, str) for one in lost)
        rejected = tuple(lost) if several else (_answer(record, "rejected"),)
    task, documents = TASKS["choices" if options else "pairs"], None
    if history is not None:
        task, documents = profile_of(record, history)
    yield Asked(record, _number(record), _prompt(record, asked), chosen, rejected, task, documents)


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
