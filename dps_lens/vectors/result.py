"""Head vectors: what users' own texts add to the z of heads, beyond a counterfactual."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.checks import check_whole
from dps_lens.errors import SteeringError
from dps_lens.heads import HeadSet
from dps_lens.result import Result
from dps_lens.steering.vector import HeadVector

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class HeadVectors(Result, Mapping[str, HeadVector]):
    """One vector a user for the same heads, of `head_vectors`.

    `vectors[user.id]` is one; the whole goes wherever a mapping of users to vectors does.

    Attributes:
        heads: in the order of the rows.
        users: ids.
        vectors: `Float[Tensor, "user head d_head"]`, what is added.
        differences: `Float[Tensor, "example head d_head"]`, mean z of the own text minus that of the counterfactual.
        user_ids: owner of each example.
        example_ids: one a row of `differences`.
        manifest: settings and provenance.
    """

    stem: ClassVar[str] = "head_vectors"
    figure: ClassVar[str] = "head_vectors"
    error: ClassVar[type[SteeringError]] = SteeringError

    heads: HeadSet
    users: tuple[str, ...]
    vectors: Float[Tensor, "user head d_head"]
    differences: Float[Tensor, "example head d_head"]
    user_ids: tuple[str, ...]
    example_ids: tuple[str, ...]
    manifest: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, user: str) -> HeadVector:
        if user not in self.users:
            raise KeyError(user)
        return HeadVector(self.vectors[self.users.index(user)], self.heads, user, self._about([user]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.users)

    def __len__(self) -> int:
        return len(self.users)

    def mean(self, users: Sequence[str] | None = None, *, label: str = "mean") -> HeadVector:
        """The mean vector of some users, a cluster say, or of all.

        Raises:
            SteeringError: there is no such user.
        """
        chosen = list(self.users if users is None else users)
        if not chosen or (strangers := [user for user in chosen if user not in self.users]):
            raise SteeringError(
                f"mean: {strangers[0]!r} has no vector here" if chosen else "mean: give at least one user"
            )
        rows = torch.stack([self.vectors[self.users.index(user)] for user in chosen])
        return HeadVector(rows.mean(0), self.heads, label, self._about(chosen))

    def without(self, user: str, example_id: str) -> HeadVector:
        """The user's vector as if an example had not been there, to test it on that example.

        Raises:
            SteeringError: the recipe is no mean of differences, or the user has no other example.
        """
        if self.manifest.get("recipe", "difference") != "difference":
            raise SteeringError("without: only vectors of recipe 'difference' are means that an example can leave")
        rows = [
            index
            for index, (owner, one) in enumerate(zip(self.user_ids, self.example_ids, strict=True))
            if owner == user and one != example_id
        ]
        if not rows:
            raise SteeringError(
                f"without: user {user!r} has a vector of no other example than {example_id!r}; make vectors of more "
                "(max_examples)"
            )
        return HeadVector(self.differences[rows].mean(0), self.heads, user, self._about([user]))

    def _about(self, users: Sequence[str]) -> dict[str, Any]:
        return {**self.manifest, "users": list(users)}

    def summary(self) -> str:
        norms = self.vectors.flatten(1).norm(dim=1)
        spread = f"norms {float(norms.min()):.3g} to {float(norms.max()):.3g}"
        return f"{self.manifest.get('recipe', '')} vectors of {len(self.heads)} heads, {len(self)} users, {spread}"

    def to_frame(self) -> "pandas.DataFrame":
        """One row a user and head: `user`, `head`, `norm`."""
        import pandas as pd

        norms = self.vectors.norm(dim=2)
        return pd.DataFrame(
            {"user": user, "head": str(head), "norm": float(norms[row, column])}
            for row, user in enumerate(self.users)
            for column, head in enumerate(self.heads)
        )

    def cosines(self, *, n_null: int = 1000, level: float = 0.95, seed: int = 0) -> "pandas.DataFrame":
        """Cosine of every two users' vectors, over all heads, beside what it is by chance.

        By chance, own text and counterfactual are exchanged in random examples, which leaves everything but what tells
        the two apart. Where all users share a direction, all cosines lie above the band: subtract `mean()` to ask what
        users have apart from it. Of vectors that are no means of the differences (`recipe="probe"`), the null is that
        of the means.

        Args:
            n_null: random exchanges.
            level: of the band that holds this share of them.
            seed: of the exchanges.

        Returns:
            one row a pair: `user`, `other`, `cosine`, `null_low`, `null_high`.

        Raises:
            SteeringError: there is one user only.
        """
        import pandas as pd

        check_whole(SteeringError, "cosines: n_null", n_null, least=1)
        if len(self) < 2:
            raise SteeringError("cosines: give vectors of two users or more")
        differences = self.differences.flatten(1).double()
        owners = torch.tensor([self.users.index(user) for user in self.user_ids])
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (n_null, len(owners)), generator=generator).double() * 2 - 1
        member = torch.nn.functional.one_hot(owners, len(self)).double()
        member = member / member.sum(0)
        # Of means over sign-flipped examples, all that is needed are the products of examples.
        products = differences @ differences.T
        flipped = signs[:, :, None] * member
        gram = torch.einsum("nea,ef,nfb->nab", flipped, products, flipped).numpy()
        lengths = np.sqrt(np.einsum("naa->na", gram))
        null = gram / np.maximum(lengths[:, :, None] * lengths[:, None], 1e-30)
        low, high = np.quantile(null, ((1 - level) / 2, (1 + level) / 2), axis=0)
        unit = torch.nn.functional.normalize(self.vectors.flatten(1).double(), dim=1)
        found = (unit @ unit.T).numpy()
        pairs = [(a, b) for a in range(len(self)) for b in range(a + 1, len(self))]
        return pd.DataFrame(
            {
                "user": self.users[a],
                "other": self.users[b],
                "cosine": found[a, b],
                "null_low": low[a, b],
                "null_high": high[a, b],
            }
            for a, b in pairs
        )
