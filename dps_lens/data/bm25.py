"""Okapi BM25 over a part of a pool, from counts that are taken once."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

_K1, _B, _EPSILON = 1.5, 0.75, 0.25


class Bm25:
    """BM25 as `rank_bm25.BM25Okapi` computes it for LaMP, of any part of the documents without counting again.

    Args:
        documents: the words of each.
    """

    def __init__(self, documents: Sequence[Sequence[str]]) -> None:
        self._numbers: dict[str, int] = {}
        counts = [Counter(words) for words in documents]
        terms = [self._numbers.setdefault(word, len(self._numbers)) for count in counts for word in count]
        self._terms = np.array(terms, dtype=np.int64)
        self._counts = np.array([n for count in counts for n in count.values()], dtype=np.int64)
        self._ends = np.cumsum([0, *map(len, counts)])
        self._lengths = np.array([len(words) for words in documents], dtype=np.int64)

    @cached_property
    def _postings(self) -> tuple[Int[np.ndarray, " entry"], Int[np.ndarray, " term"]]:
        """Entries sorted by term, and where each term's end."""
        order = np.argsort(self._terms, kind="stable")
        return order, np.cumsum(np.bincount(self._terms, minlength=len(self._numbers)))

    @cached_property
    def _owners(self) -> Int[np.ndarray, " entry"]:
        return np.repeat(np.arange(len(self._lengths)), np.diff(self._ends))

    @cached_property
    def _frequencies(self) -> Int[np.ndarray, " term"]:
        return np.bincount(self._terms, minlength=len(self._numbers))

    def scores(
        self, query: Iterable[str], stop: int | None = None, without: Sequence[int] = ()
    ) -> Float[np.ndarray, " document"]:
        """Scores of the first `stop` documents as if those of `without` did not exist; theirs mean nothing."""
        stop = len(self._lengths) if stop is None else stop
        scores = np.zeros(len(self._lengths))
        n, frequencies = stop - len(without), self._document_frequencies(stop, without)
        present = frequencies[frequencies > 0]
        if not len(present):
            return scores[:stop]
        idf = [0.0, *(math.log(n - k + 0.5) - math.log(k + 0.5) for k in range(1, n + 1))]
        # In order, as the package sums them up: rounding is the same.
        floor = _EPSILON * float(np.cumsum(np.array(idf)[present])[-1]) / len(present)
        mean_length = (self._lengths[:stop].sum() - self._lengths[list(without)].sum()) / n
        for word in query:
            term = self._numbers.get(word)
            if term is None or not frequencies[term]:
                continue
            order, ends = self._postings
            entries = order[ends[term - 1] if term else 0 : ends[term]]
            owners, counts = self._owners[entries], self._counts[entries]
            weight = idf[frequencies[term]] if idf[frequencies[term]] >= 0 else floor
            length = 1 - _B + _B * self._lengths[owners] / mean_length
            scores[owners] += weight * (counts * (_K1 + 1) / (counts + _K1 * length))
        return scores[:stop]

    def _document_frequencies(self, stop: int, without: Sequence[int]) -> Int[np.ndarray, " term"]:
        whole = stop == len(self._lengths)
        terms = self._terms[: self._ends[stop]]
        found = self._frequencies if whole else np.bincount(terms, minlength=len(self._numbers))
        if not without:
            return found
        left = np.concatenate([self._terms[self._ends[one] : self._ends[one + 1]] for one in without])
        return found - np.bincount(left, minlength=len(self._numbers))
