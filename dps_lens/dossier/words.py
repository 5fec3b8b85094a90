"""Kinds of words in a response: the user's own, function words, names, punctuation."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, TypeAlias, get_args

import numpy as np
import regex

from dps_lens.data import User
from dps_lens.data.words import script_words

Kind: TypeAlias = Literal["punctuation", "function words", "own words", "names", "other words"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_OWN = 50
_WORD = regex.compile(r"[\p{L}\p{N}\p{M}]+(?:['’-][\p{L}\p{N}\p{M}]+)*")


class WordKinds:
    """Tells the kind of every word of a user, by what the users' histories hold.

    Punctuation has neither letters nor digits. Function words are those of scikit-learn's English list. A user's own
    words are the 50 of the largest TF-IDF among the words that the user's texts hold at least twice, a user's texts
    being one text. Names begin with a capital, and nobody's texts write them in lower case. In this order.
    """

    def __init__(self, users: Sequence[User]) -> None:
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

        texts = [" ".join(_texts(user)) for user in users]
        self._function = ENGLISH_STOP_WORDS
        self._lower = {word for text in texts for word in _WORD.findall(text) if word == word.casefold()}
        vectorizer = TfidfVectorizer(tokenizer=script_words, token_pattern=None, lowercase=False, sublinear_tf=True)
        weights = vectorizer.fit_transform(texts).toarray()
        names = vectorizer.get_feature_names_out()
        self._own: dict[str, frozenset[str]] = {}
        for user, text, row in zip(users, texts, weights, strict=True):
            counts = Counter(script_words(text))
            often = [counts[name] >= 2 and name not in self._function for name in names]
            kept = np.where(often, row, 0.0)
            best = [index for index in np.argsort(-kept, kind="stable")[:_OWN] if kept[index] > 0]
            self._own[user.id] = frozenset(names[best])

    def of(self, user_id: str, word: str) -> Kind:
        """The kind of one word."""
        plain = script_words(word)
        if not plain:
            return "punctuation"
        if word.casefold() in self._function:
            return "function words"
        if self._own.get(user_id, frozenset()).intersection(plain):
            return "own words"
        return "names" if word[:1] != word[:1].casefold() and word.casefold() not in self._lower else "other words"

    def of_tokens(self, user_id: str, pieces: Sequence[str]) -> list[Kind]:
        """The kind of the word that every token begins in or continues."""
        text, starts = "".join(pieces), np.cumsum([0, *map(len, pieces)])
        owners = np.full(max(len(text), 1), -1)
        words = list(_WORD.finditer(text))
        for number, match in enumerate(words):
            owners[match.start() : match.end()] = number
        found: list[Kind] = []
        for start, stop in pairwise(starts):
            inside = [owner for owner in owners[start:stop] if owner >= 0]
            found.append(self.of(user_id, words[inside[0]].group()) if inside else "punctuation")
        return found


def _texts(user: User) -> list[str]:
    fields = [document.fields for document in user.discovery_pool]
    return [str(value) for one in fields for value in one.values() if isinstance(value, str)]
