"""Read users from LaMP and LongLaMP files, preferences, JSON lines, datasets, or the built-in probe."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any
from warnings import warn

import numpy as np

from dps_lens.checks import check_whole
from dps_lens.data.dates import iso_dates
from dps_lens.data.documents import Document, Pool, Profile
from dps_lens.data.examples import count_of
from dps_lens.data.fetch import folder_of
from dps_lens.data.fields import Record, TooShortError, id_of
from dps_lens.data.preferences import holds_preferences, read_preferences
from dps_lens.data.records import Example, User
from dps_lens.data.tasks import OF_PREFERENCES, TASKS, Task, find_task
from dps_lens.errors import DataError, reason
from dps_lens.files import parse_json, read_text

N_NEWEST = 2
_USER_FIELDS = ("user_id", "name", "author", "reviewerId")
_DATE_FIELDS = ("date", "year")
_NO_USER = "field 'user_id' is missing"
_HUB = {
    "longlamp": ("LongLaMP/LongLaMP", "val"),
    "rewardbench": ("QiyaoMa/Personalized-RewardBench", "test"),
    "prism": ("HannahRoseKirk/prism-alignment", "train"),
}


def load_users(
    source: Any,
    *,
    outputs: str | Path | None = None,
    task: str | None = None,
    max_users: int | None = None,
    strict: bool = False,
) -> list[User]:
    """Read users.

    Args:
        source: `"probe"` (12 built-in users, 3 styles × 4 topics); a LaMP questions file (its outputs are
            looked for beside it, or given); `"lamp-4"`, once `dps-lens fetch lamp-4` has run; LongLaMP records or
            plain documents as JSON lines (or a JSON list); a `datasets.Dataset` or a pandas data frame; a LongLaMP
            configuration on the Hub such as `"longlamp/topic_writing_user"`. A plain document is
            `{"user_id", "text", "title"}` with an optional `"id"` and `"date"`; the newest 2 of each user become
            evaluation examples. Documents of equal date stay in the order of the file. Or what people prefer:
            pairs `{"user_id", "prompt", "chosen", "rejected"}`, choices `{"user_id", "question", "options", "answer"}`,
            each with a `"profile"` or `"history"` of its own, or the newest 2 of each user for evaluation; and the
            files of Personalized-RewardBench, PRISM (`utterances.jsonl`), PersonalLLM's interaction database,
            PersonaMem and PrefEval; of the Hub `"rewardbench/Society_and_Culture"` and the like, `"prism/utterances"`.
        outputs: the LaMP outputs file, as `{"task", "golds": [{"id", "output"}]}` or the bare list; PersonaMem's
            contexts; PrefEval's file of options of the same topic.
        task: a task name, when neither the outputs nor the inputs tell it.
        max_users: the first so many users that can be used; what the file says of later ones is not looked at.
        strict: refuse a user whose history is too short, who else is left out with a warning.

    Raises:
        DataError: a file is missing or malformed, or no user can be used; the message names file, record and field.
    """
    if max_users is not None:
        check_whole(DataError, "load_users: max_users", max_users, least=1, why="None takes all")
    if isinstance(source, str) and source.lower().startswith("lamp-") and not os.path.isfile(source):
        fetched = folder_of(source.lower()) / "dev_questions.json"
        source = fetched if fetched.is_file() else source
    name, records = _open(str(source)) if isinstance(source, (str, Path)) else _rows(source)
    if not isinstance(source, (str, Path)):
        for index, record in enumerate(records):
            _check_whole(f"{name}, record {index}", record)
    items = [Record(name, index, value) for index, value in enumerate(records)]
    if not items:
        raise DataError(f"{name} holds no records")
    undecided: list[Record] = []
    preferences = holds_preferences(items[0]) and (task is None or task in OF_PREFERENCES)
    if preferences:
        users = read_preferences(items, outputs, lambda path: _open(str(path)), N_NEWEST, undecided)
    elif not items[0].has("profile"):
        users = _from_documents(items, task)
    else:
        golds, named = _golds(source, outputs) if not items[0].has("output") else ({}, None)
        users = _from_records(items, golds, task or named)
    found = _usable(name, users, max_users, strict)
    if undecided:
        plural = "s" if len(undecided) > 1 else ""
        warn(
            f"{name}: {len(undecided)} question{plural} left out, where not one answer is chosen and another rejected "
            f"(record {undecided[0].index} first)",
            stacklevel=2,
        )
    kinds = {user.task.name: user.id for user in found}
    if preferences and (len(kinds) > 1 or task not in (None, *kinds)):
        held = ", ".join(f"{kind} (user {user!r})" for kind, user in kinds.items())
        raise DataError(f"{name}: profiles must be of one kind, found {held}" + (f", asked for {task}" if task else ""))
    return found


def _usable(name: str, users: Mapping[str, Callable[[], User]], limit: int | None, strict: bool) -> list[User]:
    """The first users with a history that is long enough."""
    found: list[User] = []
    short: dict[str, TooShortError] = {}
    for user_id, make in users.items():
        if len(found) == limit:
            break
        try:
            found.append(make())
        except TooShortError as error:
            if strict:
                raise
            short[user_id] = error
    if short and not found:
        raise next(iter(short.values()))
    if short:
        warn(f"{name}: {count_of(list(short))}; {next(iter(short.values()))}", stacklevel=3)
    if partly := [user.id for user in found if not user.dated and any(one.date for one in user.history)]:
        warn(
            f"{name}: {len(partly)} users, {partly[0]!r} first, have documents without a date; their histories stay in "
            "the order of the file, and count as undated",
            stacklevel=3,
        )
    return found


@dataclass(frozen=True)
class _Found:
    """A document with its record, and the field that its date is in."""

    document: Document
    record: Record
    dated: str | None

    @property
    def date(self) -> Any:
        return self.record.value[self.dated] if self.dated else None

    @property
    def content(self) -> tuple[Any, ...]:
        return dict(self.document.fields), repr(self.date)


def _open(source: str) -> tuple[str, list[Any]]:
    if source == "probe":
        return "probe", _parse("probe", files("dps_lens.data").joinpath("probe.jsonl").read_text(encoding="utf-8"))
    path = Path(source).expanduser()
    if os.path.isfile(path):
        return path.name, _table(path.name, _read(path)) if path.suffix == ".csv" else _parse(path.name, _read(path))
    if source.lower().split("/")[0] in _HUB and "/" in source:
        return source, _from_hub(source)
    if source.lower().startswith("lamp-"):
        raise DataError(f"load_users: {source} is not on this machine; run: dps-lens fetch {source.lower()}")
    found = f"{source[:200]!r} is a folder" if os.path.isdir(path) else f"there is no file {source[:200]!r}"
    sets = ", ".join(f"'{name}/CONFIG'" for name in _HUB)
    raise DataError(f"load_users: {found}; give a file, 'probe', or of the Hub {sets}")


def _table(name: str, text: str) -> list[Any]:
    """The rows of a CSV file, whose first line names the fields."""
    longest = csv.field_size_limit(len(text) + 1)
    try:
        return list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise DataError(f"{name}: it is no CSV table ({error})") from error
    finally:
        csv.field_size_limit(longest)


def _rows(source: Any) -> tuple[str, list[Any]]:
    """Records that are in memory."""
    if not isinstance(source, Iterable) or isinstance(source, Mapping):
        raise DataError(f"load_users: {type(source).__name__} is no source; give a file, 'probe' or a list of records")
    to_dict = getattr(source, "to_dict", None) if hasattr(source, "iloc") else None
    return type(source).__name__, [_bare(row) for row in (to_dict("records") if to_dict else source)]


def _bare(row: Any) -> Any:
    """A row whose arrays, as parquet gives them to pandas, are lists."""
    if not isinstance(row, Mapping):
        return row
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in row.items()}


def _read(path: Path) -> str:
    return read_text(path, DataError)


def _parse(name: str, text: str) -> list[Any]:
    """A JSON list, or JSON lines."""
    if text.lstrip().startswith("["):
        return parse_json(text, name, DataError)
    lines = enumerate(text.split("\n"), start=1)
    return [parse_json(line, f"{name}, line {number}", DataError) for number, line in lines if line.strip()]


def _check_whole(where: str, record: Any) -> None:
    """Refuse what no JSON file could hold: half of a character, a record inside itself."""
    try:
        json.dumps(record, ensure_ascii=False, default=str, skipkeys=True).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: a text holds half of a character (\\ud800 to \\udfff alone); remove it") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{where}: it is nested too deeply, or inside itself ({reason(error)})") from error


def _from_hub(source: str) -> list[Any]:
    from datasets import load_dataset

    name, config = source.split("/", 1)
    repository, split = _HUB[name.lower()]
    try:
        return list(load_dataset(repository, config, split=split))
    except Exception as error:
        raise DataError(f"{source}: the Hub could not be read ({str(error).splitlines()[0]})") from error


def _golds(source: Any, outputs: str | Path | None) -> tuple[dict[str, Record], str | None]:
    """Answers by question id, and the task's name when the file gives it."""
    path = Path(outputs) if outputs else _outputs_beside(source)
    if path is None or not os.path.isfile(path):
        raise DataError(
            f"{source if isinstance(source, (str, Path)) else 'load_users'}: questions need their answers; "
            f"{f'there is no file {path}' if path else 'give outputs='}"
        )
    loaded = parse_json(_read(path), path.name, DataError)
    task, rows = (loaded.get("task"), loaded.get("golds")) if isinstance(loaded, Mapping) else (None, loaded)
    if not isinstance(rows, list) or not isinstance(task, str | None):
        raise DataError(f"{path.name}: expected a list of answers, or an object with 'golds' and a 'task' by name")
    golds: dict[str, Record] = {}
    for index, row in enumerate(rows):
        record = Record(path.name, index, row)
        known = golds.setdefault(str(record.field("id")), record)
        if known.value != record.value:
            raise record.error(f"field 'id' {record.value['id']!r} stands twice, with different answers")
    return golds, task


def _outputs_beside(source: Any) -> Path | None:
    """`dev_questions.json` → `dev_outputs.json` in the same folder."""
    if not isinstance(source, (str, Path)):
        return None
    path = Path(source).expanduser()
    return path.with_name(path.name.replace("questions", "outputs")) if "questions" in path.name else None


def _by_user(items: Iterable[Record], fields: tuple[str, ...]) -> dict[str, list[Record]]:
    """The records of each user, in the order of the file."""
    found: dict[str, list[Record]] = {}
    for record in items:
        name = record.first_of(fields)
        if name is None:
            raise record.error(f"field 'user_id' is missing (any of {', '.join(fields)})" if fields[1:] else _NO_USER)
        found.setdefault(str(record.field(name)), []).append(record)
    return found


def _from_records(items: list[Record], golds: Mapping[str, Record], hint: str | None) -> dict[str, Callable[[], User]]:
    """Users of questions: each record holds an input, an answer and a profile."""
    users = _by_user(items, (*_USER_FIELDS, "id"))
    return {user_id: partial(_user_of_questions, user_id, own, golds, hint) for user_id, own in users.items()}


def _user_of_questions(user_id: str, records: list[Record], golds: Mapping[str, Record], hint: str | None) -> User:
    """A user whose history is everything that the profiles of the questions hold."""
    examples: dict[str, Example] = {}
    profiles: dict[str, list[_Found]] = {}
    for record in records:
        example = _question(user_id, record, len(examples), golds, hint)
        if example.id in examples:
            raise record.error(f"field 'id' {example.id!r} stands twice for user {user_id!r}")
        examples[example.id], profiles[example.id] = example, _documents(record, example.task)
    history = _dated(_distinct(user_id, [found for profile in profiles.values() for found in profile]))
    place_of = {document.id: place for place, document in enumerate(history)}
    pools: dict[tuple[int, ...], Pool] = {}
    for name, profile in profiles.items():
        places = tuple(sorted({place_of[found.document.id] for found in profile}))
        pool = pools.setdefault(places, Pool((history[place] for place in places), examples[name].task))
        examples[name] = replace(examples[name], profile=Profile(pool))
    return User(user_id, next(iter(examples.values())).task, tuple(history), tuple(examples.values()))


def _question(user_id: str, record: Record, number: int, golds: Mapping[str, Record], hint: str | None) -> Example:
    """A question with its answer, without its profile."""
    task_input = str(record.field("input"))
    try:
        task = find_task(task_input, _profile(record), hint)
    except DataError as error:
        raise record.error(str(error)) from None
    example_id = str(record.value["id"]) if record.has("id") else f"{user_id}/{number}"
    if golds and example_id not in golds:
        raise record.error(f"no answer with id {example_id!r} in the outputs file")
    answer = golds[example_id] if golds else record
    return Example(example_id, user_id, task, task_input, str(answer.field("output")), ())


def _profile(record: Record) -> list[Any]:
    """The profile's items; LongLaMP topics that are called `input` and `output` get their usual names."""
    items = record.field("profile", list)
    for index, item in enumerate(items):
        Record(f"{record.file}, record {record.index}, profile", index, item).has("id")
    if all(isinstance(item, Mapping) and {"input", "output"} <= item.keys() for item in items):
        return [{**item, "summary": item["input"], "content": item["output"]} for item in items]
    return items


def _documents(record: Record, task: Task) -> list[_Found]:
    where = f"{record.file}, record {record.index}, profile"
    items = [Record(where, index, value) for index, value in enumerate(_profile(record))]
    if not items:
        raise record.error("field 'profile' is empty; without a history there are no preferences", TooShortError)
    return [_found(item, task) for item in items]


def _found(record: Record, task: Task, dates: tuple[str, ...] = _DATE_FIELDS) -> _Found:
    fields = {name: record.field(name) for name in task.fields}
    return _Found(Document(id_of(record, fields), fields), record, record.first_of(dates))


def _distinct(user_id: str, documents: Iterable[_Found]) -> list[_Found]:
    """Each document once.

    Raises:
        DataError: two of them share an id.
    """
    found: dict[str, _Found] = {}
    for one in documents:
        known = found.setdefault(one.document.id, one)
        if one.record.has("id") and known.content != one.content:
            raise one.record.error(
                f"field 'id' {one.document.id!r} stands twice for user {user_id!r}, with different contents; give "
                "every document of a user an id of its own, or none"
            )
    return list(found.values())


def _dated(documents: list[_Found]) -> list[Document]:
    """The documents with their dates in ISO form, oldest first where all have one."""

    def error(index: int, message: str) -> DataError:
        return documents[index].record.error(f"field {documents[index].dated!r}: {message}")

    dates = iso_dates([one.date for one in documents], error)
    found = [replace(one.document, date=iso) for one, iso in zip(documents, dates, strict=True)]
    return sorted(found, key=lambda one: one.date or "") if all(dates) else found


def _from_documents(items: list[Record], hint: str | None) -> dict[str, Callable[[], User]]:
    """Users of plain documents: the newest become evaluation examples, the rest their profile."""
    task = find_task("", [], hint) if hint else TASKS["lamp-4"]
    users = _by_user(items, ("user_id",))
    return {user_id: partial(_user_of_documents, user_id, own, task) for user_id, own in users.items()}


def _user_of_documents(user_id: str, records: list[Record], task: Task) -> User:
    last = records[-1]
    if len(records) <= N_NEWEST:
        raise last.error(
            f"user {user_id!r} has {len(records)} documents; more than {N_NEWEST} are needed, because the newest "
            f"{N_NEWEST} are kept for evaluation",
            TooShortError,
        )
    documents = _dated(_named_apart(user_id, [_found(record, task, ("date",)) for record in records]))
    pool = Pool(documents[:-N_NEWEST], task)
    template = "Generate a headline for the following article:" if task.name == "lamp-4" else ""
    examples = []
    for document in documents[-N_NEWEST:]:
        pair = task.pair(document.fields, template)
        if pair is None:
            raise last.error(f"field {task.target!r} of document {document.id!r} is empty", TooShortError)
        examples.append(Example(document.id, user_id, task, *pair, Profile(pool)))
    labels = {name: str(last.value[name]) for name in ("style", "topic") if last.has(name)}
    return User(user_id, task, pool.documents, tuple(examples), labels)


def _named_apart(user_id: str, documents: list[_Found]) -> list[_Found]:
    """Documents with ids of their own; equal ones without an id are numbered.

    Raises:
        DataError: an id of the file stands twice.
    """
    found: dict[str, _Found] = {}
    for one in documents:
        name, number = one.document.id, 1
        if one.record.has("id") and name in found:
            raise one.record.error(f"field 'id': document {name!r} of user {user_id!r} stands twice")
        while name in found:
            name, number = f"{one.document.id}-{number + 1}", number + 1
        found[name] = replace(one, document=replace(one.document, id=name))
    return list(found.values())
