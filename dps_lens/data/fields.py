"""Records of a file, with where they stand, so that every complaint names file, record and field."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from dps_lens.data.dates import is_missing
from dps_lens.errors import DataError

_LONGEST = 500  # letters of a message, which may quote a field


class TooShortError(DataError):
    """A user who can be left out."""


@dataclass(frozen=True)
class Record:
    """One record, with where it stands, for error messages."""

    file: str
    index: int
    value: Any

    def error(self, message: str, kind: type[DataError] = DataError) -> DataError:
        return kind(f"{self.file}, record {self.index}: {message[:_LONGEST]}")

    def has(self, name: str) -> bool:
        if not isinstance(self.value, Mapping):
            raise self.error(f"expected an object, found {type(self.value).__name__}")
        return not is_missing(self.value.get(name))

    def field(self, name: str, kind: type | tuple[type, ...] = (str, Real)) -> Any:
        if not self.has(name):
            raise self.error(f"field {name!r} is missing")
        if not isinstance(self.value[name], kind):
            raise self.error(f"field {name!r} is {type(self.value[name]).__name__}")
        return self.value[name]

    def first_of(self, names: Iterable[str]) -> str | None:
        """The first of these fields that is there."""
        return next((name for name in names if self.has(name) and self.value[name] != ""), None)


def id_of(record: Record, fields: Mapping[str, Any]) -> str:
    """A document's own id, or one made of its content, so that equal documents are one."""
    if record.has("id"):
        return str(record.value["id"])
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:12]
