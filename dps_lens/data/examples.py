"""Which examples a run reads, and what stands for them in keys and digests."""

import hashlib
import json
from collections.abc import Sequence
from typing import TypeVar

from dps_lens.data.documents import Profile
from dps_lens.data.records import Example, User
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


def key_of(*names: str) -> str:
    """Names put together so that no two lists of names give one key, whatever the names hold.

    >>> key_of("a", "b"), key_of("a|b")
    ('a|b', 'a\\\\|b')
    """
    return "|".join(name.replace("\\", "\\\\").replace("|", "\\|") for name in names)


def unit_key(example: Example) -> str:
    """The key of what is measured on an example: its user and its id, which is unique within the user only."""
    return key_of(example.user_id, example.id)


def by_key(examples: Sequence[Example]) -> dict[str, Example]:
    """Examples by the keys of their units.

    Raises:
        DataError: a user has two examples with one id.
    """
    found: dict[str, Example] = {}
    for example in examples:
        if unit_key(example) in found:
            raise DataError(
                f"example {example.id!r} of user {example.user_id!r} stands twice; give each an id of its own"
            )
        found[unit_key(example)] = example
    return found


def data_digest(users: Sequence[User], examples: Sequence[Example]) -> str:
    """A digest of every text that results depend on."""
    texts = [[user.id, user.pool.digest] for user in users]
    asked = [[unit_key(e), e.input, e.reference, Profile.of(e.profile, e.task).digest()] for e in examples]
    return hashlib.sha256(json.dumps([texts, asked]).encode()).hexdigest()[:16]
