"""Users and their examples."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from dps_lens.data.documents import Document, Pool, Profile, start_of
from dps_lens.data.same import asked_parts
from dps_lens.data.tasks import Task
from dps_lens.errors import DataError
from dps_lens.literals import Discovery

MIN_PROFILE = 3


@dataclass(frozen=True)
class Example:
    """One task input of a user, with the answer that the user wrote or chose.

    Attributes:
        profile: the documents that were there when it was asked.
        rejected: answers to the same input that are not the user's: the one that lost in a pair, the other options of
            a choice.
    """

    id: str
    user_id: str
    task: Task
    input: str
    reference: str
    profile: Sequence[Document]
    rejected: tuple[str, ...] = ()

    def __repr__(self) -> str:
        about = f"{self.id!r} of {self.user_id!r}, {self.task.name}, {len(self.profile)} documents"
        over = f", not {start_of(self.rejected[0])}" if self.rejected else ""
        return f"Example({about}: {start_of(self.input)} → {start_of(self.reference)}{over})"

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """What is shown, asked for and rejected, as documents are compared with it."""
        return asked_parts(self.task, self.input, self.reference, *self.rejected)

    @cached_property
    def showable(self) -> Profile:
        """The documents that a prompt may show: the profile without those that hold the text that is asked for."""
        return Profile.of(self.profile, self.task).unlike(self.parts)

    def showable_of(self, donor: "User") -> Profile:
        """What a prompt may show of another user in place of the own profile: nothing that is in it, or asked for."""
        own = Profile.of(self.profile, self.task).pool.known
        shared = frozenset(place for place, parts in enumerate(donor.pool.parts) if parts in own)
        return Profile(donor.pool).less([shared]).unlike(self.parts)


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
    def pool(self) -> Pool:
        """The history, oldest first when dated, with what is worked out of it once."""
        documents = sorted(self.history, key=lambda one: one.date or "") if self.dated else self.history
        return Pool(documents, self.task)

    @cached_property
    def _asked_for(self) -> frozenset[int]:
        """Places of the documents that hold the text of an evaluation example."""
        ids = {example.id for example in self.examples}
        held = {place for place, document in enumerate(self.pool.documents) if document.id in ids}
        return frozenset(
            held.union(*(group for example in self.examples for group in self.pool.texts.like(example.parts)))
        )

    @cached_property
    def discovery_pool(self) -> tuple[Document, ...]:
        """The history without any document that holds the text of an evaluation example."""
        return tuple(Profile(self.pool, without=[self._asked_for]))

    def discovery_examples(self, discovery: Discovery = "history") -> tuple[Example, ...]:
        """Examples to find heads on, oldest first; no evaluation text is in them.

        Args:
            discovery: `"history"` turns documents into examples. In a dated history the profile of such
                an example is what is strictly older, at least 3 documents; in an undated one it is all
                the rest. No profile holds the text of its example, under whatever id. `"labelled"` takes the user's
                own labelled questions, which are then not to be used for evaluation.

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
        return self._from_history

    @cached_property
    def _from_history(self) -> tuple[Example, ...]:
        template = self.examples[0].input if self.examples else ""
        dates = [document.date or "" for document in self.pool.documents] if self.dated else []
        found = []
        for place, document in enumerate(self.pool.documents):
            pair = self.task.pair(document.fields, template)
            if pair is None or place in self._asked_for:
                continue
            stop = bisect_left(dates, dates[place]) if dates else None
            same = self.pool.texts.like_own(place)
            profile = Profile(self.pool, stop, [self._asked_for, frozenset([place]), *same])
            if len(profile) >= MIN_PROFILE:
                found.append(Example(document.id, self.id, self.task, *pair, profile, document.rejected))
        return tuple(found)
