"""Which examples a run reads, and what stands for them in keys and digests."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TypeVar
from warnings import warn

from dps_lens.checks import check_whole
from dps_lens.data.documents import Profile
from dps_lens.data.records import MIN_PROFILE, Example, User
from dps_lens.digests import json_digest
from dps_lens.errors import DataError, ScoreError
from dps_lens.literals import Discovery

T = TypeVar("T")
_NAMED = 3


def newest(items: Sequence[T], n: int | None) -> Sequence[T]:
    """The last `n`, or all.

    Raises:
        DataError: nothing would be left.
    """
    if n is not None:
        check_whole(DataError, "max_examples", n, least=1, why="None takes all")
    return items[-n:] if n else items


def held_out_examples(call: str, users: Sequence[User], n: int | None) -> list[Example]:
    """The newest `n` evaluation examples of each user, user by user; users without one are left out with a warning.

    Raises:
        ScoreError: there is no user, or none with an evaluation example.
    """
    if not users:
        raise ScoreError(f"{call}: give at least one user")
    kept = [user for user in users if user.examples]
    if not kept:
        raise ScoreError(f"{call}: user {users[0].id!r} has no evaluation example, and no other user has one")
    if len(kept) < len(users):
        warn(f"{call}: {left_out(users, kept)}, without an evaluation example", stacklevel=3)
    return [example for user in kept for example in newest(user.examples, n)]


def with_examples(
    call: str, users: Sequence[User], discovery: Discovery = "history", *, strict: bool = False
) -> list[User]:
    """The users with at least one discovery example; the others are left out with a warning.

    Raises:
        ScoreError: no user has one, or, with `strict`, one has none.
    """
    kept = [user for user in users if user.discovery_examples(discovery)]
    short = [user for user in users if not user.discovery_examples(discovery)]
    if short and (strict or not kept):
        raise ScoreError(
            f"{call}: user {short[0].id!r} has no discovery example (a dated history needs more than {MIN_PROFILE} "
            f"different documents, this one has {len(short[0].discovery_pool)}); leave the user out"
        )
    if short:
        warn(f"{call}: {left_out(users, kept)}, with too short a history to find heads on", stacklevel=3)
    return kept


def choosing_examples(
    call: str, users: Sequence[User], discovery: Discovery, n: int | None, *, strict: bool = False
) -> list[Example]:
    """The newest `n` discovery examples of each user, on which heads are chosen, user by user.

    Raises:
        ScoreError: as `with_examples`.
    """
    kept = with_examples(call, users, discovery, strict=strict)
    return [example for user in kept for example in newest(user.discovery_examples(discovery), n)]


def left_out(users: Sequence[User], kept: Sequence[User]) -> str:
    """How many users are left out, and the first of them."""
    there = {user.id for user in kept}
    return count_of([user.id for user in users if user.id not in there])


def count_of(user_ids: Sequence[str]) -> str:
    """How many users are left out, and the first of them by name."""
    named = ", ".join(map(repr, user_ids[:_NAMED]))
    more = f" and {len(user_ids) - _NAMED} more" if len(user_ids) > _NAMED else ""
    return f"{len(user_ids)} user{'s are' if len(user_ids) > 1 else ' is'} left out ({named}{more})"


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
    """A digest of everything that results take from users and examples, in their order: texts, dates, ids, tasks."""

    def asked(of: Sequence[Example]) -> list[Any]:
        profiles = [Profile.of(e.profile, e.task).digest() for e in of]
        named = [[unit_key(e), asdict(e.task), e.input, e.reference, *e.rejected] for e in of]
        return list(zip(named, profiles, strict=True))

    people = [[u.id, asdict(u.task), dict(u.labels), u.pool.digest, asked(u.examples)] for u in users]
    return json_digest([people, asked(examples)])
