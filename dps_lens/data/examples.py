"""Which examples a run reads, and what stands for them in keys and digests."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import xxhash

from dps_lens.data.records import Document, Example, User
from dps_lens.errors import DataError, ScoreError

T = TypeVar("T")


def newest(items: Sequence[T], n: int | None) -> Sequence[T]:
    """The last `n`, or all.

    Raises:
        DataError: nothing would be left.
    """
    if n is not None and n < 1:
        raise DataError(f"max_examples {n} leaves nothing; give a number from 1 up, or None for all")
    return items[-n:] if n else items


def held_out_examples(call: str, users: Sequence[User], n: int | None) -> list[Example]:
    """The newest `n` evaluation examples of each user, user by user.

    Raises:
        ScoreError: there is no user, or one without an evaluation example.
    """
    if not users:
        raise ScoreError(f"{call}: give at least one user")
    for user in users:
        if not user.examples:
            raise ScoreError(f"{call}: user {user.id!r} has no evaluation example; leave the user out")
    return [example for user in users for example in newest(user.examples, n)]


def unit_key(example: Example) -> str:
    """The key of what is measured on an example."""
    return f"{example.user_id}|{example.id}"


def by_key(examples: Sequence[Example]) -> dict[str, Example]:
    """Examples by the keys of their units."""
    return {unit_key(example): example for example in examples}


def data_digest(users: Sequence[User], examples: Sequence[Example]) -> str:
    """A digest of everything that results take from users and examples, in their order: texts, dates, ids, tasks."""
    known: dict[int, str] = {}  # a document stands in many profiles

    def documents(of: Sequence[Document]) -> list[str]:
        for one in of:
            if id(one) not in known:
                known[id(one)] = _digest([one.id, one.date, dict(one.fields)])
        return [known[id(one)] for one in of]

    def asked(of: Sequence[Example]) -> list[Any]:
        return [[e.id, e.user_id, asdict(e.task), e.input, e.reference, documents(e.profile)] for e in of]

    people = [[u.id, asdict(u.task), dict(u.labels), documents(u.history), asked(u.examples)] for u in users]
    return _digest([people, asked(examples)])


def _digest(value: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, default=str).encode())
