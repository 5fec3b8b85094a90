"""Users, their documents and their examples."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from textwrap import shorten
from typing import Any

from dps_lens.data.tasks import Task
from dps_lens.errors import DataError
from dps_lens.literals import Discovery

MIN_PROFILE = 3


@dataclass(frozen=True)
class Document:
    """One earlier document of a user.

    Attributes:
        id: unique within the user's history.
        fields: the record's own fields, as its task names them (`title`, `text`, `score`, …).
        date: ISO date, or None when the history is undated.
    """

    id: str
    fields: Mapping[str, Any]
    date: str | None = None

    def __repr__(self) -> str:
        return f"Document({self.id!r}, {self.date or 'undated'}: {_start(' '.join(map(str, self.fields.values())))})"


@dataclass(frozen=True)
class Example:
    """One task input of a user, with the answer that the user wrote.

    Attributes:
        profile: the documents that a prompt may show for this example.
    """

    id: str
    user_id: str
    task: Task
    input: str
    reference: str
    profile: tuple[Document, ...]

    def __repr__(self) -> str:
        about = f"{self.id!r} of {self.user_id!r}, {self.task.name}, {len(self.profile)} documents"
        return f"Example({about}: {_start(self.input)} → {_start(self.reference)})"


@dataclass(frozen=True)
class User:
    """A user: the history that heads are found on, and the newest examples that they are tested on.

    Attributes:
        history: earlier documents, oldest first when dated, else in the order of the file.
        examples: evaluation examples.
        labels: whatever else the source says about the user (`style`, `topic`).
    """

    id: str
    task: Task
    history: tuple[Document, ...]
    examples: tuple[Example, ...]
    labels: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"User({self.id!r}, {self.task.name}, {len(self.history)} documents, {len(self.examples)} examples)"

    @property
    def dated(self) -> bool:
        """Every document of the history has a date."""
        return bool(self.history) and all(document.date for document in self.history)

    @cached_property
    def discovery_pool(self) -> tuple[Document, ...]:
        """The history without any document that an evaluation example asks for."""
        return tuple(
            d for d in self.history if not any(self.task.is_same_text(d.fields, d.id, e) for e in self.examples)
        )

    def discovery_examples(self, discovery: Discovery = "history") -> tuple[Example, ...]:
        """Examples to find heads on, oldest first; no evaluation text is in them.

        Args:
            discovery: `"history"` turns documents into examples. In a dated history the profile of such
                an example is what is strictly older, at least 3 documents; in an undated one it is all
                the rest. `"labelled"` takes the user's own labelled questions, which are then not to be
                used for evaluation.

        Raises:
            DataError: the task's history holds no task pairs (LaMP-1, LaMP-7).
        """
        if discovery == "labelled":
            return self.examples
        if discovery != "history":
            raise DataError(f"discovery {discovery!r} is unknown; use 'history' or 'labelled'")
        if not self.task.has_pairs:
            raise DataError(
                f"user {self.id}: a {self.task.name} history holds no task pairs to find heads on; use "
                "discovery='labelled' and evaluate on other users"
            )
        pool = self.discovery_pool
        template = self.examples[0].input if self.examples else ""
        found = []
        for document in pool:
            profile = self._profile_of(document, pool)
            pair = self.task.pair(document.fields, template)
            if pair and len(profile) >= MIN_PROFILE:
                found.append(Example(document.id, self.id, self.task, *pair, profile))
        return tuple(found)

    def _profile_of(self, document: Document, pool: tuple[Document, ...]) -> tuple[Document, ...]:
        if self.dated:
            return tuple(other for other in pool if other.date < document.date)  # type: ignore[operator]
        return tuple(other for other in pool if other is not document)


def _start(text: str) -> str:
    return shorten(text, 60, placeholder=" …")
