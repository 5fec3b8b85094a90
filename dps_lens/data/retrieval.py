"""Choose the documents of a history that a prompt shows."""

import random
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

from dps_lens.data.documents import Document, Profile
from dps_lens.data.tasks import Task
from dps_lens.data.words import RetrievalTokens, retrieval_words
from dps_lens.errors import DataError

RetrievalMethod: TypeAlias = Literal["bm25", "recency", "random"]


def retrieve(
    documents: Sequence[Document],
    query: str,
    k: int,
    *,
    task: Task,
    method: RetrievalMethod = "bm25",
    seed: int = 0,
    tokens: RetrievalTokens = "auto",
) -> tuple[Document, ...]:
    """The `k` documents to show, best first.

    Args:
        documents: the history, oldest first when dated; parts of one pool share its counts.
        query: the task input after its keyword.
        k: how many at most.
        task: says which fields of a document are its text.
        method: `"bm25"` (Okapi, as LaMP's code), `"recency"` or `"random"`.
        seed: of the random choice, together with the query.
        tokens: what BM25 counts: `"whitespace"` tokens, as LaMP's code; `"script"`, words in lower case without
            punctuation, and pairs of characters in scripts without spaces; `"auto"`, `"script"` where at least a tenth
            of the letters of the whole pool belong to such scripts, else `"whitespace"`.

    Raises:
        DataError: the method or the tokens are unknown.
    """
    if tokens not in ("auto", "whitespace", "script"):
        raise DataError(f"retrieval tokens {tokens!r} are unknown; use 'auto', 'whitespace' or 'script'")
    if method == "bm25":
        return _best(Profile.of(documents, task), query, k, tokens)
    if method == "recency":
        return tuple(reversed(documents[-k:])) if k else ()
    if method == "random":
        return tuple(random.Random(f"{seed}|{query}").sample(list(documents), min(k, len(documents))))
    raise DataError(f"retrieval {method!r} is unknown; use 'bm25', 'recency' or 'random'")


def _best(profile: Profile, query: str, k: int, tokens: RetrievalTokens) -> tuple[Document, ...]:
    if not len(profile):
        return ()
    chosen = profile.pool.tokens if tokens == "auto" else tokens
    index = profile.pool.index(chosen)
    scores = index.scores(retrieval_words(query, chosen), profile.stop, profile.left_out)
    scores[profile.left_out] = -np.inf
    best = np.argsort(-scores, kind="stable")[: min(k, len(profile))]
    return tuple(profile.pool.documents[place] for place in best)
