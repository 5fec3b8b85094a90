"""Choose the documents of a history that a prompt shows."""

import random
from collections.abc import Sequence
from typing import Literal, TypeAlias

from dps_lens.data.records import Document
from dps_lens.data.tasks import Task
from dps_lens.errors import DataError

RetrievalMethod: TypeAlias = Literal["bm25", "recency", "random"]


def retrieve(
    documents: Sequence[Document], query: str, k: int, *, task: Task, method: RetrievalMethod = "bm25", seed: int = 0
) -> tuple[Document, ...]:
    """The `k` documents to show, best first.

    Args:
        documents: the history, oldest first when dated.
        query: the task input after its keyword.
        k: how many at most.
        task: says which fields of a document are its text.
        method: `"bm25"` (Okapi over whitespace tokens, as LaMP's code), `"recency"` or `"random"`.
        seed: of the random choice, together with the query.
    """
    if method == "bm25":
        from rank_bm25 import BM25Okapi

        if not documents:
            return ()
        corpus = ["".join(task.parts(document.fields)).split() for document in documents]
        scores = BM25Okapi(corpus).get_scores(query.split())
        order = sorted(range(len(documents)), key=lambda index: -scores[index])
        return tuple(documents[index] for index in order[:k])
    if method == "recency":
        return tuple(reversed(documents[-k:])) if k else ()
    if method == "random":
        return tuple(random.Random(f"{seed}|{query}").sample(list(documents), min(k, len(documents))))
    raise DataError(f"retrieval {method!r} is unknown; use 'bm25', 'recency' or 'random'")
