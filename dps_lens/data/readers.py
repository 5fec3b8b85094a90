"""Read users from LaMP and LongLaMP files, JSON lines, datasets, or the built-in probe."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from dps_lens.data.fetch import folder_of
from dps_lens.data.records import Document, Example, User
from dps_lens.data.tasks import TASKS, Task, find_task
from dps_lens.errors import DataError
from dps_lens.files import parse_json, read_text, reason

N_NEWEST = 2
_LONGEST = 500  # letters of a message, which may quote a field
_USER_FIELDS = ("user_id", "name", "author", "reviewerId")


def load_users(
    source: Any, *, outputs: str | Path | None = None, task: str | None = None, max_users: int | None = None
) -> list[User]:
    """Read users.

    Args:
        source: `"probe"` (12 built-in users, 3 styles × 4 topics); a LaMP questions file (its outputs are
            looked for beside it, or given); `"lamp-4"`, once `dps-lens fetch lamp-4` has run; LongLaMP records or
            plain documents as JSON lines (or a JSON list); a `datasets.Dataset`; a LongLaMP configuration on the
            Hub such as `"longlamp/topic_writing_user"`. A plain document is `{"user_id", "text", "title"}` with
            an optional `"id"` and `"date"`; the newest 2 of each user become evaluation examples.
        outputs: the LaMP outputs file, as `{"task", "golds": [{"id", "output"}]}` or the bare list.
        task: a task name, when neither the outputs nor the inputs tell it.
        max_users: stop after so many users.

    Raises:
        DataError: a file is missing or malformed; the message names file, record and field.
    """
    if isinstance(source, str) and source.lower().startswith("lamp-") and not os.path.isfile(source):
        fetched = folder_of(source.lower()) / "dev_questions.json"
        source = fetched if fetched.is_file() else source
    if isinstance(source, (str, Path)):
        name, records = _open(str(source))
    elif isinstance(source, Iterable) and not isinstance(source, Mapping):
        name, records = type(source).__name__, list(source)
        for index, record in enumerate(records):
            _check_whole(f"{name}, record {index}", record)
    else:
        raise DataError(f"load_users: {type(source).__name__} is no source; give a file, 'probe' or a list of records")
    items = [_Record(name, index, value) for index, value in enumerate(records)]
    if not items:
        raise DataError(f"{name} holds no records")
    if not items[0].has("profile"):
        users = _from_documents(items, task)
    else:
        golds, named = _golds(source, outputs) if not items[0].has("output") else ({}, None)
        users = _from_records(items, golds, task or named)
    return users[:max_users]


@dataclass(frozen=True)
class _Record:
    """One record, with where it stands, for error messages."""

    file: str
    index: int
    value: Any

    def error(self, message: str) -> DataError:
        return DataError(f"{self.file}, record {self.index}: {message[:_LONGEST]}")

    def has(self, name: str) -> bool:
        if not isinstance(self.value, Mapping):
            raise self.error(f"expected an object, found {type(self.value).__name__}")
        return self.value.get(name) is not None

    def field(self, name: str, kind: type | tuple[type, ...] = (str, int, float)) -> Any:
        if not self.has(name):
            raise self.error(f"field {name!r} is missing")
        if not isinstance(self.value[name], kind):
            raise self.error(f"field {name!r} is {type(self.value[name]).__name__}")
        return self.value[name]


def _open(source: str) -> tuple[str, list[Any]]:
    if source == "probe":
        return "probe", _parse("probe", files("dps_lens.data").joinpath("probe.jsonl").read_text(encoding="utf-8"))
    path = Path(source).expanduser()
    if os.path.isfile(path):
        return path.name, _parse(path.name, _read(path))
    if source.lower().startswith("longlamp/"):
        return source, _from_hub(source)
    if source.lower().startswith("lamp-"):
        raise DataError(f"load_users: {source} is not on this machine; run: dps-lens fetch {source.lower()}")
    found = f"{source[:200]!r} is a folder" if os.path.isdir(path) else f"there is no file {source[:200]!r}"
    raise DataError(f"load_users: {found}; give a file, 'probe' or 'longlamp/CONFIG'")


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

    config = source.split("/", 1)[1]
    try:
        return list(load_dataset("LongLaMP/LongLaMP", config, split="val"))
    except Exception as error:
        raise DataError(f"{source}: the Hub could not be read ({str(error).splitlines()[0]})") from error


def _golds(source: Any, outputs: str | Path | None) -> tuple[dict[str, str], str | None]:
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
    records = [_Record(path.name, index, row) for index, row in enumerate(rows)]
    return {str(record.field("id")): str(record.field("output")) for record in records}, task


def _outputs_beside(source: Any) -> Path | None:
    """`dev_questions.json` → `dev_outputs.json` in the same folder."""
    if not isinstance(source, (str, Path)):
        return None
    path = Path(source).expanduser()
    return path.with_name(path.name.replace("questions", "outputs")) if "questions" in path.name else None


def _user_id(record: _Record) -> str:
    for name in (*_USER_FIELDS, "id"):
        if record.value.get(name) is not None:
            return str(record.value[name])
    raise record.error(f"field 'user_id' is missing (any of {', '.join(_USER_FIELDS)}, id)")


def _profile(record: _Record) -> list[Any]:
    """The profile's items; LongLaMP topics that are called `input` and `output` get their usual names."""
    items = record.field("profile", list)
    for index, item in enumerate(items):
        _Record(f"{record.file}, record {record.index}, profile", index, item).has("id")
    if all(isinstance(item, Mapping) and {"input", "output"} <= item.keys() for item in items):
        return [{**item, "summary": item["input"], "content": item["output"]} for item in items]
    return items


def _documents(record: _Record, task: Task) -> tuple[Document, ...]:
    found = []
    for index, value in enumerate(_profile(record)):
        item = _Record(f"{record.file}, record {record.index}, profile", index, value)
        fields = {name: item.field(name) for name in task.fields}
        date = value.get("date") or value.get("year")
        found.append(Document(_id_of(value, fields), fields, str(date) if date else None))
    if not found:
        raise record.error("field 'profile' is empty; a user without history has no preferences to find")
    return tuple(found)


def _id_of(value: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    """A document's own id, or one made of its content, so that equal documents are one."""
    if value.get("id") is not None:
        return str(value["id"])
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _from_records(items: list[_Record], golds: Mapping[str, str], hint: str | None) -> list[User]:
    """Users from questions: each record holds an input, an answer and a profile."""
    examples: dict[str, list[Example]] = {}
    for record in items:
        task_input = str(record.field("input"))
        try:
            task = find_task(task_input, _profile(record), hint)
        except DataError as error:
            raise record.error(str(error)) from None
        user_id = _user_id(record)
        example_id = str(record.value["id"] if record.has("id") else f"{user_id}/{len(examples.get(user_id, []))}")
        if any(example.id == example_id for example in examples.get(user_id, [])):
            raise record.error(f"field 'id' {example_id!r} stands twice for user {user_id!r}")
        if golds and example_id not in golds:
            raise record.error(f"no answer with id {example_id!r} in the outputs file")
        answer = golds[example_id] if golds else str(record.field("output"))
        profile = _documents(record, task)
        examples.setdefault(user_id, []).append(Example(example_id, user_id, task, task_input, answer, profile))
    return [_user(user_id, own) for user_id, own in examples.items()]


def _user(user_id: str, examples: list[Example], labels: Mapping[str, str] | None = None) -> User:
    """A user whose history is everything that the profiles of the examples hold."""
    history = list({document.id: document for example in examples for document in example.profile}.values())
    if all(document.date for document in history):
        history.sort(key=lambda document: document.date or "")
    return User(user_id, examples[0].task, tuple(history), tuple(examples), labels or {})


def _from_documents(items: list[_Record], hint: str | None) -> list[User]:
    """Users from plain documents: the newest become evaluation examples, the rest their profile."""
    task = TASKS[hint] if hint in TASKS else TASKS["lamp-4"]
    template = "Generate a headline for the following article:" if task.name == "lamp-4" else ""
    grouped: dict[str, list[tuple[Document, _Record]]] = {}
    for record in items:
        fields = {name: record.field(name) for name in task.fields}
        user_id, date = str(record.field("user_id")), record.value.get("date")
        document = Document(_id_of(record.value, fields), fields, str(date) if date else None)
        own = grouped.setdefault(user_id, [])
        if any(document.id == other.id for other, _ in own):
            raise record.error(f"document {document.id!r} of user {user_id!r} stands twice")
        own.append((document, record))
    return [_user_of_documents(user_id, own, task, template) for user_id, own in grouped.items()]


def _user_of_documents(user_id: str, own: Iterable[tuple[Document, _Record]], task: Task, template: str) -> User:
    pairs = list(own)
    if all(document.date for document, _ in pairs):
        pairs.sort(key=lambda pair: pair[0].date or "")
    documents, last = [document for document, _ in pairs], pairs[-1][1]
    if len(documents) <= N_NEWEST:
        raise last.error(
            f"user {user_id!r} has {len(documents)} documents; more than {N_NEWEST} are needed, because the newest "
            f"{N_NEWEST} are kept for evaluation"
        )
    history, newest = tuple(documents[:-N_NEWEST]), documents[-N_NEWEST:]
    examples = []
    for document in newest:
        pair = task.pair(document.fields, template)
        if pair is None:
            raise last.error(f"field {task.target!r} of document {document.id!r} is empty")
        examples.append(Example(document.id, user_id, task, *pair, history))
    labels = {name: str(last.value[name]) for name in ("style", "topic") if name in last.value}
    return User(user_id, task, history, tuple(examples), labels)
