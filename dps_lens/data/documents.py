"""Documents, and the parts of a history that prompts are filled from."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from textwrap import shorten
from typing import Any, overload

from dps_lens.data.bm25 import Bm25
from dps_lens.data.same import Parts, SameTexts, document_parts
from dps_lens.data.tasks import Task
from dps_lens.data.words import RetrievalTokens, retrieval_words, tokens_for


@dataclass(frozen=True)
class Document:
    """One earlier document of a user.

    Attributes:
        id: unique within the user's history.
        fields: the record's own fields, as its task names them (`title`, `text`, `score`, …).
        date: in ISO form, such as `2021-03-04`, or None when it is undated.
        rejected: answers that are not the user's to what the document answers; no prompt shows them.
    """

    id: str
    fields: Mapping[str, Any]
    date: str | None = None
    rejected: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Document({self.id!r}, {self.date or 'undated'}: {start_of(' '.join(map(str, self.fields.values())))})"


def start_of(text: str) -> str:
    """The first words, for a line of output."""
    return shorten(text, 60, placeholder=" …")


class Pool:
    """Documents of one task, with what is worked out of them once for all profiles that are parts of them.

    Attributes:
        documents: oldest first when dated.
    """

    def __init__(self, documents: Iterable[Document], task: Task) -> None:
        self.documents, self._task = tuple(documents), task
        self._indices: dict[str, Bm25] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"documents": self.documents, "_task": self._task, "_indices": {}}

    @cached_property
    def parts(self) -> list[Parts]:
        """The texts of every document, normalised."""
        return [document_parts(self._task, document.fields) for document in self.documents]

    @cached_property
    def known(self) -> frozenset[Parts]:
        """The documents by their texts."""
        return frozenset(self.parts)

    @cached_property
    def held(self) -> frozenset[str]:
        """Every text of every document, normalised."""
        return frozenset(part for parts in self.parts for part in parts)

    @cached_property
    def texts(self) -> SameTexts:
        """Finds documents by their texts."""
        return SameTexts(self.parts)

    @cached_property
    def tokens(self) -> RetrievalTokens:
        """How retrieval splits these documents where nothing is asked for."""
        return tokens_for(self._read())

    def index(self, tokens: RetrievalTokens) -> Bm25:
        """For retrieval over these documents."""
        if tokens not in self._indices:
            self._indices[tokens] = Bm25([retrieval_words(text, tokens) for text in self._read()])
        return self._indices[tokens]

    def _read(self) -> Iterator[str]:
        return ("".join(self._task.parts(document.fields)) for document in self.documents)

    @cached_property
    def digest(self) -> str:
        """Of everything that the documents hold."""
        held = [[one.id, one.date, dict(one.fields), *one.rejected] for one in self.documents]
        return hashlib.sha256(json.dumps(held, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Profile(Sequence[Document]):
    """A part of a pool: its first documents without some.

    Args:
        pool: the documents.
        stop: how many of them; all by default.
        without: groups of documents that are left out, by their places in the pool.
    """

    def __init__(self, pool: Pool, stop: int | None = None, without: Iterable[frozenset[int]] = ()) -> None:
        self.pool, self.stop = pool, len(pool.documents) if stop is None else stop
        self._without = tuple(without)

    @classmethod
    def of(cls, documents: Sequence[Document], task: Task) -> "Profile":
        """Any documents as a profile."""
        return documents if isinstance(documents, Profile) else cls(Pool(documents, task))

    def unlike(self, parts: Parts) -> "Profile":
        """The same without documents that hold one of these texts."""
        return self.less(self.pool.texts.like(parts))

    def less(self, without: Iterable[frozenset[int]]) -> "Profile":
        """The same without more of its documents."""
        return Profile(self.pool, self.stop, (*self._without, *without))

    @cached_property
    def left_out(self) -> list[int]:
        """Places in the pool, before the end of this part, that do not belong to it."""
        return sorted({place for group in self._without for place in group if place < self.stop})

    @property
    def places(self) -> list[int]:
        """Places in the pool that belong to it."""
        left_out = set(self.left_out)
        return [place for place in range(self.stop) if place not in left_out]

    def __len__(self) -> int:
        return self.stop - len(self.left_out)

    def __iter__(self) -> Iterator[Document]:
        return (self.pool.documents[place] for place in self.places)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Document, ...]: ...
    def __getitem__(self, index: int | slice) -> Document | tuple[Document, ...]:
        if isinstance(index, slice):
            return tuple(self)[index]
        place = range(len(self))[index]
        for left_out in self.left_out:
            place += left_out <= place
        return self.pool.documents[place]

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, Profile | tuple) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Profile({len(self)} documents)"

    def digest(self) -> list[Any]:
        """What the profile holds, in few words."""
        return [self.pool.digest, self.stop, self.left_out]
