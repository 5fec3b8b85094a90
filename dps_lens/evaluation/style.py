"""How much a text looks like one user's and not like the others'."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from dps_lens.data import User


class StyleMeasure:
    """Similarity of a text's characters to what a user wrote, above its similarity to what the others wrote.

    Cosine of TF-IDF weights of 2- to 4-grams of characters (`sklearn`, case kept, words' edges included): to the
    mean of the user's own texts, minus the mean over the other users. The texts are those that the history holds
    and no evaluation example asks for. NaN where there is one user only, and for a user without such texts.

    Args:
        users: whose histories are compared.
    """

    def __init__(self, users: Sequence[User]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        found = {user.id: written_by(user) for user in users}
        self._users = [user for user, own in found.items() if own]
        texts = [found[user] for user in self._users]
        self._vectorizer = TfidfVectorizer(
            analyzer="char_wb", ngram_range=(2, 4), lowercase=False, sublinear_tf=True, dtype=np.float64
        )
        self._classifiers: dict[str, Any] = {}
        if len(self._users) < 2:
            return
        weights = self._vectorizer.fit_transform([text for own in texts for text in own])
        self._weights, self._owners = weights, [user for user, own in zip(self._users, texts, strict=True) for _ in own]
        ends = np.cumsum([0, *(len(own) for own in texts)])
        centres = np.vstack([np.asarray(weights[begin:end].mean(axis=0)) for begin, end in pairwise(ends)])
        self._centres = centres / np.linalg.norm(centres, axis=1, keepdims=True).clip(min=1e-12)

    def __call__(self, user_id: str, text: str) -> float:
        """Similarity to the user's own texts minus that to the others'; above 0 the text is rather the user's."""
        if len(self._users) < 2 or user_id not in self._users:
            return float("nan")
        similar = self._vectorizer.transform([text]) @ self._centres.T
        own = self._users.index(user_id)
        return float(similar[0, own] - np.delete(similar[0], own).mean())

    def author(self, user_id: str, text: str) -> float:
        """Probability that this user wrote the text, and not one of the others: author verification.

        By a logistic regression (`sklearn`) on the same weights, of the user's texts against all others', both sides
        weighing the same. It compares texts; of few and short ones it is not calibrated. NaN as above.
        """
        if len(self._users) < 2 or user_id not in self._users:
            return float("nan")
        if user_id not in self._classifiers:
            from sklearn.linear_model import LogisticRegression

            # liblinear's order of coordinates is drawn; the seed makes it the same in every run.
            model = LogisticRegression(C=100.0, class_weight="balanced", solver="liblinear", random_state=0)
            self._classifiers[user_id] = model.fit(self._weights, [owner == user_id for owner in self._owners])
        return float(self._classifiers[user_id].predict_proba(self._vectorizer.transform([text]))[0, 1])


def written_by(user: User) -> list[str]:
    """What a user wrote: what the task asks for, or a document's body where the history holds no pairs."""
    name = user.task.target or user.task.body
    return [str(document.fields[name]) for document in user.discovery_pool]
