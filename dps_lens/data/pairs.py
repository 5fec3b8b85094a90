"""Pairs from texts: for what a user wrote, what somebody else wrote to the most similar task is the rejected answer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dps_lens.checks import check_whole
from dps_lens.data.bm25 import Bm25
from dps_lens.data.records import User
from dps_lens.data.same import normalised
from dps_lens.data.words import retrieval_words, tokens_for
from dps_lens.errors import DataError

_NEAREST = 10


@dataclass(frozen=True)
class _Text:
    """What somebody wrote, to which task."""

    user_id: str
    document_id: str
    asked: str
    answer: str


class _Others:
    """The texts of some users, to be searched by what they were written to."""

    def __init__(self, users: Iterable[User]) -> None:
        self.texts = [
            _Text(user.id, document.id, user.task.query(pair[0]), pair[1])
            for user in users
            for document in user.discovery_pool
            if (pair := user.task.pair(document.fields, user.examples[0].input if user.examples else "")) is not None
        ]
        self.tokens = tokens_for(text.asked for text in self.texts)
        self.index = Bm25([retrieval_words(text.asked, self.tokens) for text in self.texts])

    def rejected(self, asked: str, answer: str, n: int, taken: set[tuple[str, str]]) -> list[_Text]:
        """Of the nearest texts those of the most similar length, `taken` and equal ones left out."""
        same = normalised(answer)
        found: list[_Text] = []
        scores = self.index.scores(retrieval_words(asked, self.tokens))
        for place in np.argsort(-scores, kind="stable").tolist():
            text = self.texts[place]
            known = {same, *(normalised(one.answer) for one in found)}
            if (text.user_id, text.document_id) not in taken and normalised(text.answer) not in known:
                found.append(text)
            if len(found) == max(_NEAREST, n):
                break
        return sorted(found, key=lambda text: abs(len(text.answer) - len(answer)))[:n]


def make_pairs(users: Sequence[User], *, same: str | None = None, n_rejected: int = 1) -> list[User]:
    """Give every text of every user a rejected answer: what another user wrote to the most similar task.

    Of the ten tasks in others' histories that BM25 finds nearest to the example's, the answer of the most similar
    length is taken; what evaluation examples reject, no discovery example does. The pairs tell whose text it is, not
    which is better. No prompt shows a text that its example rejects.

    Args:
        users: of one task whose documents hold pairs of input and answer.
        same: a label that the other user must share while all other labels differ: of the probe users, `"topic"` gives
            pairs of styles, and `"style"` pairs of topics.
        n_rejected: answers of others for each text.

    Raises:
        DataError: fewer than two users, several tasks, no such label, or nobody else with an answer.
    """
    check_whole(DataError, "make_pairs: n_rejected", n_rejected, least=1)
    if len({user.id for user in users}) < 2:
        raise DataError("make_pairs: rejected answers are other users'; give at least two")
    names = list(dict.fromkeys(user.task.name for user in users))
    if len(names) > 1 or not users[0].task.has_pairs:
        raise DataError(f"make_pairs: users must be of one task whose documents hold answers, found {', '.join(names)}")
    searched: dict[tuple[str, ...], _Others] = {}
    return [_paired(user, _others_of(user, users, same, searched), n_rejected) for user in users]


def _others_of(
    user: User, users: Sequence[User], same: str | None, searched: dict[tuple[str, ...], _Others]
) -> _Others:
    others = [one for one in users if one.id != user.id]
    if same is not None:
        if missing := [one for one in users if same not in one.labels]:
            known = sorted(missing[0].labels)
            raise DataError(f"make_pairs: user {missing[0].id!r} has no label {same!r}; it has {known}")
        rest = user.labels.keys() - {same}
        others = [
            one
            for one in others
            if one.labels[same] == user.labels[same] and all(one.labels.get(name) != user.labels[name] for name in rest)
        ]
    if not others:
        raise DataError(f"make_pairs: nobody shares the {same} {user.labels[str(same)]!r} with user {user.id!r}")
    key = tuple(one.id for one in others)
    if key not in searched:
        searched[key] = _Others(others)
    return searched[key]


def _paired(user: User, others: _Others, n: int) -> User:
    taken: set[tuple[str, str]] = set()

    def rejected(asked: str, answer: str, *, keep: bool) -> tuple[str, ...]:
        found = others.rejected(user.task.query(asked), answer, n, set() if keep else taken)
        if len(found) < n:
            raise DataError(f"make_pairs: user {user.id!r}: only {len(found)} other answers, asked for are {n}")
        if keep:
            taken.update((text.user_id, text.document_id) for text in found)
        return tuple(text.answer for text in found)

    template = user.examples[0].input if user.examples else ""
    examples = [replace(one, rejected=rejected(one.input, one.reference, keep=True)) for one in user.examples]
    history = []
    for document in user.history:
        pair = user.task.pair(document.fields, template)
        history.append(replace(document, rejected=rejected(*pair, keep=False)) if pair is not None else document)
    return replace(user, history=tuple(history), examples=tuple(examples))
