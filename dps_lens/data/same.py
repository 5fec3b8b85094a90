"""Which documents hold the same text, whatever their ids: reposts, revisions, quotations."""

import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeAlias

import regex

from dps_lens.data.tasks import Task

_SHORTEST, _BEGINNING = 40, 80
_DROPPED = regex.compile(r"[\p{P}\p{Z}\p{C}\uFE00-\uFE0F]+")
_NONE: frozenset[int] = frozenset()

Parts: TypeAlias = tuple[str, ...]
"""A document's texts, or those of a question and its answer, normalised."""


def normalised(value: object) -> str:
    """A text as it is compared: NFKC, casefolded, without whitespace, punctuation and control characters.

    >>> normalised("It's  RAINING - again…") == normalised("it’s raining again")
    True
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", str(value)).casefold())
    return _DROPPED.sub("", text) or "".join(text.split())


def document_parts(task: Task, fields: Mapping[str, Any]) -> Parts:
    """The texts of a document that say which one it is: its body and, unless it is one of few, its answer."""
    names = (task.body,) if task.closed or task.target in (None, task.body) else (task.body, str(task.target))
    return tuple(filter(None, (normalised(fields[name]) for name in names)))


def asked_parts(task: Task, task_input: str, *answers: str) -> Parts:
    """What a question shows and, unless they are of few, its answers."""
    texts = (task.query(task_input),) if task.closed else (task.query(task_input), *answers)
    return tuple(filter(None, map(normalised, texts)))


def _beginning(part: str) -> str | None:
    """How a text is known where it is revised, cut or quoted: its first half, at least 80 characters."""
    return part[: max(_BEGINNING, len(part) // 2)] if len(part) >= _SHORTEST else None


def _beginnings(parts: Parts) -> list[str]:
    return [found for part in parts if (found := _beginning(part))]


class SameTexts:
    """Finds a text again among documents.

    Two texts are the same when they are equal once normalised, or when the beginning of one (its first half, at least
    80 characters; texts under 40 have none) stands in the other.

    Args:
        parts: of every document.
    """

    def __init__(self, parts: Sequence[Parts]) -> None:
        self._parts = parts
        self._equal = _grouped((part, index) for index, own in enumerate(parts) for part in own)
        self._begun = _grouped((begun, index) for index, own in enumerate(parts) for begun in _beginnings(own))
        # The lengths of beginnings by their first characters, so that a text is searched once for all of them.
        self._lengths: dict[str, set[int]] = {}
        for begun in self._begun:
            self._lengths.setdefault(begun[:_SHORTEST], set()).add(len(begun))

    def like(self, parts: Parts) -> tuple[frozenset[int], ...]:
        """The documents that hold one of these texts, in groups that may overlap."""
        return self._groups(parts, self._begun_in(parts), self._search)

    def like_own(self, index: int) -> tuple[frozenset[int], ...]:
        """The same for a document of these, itself included."""
        return self._groups(
            self._parts[index], self._begun_in_own[index], lambda begun: self._holding.get(begun, _NONE)
        )

    def _groups(
        self, parts: Parts, begun: Iterable[str], holding: Callable[[str], frozenset[int]]
    ) -> tuple[frozenset[int], ...]:
        equal = (self._equal.get(part, _NONE) for part in parts)
        return tuple({*equal, *map(self._begun.__getitem__, begun), *map(holding, _beginnings(parts))} - {_NONE})

    def _begun_in(self, parts: Parts) -> set[str]:
        """Beginnings of documents that stand in a text."""
        found = set()
        for part in parts:
            for start in range(len(part) - _SHORTEST + 1):
                for length in self._lengths.get(part[start : start + _SHORTEST], ()):
                    if (begun := part[start : start + length]) in self._begun:
                        found.add(begun)
        return found

    @cached_property
    def _begun_in_own(self) -> list[set[str]]:
        return [self._begun_in(parts) for parts in self._parts]

    @cached_property
    def _holding(self) -> dict[str, frozenset[int]]:
        """The documents in which a document's beginning stands."""
        return _grouped((begun, index) for index, found in enumerate(self._begun_in_own) for begun in found)

    @cached_property
    def _whole(self) -> tuple[str, list[int]]:
        texts = ["\n".join(parts) for parts in self._parts]
        return "\n\n".join(texts), list(accumulate(len(text) + 2 for text in texts))

    def _search(self, begun: str) -> frozenset[int]:
        (whole, ends), found = self._whole, set()
        position = whole.find(begun)
        while position >= 0:
            found.add(index := bisect_right(ends, position))
            position = whole.find(begun, ends[index])
        return frozenset(found)


def _grouped(pairs: Iterable[tuple[str, int]]) -> dict[str, frozenset[int]]:
    found: dict[str, set[int]] = {}
    for text, index in pairs:
        found.setdefault(text, set()).add(index)
    return {text: frozenset(indices) for text, indices in found.items()}
