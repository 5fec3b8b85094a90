"""Pairs from texts: for what a user wrote, what somebody else wrote to the most similar task is the rejected answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool

from dps_lens.checks import check_whole
from dps_lens.data.bm25 import Bm25
from dps_lens.data.records import User
from dps_lens.data.same import SameTexts, normalised
from dps_lens.data.words import retrieval_words, tokens_for
from dps_lens.errors import DataError

_NEAREST = 10


def make_pairs(users: Sequence[User], *, same: str | None = None, n_rejected: int = 1) -> list[User]:
    """Give every text of every user a rejected answer: what another user wrote to the most similar task.

    Of the ten tasks in others' histories that BM25 finds nearest to the example's, the answer of the most similar
    length is taken, unless it stands in a text of the user's own; what evaluation examples reject, no discovery example
    does. The pairs tell whose text it is, not which is better. No prompt shows a text that its example rejects, but
    where answers are of few (LaMP-2, LaMP-3).

    Args:
        users: of one task whose documents hold pairs of input and answer.
        same: a label that the other user must share while all other labels differ: of the probe users, `"topic"` gives
            pairs of styles, and `"style"` pairs of topics.
        n_rejected: answers of others for each text.

    Raises:
        DataError: fewer than two users, several tasks, users with rejected answers already, no such label, or nobody
            else with an answer.
    """
    check_whole(DataError, "make_pairs: n_rejected", n_rejected, least=1)
    if len({user.id for user in users}) < 2:
        raise DataError("make_pairs: rejected answers are other users'; give at least two")
    names = list(dict.fromkeys(user.task.name for user in users))
    if len(names) > 1 or not users[0].task.has_pairs:
        raise DataError(f"make_pairs: users must be of one task whose documents hold answers, found {', '.join(names)}")
    for user in users:
        if any(example.rejected for example in user.examples) or any(one.rejected for one in user.history):
            raise DataError(f"make_pairs: texts of user {user.id!r} have rejected answers; use the users as they are")
        if same is not None and same not in user.labels:
            raise DataError(f"make_pairs: user {user.id!r} has no label {same!r}; it has {sorted(user.labels)}")
    texts = _Texts(users)
    return [_paired(user, texts, texts.of(_others(user, users, same)), n_rejected) for user in users]


@dataclass(frozen=True)
class _Text:
    """What somebody wrote, to which task, and as texts are compared."""

    user_id: str
    asked: str
    answer: str
    key: str


class _Texts:
    """The texts of all histories, to be searched by what they were written to."""

    def __init__(self, users: Sequence[User]) -> None:
        self.texts = [
            _Text(user.id, user.task.query(pair[0]), pair[1], normalised(pair[1]))
            for user in users
            for document in user.discovery_pool
            if (pair := user.task.pair(document.fields, _template(user))) is not None
        ]
        self.tokens = tokens_for(text.asked for text in self.texts)
        self.index = Bm25([retrieval_words(text.asked, self.tokens) for text in self.texts])

    def of(self, user_ids: set[str]) -> Bool[np.ndarray, " text"]:
        """Which texts are by these users."""
        return np.array([text.user_id in user_ids for text in self.texts], dtype=bool)

    def nearest(
        self, asked: str, answer: str, n: int, allowed: Bool[np.ndarray, " text"], refused: Callable[[str], bool]
    ) -> list[_Text]:
        """Of the nearest allowed texts those of the most similar length; equal ones count once."""
        scores = np.where(allowed, self.index.scores(retrieval_words(asked, self.tokens)), -np.inf)
        found: dict[str, _Text] = {}
        for place in np.argsort(-scores, kind="stable"):
            if not allowed[place] or len(found) == max(_NEAREST, n):
                break
            text = self.texts[place]
            if text.key not in found and text.key != normalised(answer) and not refused(text.key):
                found[text.key] = text
        return sorted(found.values(), key=lambda text: abs(len(text.answer) - len(answer)))[:n]


def _template(user: User) -> str:
    """An input of the user's, after which those of documents are worded."""
    return user.examples[0].input if user.examples else ""


def _shares(other: User, user: User, same: str) -> bool:
    rest = user.labels.keys() - {same}
    return other.labels[same] == user.labels[same] and all(other.labels.get(name) != user.labels[name] for name in rest)


def _others(user: User, users: Sequence[User], same: str | None) -> set[str]:
    others = {one.id for one in users if one.id != user.id and (same is None or _shares(one, user, same))}
    if not others:
        raise DataError(f"make_pairs: nobody shares the {same} {user.labels[str(same)]!r} with user {user.id!r}")
    return others


def _paired(user: User, texts: _Texts, allowed: Bool[np.ndarray, " text"], n: int) -> User:
    own = (user.pool.texts, SameTexts([example.parts for example in user.examples]))

    def rejected(asked: str, answer: str, taken: set[str]) -> tuple[str, ...]:
        def refused(key: str) -> bool:
            return key in taken or any(texts_of_user.like((key,)) for texts_of_user in own)

        found = texts.nearest(user.task.query(asked), answer, n, allowed, refused)
        if len(found) < n:
            raise DataError(f"make_pairs: user {user.id!r}: only {len(found)} other answers, asked for are {n}")
        return tuple(text.answer for text in found)

    examples = [replace(one, rejected=rejected(one.input, one.reference, set())) for one in user.examples]
    taken = {normalised(text) for example in examples for text in example.rejected}
    history = []
    for document in user.history:
        pair = user.task.pair(document.fields, _template(user))
        history.append(replace(document, rejected=rejected(*pair, taken)) if pair is not None else document)
    return replace(user, history=tuple(history), examples=tuple(examples))
