"""Users grouped by what they write or by their scores, so that a user can borrow the heads of a group."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dps_lens.data import User
from dps_lens.errors import DataError, ScoreError
from dps_lens.heads import HeadSet
from dps_lens.result import Result
from dps_lens.scores import HeadScores

if TYPE_CHECKING:
    import pandas

Encoder: TypeAlias = Callable[[list[str]], Any]
Clustering: TypeAlias = Literal["kmeans", "hierarchical"]
Routable: TypeAlias = str | User | Tensor | np.ndarray
MAX_TERMS = 20_000
_WORD = re.compile(r"\w\w")  # the shortest term of scikit-learn's vectoriser


@dataclass(frozen=True, eq=False, repr=False)
class UserClusters(Result):
    """Clusters of users, and a way into them for others.

    Attributes:
        user_ids: the members.
        labels: cluster of each member, numbered by first appearance.
        centres: mean feature vector of each cluster's members.
        features: unit feature vector of each member.
        manifest: settings, the documents or examples read, and `alone`, the users without a fellow member.
        encoder: the fitted vectoriser or the sentence encoder; None for clusters by scores, and for loaded ones, into
            which only members can be routed.
    """

    stem: ClassVar[str] = "clusters"

    user_ids: tuple[str, ...]
    labels: Int[np.ndarray, " user"]
    centres: Float[np.ndarray, "cluster feature"]
    features: Float[np.ndarray, "user feature"]
    manifest: dict[str, Any] = field(default_factory=dict)
    encoder: Any = None

    def summary(self) -> str:
        return f"{len(self.user_ids)} users in {len(self.centres)} clusters by {self.manifest.get('by')}"

    def save(self, folder: "str | Path") -> None:
        super(UserClusters, replace(self, encoder=None)).save(folder)

    def members(self, cluster: int) -> tuple[str, ...]:
        """The users of one cluster; none where there is no such cluster."""
        return tuple(user for user, label in zip(self.user_ids, self.labels, strict=True) if label == cluster)

    def to_frame(self) -> "pandas.DataFrame":
        """One row a user: `user`, `cluster`."""
        import pandas as pd

        return pd.DataFrame({"user": self.user_ids, "cluster": self.labels})

    def route(self, user: Routable, *, temperature: float = 0.1, hard: bool = False) -> Float[np.ndarray, " cluster"]:
        """Weights of a user over the clusters: softmax of (cosine similarity to the centres / temperature).

        A member's nearest centre need not be that of the member's own cluster (`labels`).

        Args:
            user: a member's id; a user, whose history is read and whose evaluation texts are not; a feature
                vector; or, for clusters by scores, a `[layer, head]` map such as `scores.mean("u1")`.
            temperature: small values approach `hard`.
            hard: all weight on the nearest centre.

        Raises:
            DataError: the user's history has no text, or no word that the clusters know.
            ScoreError: the vector does not fit, or the temperature is not positive.
        """
        if not temperature > 0:
            raise ScoreError(f"route: temperature {temperature} is not positive; use hard=True for the nearest centre")
        vector = self._vector(user).astype(float)
        norms = np.linalg.norm(self.centres, axis=1)
        # The centre of opposite score maps can be 0; it is similar to nobody.
        similarity = self.centres @ vector / np.maximum(norms, np.finfo(float).tiny)
        if hard:
            return np.eye(len(similarity))[similarity.argmax()]
        weights = np.exp((similarity - similarity.max()) / temperature)
        return weights / weights.sum()

    def scores(self, scores: HeadScores, *, without: str | None = None) -> Float[Tensor, "cluster layer head"]:
        """Map of each cluster: mean of the user means of its members.

        Args:
            scores: of every member; other users in them are not read.
            without: a member to leave out; a cluster that is then empty has a NaN map.

        Raises:
            ScoreError: a member is missing from the scores, or `without` is not a member.
        """
        left_out = None if without is None else self._index("scores", without)
        return self._maps(_user_means("scores", self.user_ids, scores), left_out)

    def head_weights(
        self, scores: HeadScores, *, user: Routable, temperature: float = 0.1
    ) -> Float[Tensor, "layer head"]:
        """Mean of the cluster maps, weighted by `route(user)`.

        A member, given by id or as a user, has no part in the maps, and the mean of all other members stands
        for a cluster that is then empty. A bare vector or map has no owner: nobody is left out.

        Raises:
            ScoreError: a member is missing from the scores, or there is no other member.
        """
        name = user.id if isinstance(user, User) else user
        member = self.user_ids.index(name) if isinstance(name, str) and name in self.user_ids else None
        means = _user_means("head_weights", self.user_ids, scores)
        return self._routed("head_weights", means, member, self.route(user, temperature=temperature))

    def heads(
        self, scores: HeadScores, k: int, *, route: Literal["hard", "soft"] = "hard", temperature: float = 0.1
    ) -> dict[str, HeadSet]:
        """For each member the `k` heads of largest mean over *other* members, to be evaluated on that member.

        The member only decides which cluster the heads come from: by unlabelled history text, or in clusters
        by scores by the member's own discovery scores. Their examples are disjoint from evaluation examples,
        except under `discovery="labelled"`: then cluster by text. The scores that rank the heads are never the
        member's.

        Args:
            scores: of every member.
            k: how many heads.
            route: `"hard"` ranks by the member's own cluster, and where the member is alone there, by the mean
                of all other members; the labels are `"cluster 2"` and `"global"`. `"soft"` ranks by
                `head_weights`; the labels are `"soft"` and, for a member who is alone, `"soft, alone"`.
            temperature: for `"soft"`.

        Raises:
            HeadError: the scores have fewer than `k` heads.
            ScoreError: a member is missing from the scores, or there is no other member.
        """
        if route not in ("hard", "soft"):
            raise ScoreError(f"heads: route {route!r} is unknown; use 'hard' or 'soft'")
        means = _user_means("heads", self.user_ids, scores)
        heads: dict[str, HeadSet] = {}
        for index, user in enumerate(self.user_ids):
            cluster, alone = int(self.labels[index]), user in self.manifest["alone"]
            if route == "hard":
                weights = np.eye(len(self.centres))[cluster]
                label = "global" if alone else f"cluster {cluster}"
            else:
                weights = self.route(user, temperature=temperature)
                label = "soft, alone" if alone else "soft"
            ranked = self._routed("heads", means, index, weights)[None]
            heads[user] = HeadScores(ranked, example_ids=[label], user_ids=[label]).top(k, label=label)
        return heads

    def _index(self, call: str, user: str) -> int:
        if user not in self.user_ids:
            raise ScoreError(
                f"{call}: {user!r} is not a member; give one of {', '.join(self.user_ids[:8])}…, or route someone new "
                f"by {'a [layer, head] map of scores' if self.encoder is None else 'a User'}"
            )
        return self.user_ids.index(user)

    def _vector(self, user: Routable) -> np.ndarray:
        if isinstance(user, User) and self.encoder is not None:
            return _embed("route", self.encoder, user)
        if isinstance(user, str | User):
            return self.features[self._index("route", user if isinstance(user, str) else user.id)]
        shapes = [shape for shape in (self.features.shape[1:], self.manifest.get("shape")) if shape]
        if tuple(user.shape) not in shapes:
            raise ScoreError(f"route: shape {tuple(user.shape)} does not fit; give {' or '.join(map(str, shapes))}")
        return _unit("route", "vector", _array(user).flatten())

    def _maps(
        self, means: Float[Tensor, "user layer head"], without: int | None
    ) -> Float[Tensor, "cluster layer head"]:
        kept = torch.arange(len(means)) != (-1 if without is None else without)
        labels = torch.from_numpy(self.labels)
        # The mean of no rows is NaN.
        return torch.stack([means[kept & (labels == cluster)].mean(0) for cluster in range(len(self.centres))])

    def _routed(
        self, call: str, means: Float[Tensor, "user layer head"], without: int | None, weights: np.ndarray
    ) -> Float[Tensor, "layer head"]:
        others = [index for index in range(len(means)) if index != without]
        if not others:
            raise ScoreError(f"{call}: {self.user_ids[0]!r} is the only member; heads must come from other users")
        maps = self._maps(means, without)
        return torch.einsum("c,clh->lh", torch.from_numpy(weights), maps.where(~maps.isnan(), means[others].mean(0)))


def cluster_users(
    users: Sequence[User] | None,
    n_clusters: int,
    *,
    by: Literal["tfidf", "scores"] | Encoder = "tfidf",
    scores: HeadScores | None = None,
    method: Clustering = "kmeans",
    seed: int = 0,
) -> UserClusters:
    """Group users whose histories, or whose scores, are alike.

    Text is the users' history without any evaluation document. A user's features have unit norm, so that
    both methods compare directions.

    Args:
        users: the users; None takes the users of `scores`.
        n_clusters: how many.
        by: `"tfidf"` weights the words of each user's history, the 20,000 commonest at most. `"scores"` takes
            each user's mean map of `scores`. A callable is a sentence encoder, such as
            `SentenceTransformer(…).encode`: it takes the texts of a user's n documents and returns an
            `[n, d]` array, which is averaged.
        scores: for `"scores"`.
        method: `"kmeans"`, the best of 10 starts, or `"hierarchical"`, average linkage of cosine distances.
        seed: of the starts.

    Raises:
        DataError: two users share an id, or a history has no text.
        ScoreError: fewer different users than clusters, a user without scores, or settings that do not fit
            together.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    ids = _ids(users, n_clusters, by, scores)
    manifest: dict[str, Any] = {"method": method, "n_clusters": n_clusters, "seed": seed}
    encoder: Any = by
    if scores is not None:
        encoder, means = None, _user_means("cluster_users", ids, scores).flatten(1).numpy()
        features = np.stack([_unit("cluster_users", user, mean) for user, mean in zip(ids, means, strict=True)])
        read = {user: [scores.example_ids[row] for row in scores.rows(user)] for user in ids}
        manifest |= {"by": "scores", "shape": tuple(scores.values.shape[1:]), "examples": read}
    else:
        if by == "tfidf":
            # Sublinear counts, so that a long history is not a matter of its commonest words.
            encoder = TfidfVectorizer(sublinear_tf=True, max_features=MAX_TERMS)
            encoder.fit("\n".join(_texts("cluster_users", user)) for user in users or ())
        features = np.stack([_embed("cluster_users", encoder, user) for user in users or ()])
        read = {user.id: [document.id for document in user.discovery_pool] for user in users or ()}
        name = getattr(by, "__qualname__", type(by).__qualname__) if callable(by) else by
        manifest |= {"by": name, "documents": read}
    labels = _partition(features, n_clusters, method, seed)
    manifest["alone"] = [user for user, label in zip(ids, labels, strict=True) if (labels == label).sum() == 1]
    centres = np.stack([features[labels == cluster].mean(0) for cluster in range(n_clusters)])
    return UserClusters(ids, labels, centres, features, manifest, encoder)


def _ids(
    users: Sequence[User] | None, n_clusters: int, by: Literal["tfidf", "scores"] | Encoder, scores: HeadScores | None
) -> tuple[str, ...]:
    """The users to group, once the arguments of `cluster_users` are known to fit together."""
    if not (callable(by) or by in ("tfidf", "scores")):
        raise ScoreError(f"cluster_users: by {by!r} is unknown; use 'tfidf', 'scores' or a sentence encoder")
    if (by == "scores") != (scores is not None):
        raise ScoreError("cluster_users: scores= goes with by='scores', and only with it")
    if users is not None:
        ids = tuple(user.id for user in users)
    elif scores is not None:
        ids = scores.users
    else:
        raise ScoreError("cluster_users: clusters by text need users; None goes with by='scores'")
    if not 1 <= n_clusters <= len(ids):
        raise ScoreError(f"cluster_users: {n_clusters} clusters of {len(ids)} users; ask for 1 to {len(ids)}")
    if len(set(ids)) < len(ids):
        twice = next(user for user in ids if ids.count(user) > 1)
        raise DataError(f"cluster_users: two users are called {twice!r}; give each an id of its own")
    return ids


def _partition(
    features: Float[np.ndarray, "user feature"], n_clusters: int, method: Clustering, seed: int
) -> Int[np.ndarray, " user"]:
    from sklearn.cluster import AgglomerativeClustering, KMeans

    if method == "kmeans":
        labels = KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(features)
    elif method == "hierarchical":
        # scikit-learn refuses to link a single user.
        linkage = AgglomerativeClustering(n_clusters, metric="cosine", linkage="average")
        labels = linkage.fit_predict(features) if len(features) > 1 else np.zeros(1, dtype=int)
    else:
        raise ScoreError(f"cluster_users: method {method!r} is unknown; use 'kmeans' or 'hierarchical'")
    numbers = list(dict.fromkeys(labels.tolist()))
    # Equal users end in one cluster of k-means, and in arbitrary clusters of the linkage.
    different = min(len(numbers), len(np.unique(features, axis=0)))
    if different < n_clusters:
        raise ScoreError(f"cluster_users: only {different} users differ; ask for at most {different} clusters")
    return np.array([numbers.index(label) for label in labels.tolist()])


def _texts(call: str, user: User) -> list[str]:
    """The text of each document that heads may be found on."""
    texts = [
        "\n".join(value for name in user.task.fields if isinstance(value := document.fields[name], str))
        for document in user.discovery_pool
    ]
    if not any(_WORD.search(text) for text in texts):
        raise DataError(f"{call}: the history of user {user.id!r} has no words; leave the user out, or use by='scores'")
    return [text for text in texts if text.strip()]


def _embed(call: str, encoder: Any, user: User) -> Float[np.ndarray, " feature"]:
    texts = _texts(call, user)
    batch = texts if callable(encoder) else ["\n".join(texts)]
    vectors = _array(encoder(batch) if callable(encoder) else encoder.transform(batch).toarray())
    if vectors.ndim != 2 or len(vectors) != len(batch):
        raise DataError(f"{call}: the encoder made {vectors.shape} of {len(batch)} texts; it must return [n, d]")
    return _unit(call, user.id, vectors.mean(0))


def _array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu().double() if isinstance(values, Tensor) else values, dtype=float)


def _unit(call: str, name: str, vector: np.ndarray) -> Float[np.ndarray, " feature"]:
    norm = float(np.linalg.norm(vector))
    if not 0 < norm < float("inf"):
        raise DataError(f"{call}: {name!r} has no direction (norm {norm}): no known words, or scores all 0")
    return vector / norm


def _user_means(call: str, users: Sequence[str], scores: HeadScores) -> Float[Tensor, "user layer head"]:
    scores.check_defined(call)
    rows = {user: row for row, user in enumerate(scores.users)}
    missing = [user for user in users if user not in rows]
    if missing:
        raise ScoreError(
            f"{call}: {len(missing)} users are not in the scores, such as {missing[0]!r}; score them, or leave them out"
        )
    return scores.samples()[[rows[user] for user in users]]
