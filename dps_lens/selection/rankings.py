"""Which heads each user is tested with: rankings of families, chosen without the user's evaluation data."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias
from warnings import warn

from dps_lens.data import Example, User
from dps_lens.errors import HeadError, ScoreError
from dps_lens.found import FoundHeads
from dps_lens.heads import HeadSet
from dps_lens.literals import Select
from dps_lens.scores import HeadScores

HeadSource: TypeAlias = HeadScores | FoundHeads | HeadSet | Sequence[HeadSet] | Mapping[str, HeadSet]
"""Scores; a set that was found; a ranking, best head first; nested sets, one for each k; or a ranking for each user."""

Rankings: TypeAlias = dict[str, dict[str, list[HeadSet]]]
"""Family → user → one set for each k."""

N_FOLDS = 5


def rankings(
    call: str,
    families: Mapping[str, HeadSource],
    users: Sequence[User],
    ks: Sequence[int],
    select: "Select | Mapping[str, Select]" = "global",
    exclude: Mapping[str, HeadSet] | None = None,
    seed: int = 0,
) -> tuple[Rankings, dict[str, str]]:
    """The heads of every family for every user, and the families that are not defined, with the reason.

    Args:
        call: the public function, for errors.
        families: what is compared.
        users: who is tested.
        ks: sizes of the sets.
        select: `"user"` ranks by a user's own discovery examples; reference families have none and keep their one
            ranking. `"global"` ranks by all users; where the scores
            hold the tested users, by those in other folds, so that nobody is tested with heads that the
            same person chose. One for all families or one a family. Sets of `find_heads` were fitted without each of
            their own folds of users, and know only `"global"`.
        exclude: family → heads that its ranking by scores may not hold.
        seed: of the folds.

    Raises:
        HeadError: a ranking holds fewer heads than asked for.
        ScoreError: a user is missing from a family.
    """
    if not families or not users or not ks or min(ks) < 0:
        raise ScoreError(f"{call}: give at least one family, one user and one k that is not negative")
    if strangers := {*(exclude or {}), *(() if isinstance(select, str) else select)} - {*families}:
        raise ScoreError(f"{call}: {sorted(strangers)[0]!r} in exclude or select is not among the families")
    for name in exclude or {}:
        if not isinstance(families[name], HeadScores):
            raise ScoreError(
                f"{call}: exclude needs scores for family {name!r}; leave the heads out of its sets yourself"
            )
    sets: Rankings = {}
    undefined = undefined_of(families)
    for name, family in families.items():
        if name in undefined:
            warn(f"{call}: family {name!r} is left out: {undefined[name]}", stacklevel=3)
            continue
        how = select if isinstance(select, str) else select.get(name, "global")
        if how not in ("global", "user"):
            raise ScoreError(f"{call}: select {how!r} is unknown; use 'global' or 'user'")
        sets[name] = _of_family(call, name, family, users, ks, how, (exclude or {}).get(name), seed)
    if not sets:
        raise ScoreError(f"{call}: no family is defined: {undefined}")
    return sets, undefined


def undefined_of(families: Mapping[str, HeadSource]) -> dict[str, str]:
    """Families that the model does not show, with the reason."""
    return {
        name: str(family.manifest.get("reason", "NaN scores"))
        for name, family in families.items()
        if isinstance(family, HeadScores) and not family.defined
    }


def folds(users: Sequence[User], seed: int) -> list[list[str]]:
    """User ids in at most 5 random groups of nearly equal size."""
    ids = sorted(user.id for user in users)
    random.Random(f"folds|{seed}").shuffle(ids)
    n = min(N_FOLDS, len(ids))
    return [ids[index::n] for index in range(n)]


def _of_family(
    call: str,
    name: str,
    family: HeadSource,
    users: Sequence[User],
    ks: Sequence[int],
    select: Select,
    exclude: HeadSet | None,
    seed: int,
) -> dict[str, list[HeadSet]]:
    most = max(ks)
    if isinstance(family, HeadScores):
        tested = {user.id for user in users}
        if select == "user" and family.manifest.get("call") != "reference_heads":
            ranked = {user.id: family.top(most, user.id, exclude=exclude, label=name) for user in users}
        elif tested & set(family.users):
            ranked = {}
            for fold in folds(users, seed):
                if not set(family.users) - set(fold):
                    raise ScoreError(
                        f"{call}: family {name!r} was chosen by the tested users alone, too few to cross-fit; use "
                        "select='user', or pass its heads, scores.top(k)"
                    )
                others = family.without(fold)
                ranked |= dict.fromkeys(fold, others.top(most, exclude=exclude, label=name))
        else:
            ranked = dict.fromkeys(tested, family.top(most, exclude=exclude, label=name))
        return {user: [_prefix(call, name, heads, k) for k in ks] for user, heads in ranked.items()}
    if isinstance(family, FoundHeads):
        if select == "user":
            raise ScoreError(
                f"{call}: family {name!r} was found for all users together; use select='global' for it, or find heads "
                "for each user, {user.id: find_heads(…, [user], against='no_profile').heads}"
            )
        if most > family.k:
            raise HeadError(f"{call}: family {name!r} was found for k={family.k}, asked for {most} heads; lower ks")
        # A fit that bounds kept short is tested whole.
        return {user: [heads[:k] for k in ks] for user, heads in _found(call, name, family, users)}
    if isinstance(family, HeadSet):
        return {user.id: [_prefix(call, name, family, k) for k in ks] for user in users}
    if isinstance(family, Mapping):
        missing = [user.id for user in users if user.id not in family]
        if missing:
            raise ScoreError(f"{call}: family {name!r} holds no heads for user {missing[0]!r}")
        return {user.id: [_prefix(call, name, family[user.id], k) for k in ks] for user in users}
    return {user.id: [_nested(call, name, family, k) for k in ks] for user in users}


def _found(call: str, name: str, family: FoundHeads, users: Sequence[User]) -> Iterator[tuple[str, HeadSet]]:
    """Each user's set, of the fit that left the user out; the whole set for users who chose none."""
    own = {*family.users}
    for user in users:
        if user.id in own and not family.folds:
            raise ScoreError(
                f"{call}: family {name!r} was chosen by user {user.id!r}, who is tested, and no fit left the user out; "
                "find it with FindConfig(folds=True) and at least two users, or pass its heads, found.heads"
            )
        yield user.id, family.of_user(user.id)


def _prefix(call: str, name: str, heads: HeadSet, k: int) -> HeadSet:
    if k > len(heads):
        raise HeadError(f"{call}: family {name!r} ranks {len(heads)} heads, asked for {k}; lower ks")
    return heads[:k]


def _nested(call: str, name: str, sets: Sequence[HeadSet], k: int) -> HeadSet:
    by_size = {len(heads): heads for heads in (HeadSet(), *sets)}
    if k not in by_size:
        raise HeadError(f"{call}: family {name!r} has sets of {sorted(by_size)} heads, none of {k}")
    smaller = [heads for size, heads in by_size.items() if size < k]
    if any(len(heads - by_size[k]) for heads in smaller):
        raise HeadError(f"{call}: the sets of family {name!r} are not nested")
    return by_size[k]


def check_held_out(call: str, scores: HeadScores | FoundHeads, examples: Sequence[Example]) -> None:
    """Refuse examples that the scores were measured on, or the heads found.

    Raises:
        ScoreError: names one of them.
    """
    measured = set(zip(scores.user_ids, scores.example_ids, strict=True))
    shared = [example for example in examples if (example.user_id, example.id) in measured]
    if shared:
        raise ScoreError(
            f"{call}: the heads were chosen on {len(shared)} of these examples, such as {shared[0].id!r} of user "
            f"{shared[0].user_id!r}; evaluate on other examples"
        )
