"""Head vectors: what users' own texts add to the z of heads, beyond a counterfactual."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.checks import check_whole
from dps_lens.data.examples import key_of
from dps_lens.errors import SteeringError
from dps_lens.heads import HeadSet
from dps_lens.result import Result
from dps_lens.steering.vector import HeadVector, rows_of

if TYPE_CHECKING:
    import pandas

_NUMBERS = 10_000_000


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

    # As other results; a Mapping would compare vectors, which are made anew each time they are asked for.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __getitem__(self, user: str) -> HeadVector:
        if user not in self.users:
            raise KeyError(user)
        return HeadVector(self.vectors[self.users.index(user)], self.heads, user, self._about([user]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.users)

    def __len__(self) -> int:
        return len(self.users)

    @property
    def generic(self) -> bool:
        """No profile was shown while they were made."""
        return self.manifest.get("against") == "generic"

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

    def only(self, heads: HeadSet) -> "HeadVectors":
        """The same of some of its heads.

        Raises:
            HeadError: there are no vectors of such a head, or none is given.
        """
        rows, chosen = rows_of(self.heads, heads), HeadSet(heads, heads.label, self.heads.shape)
        return replace(
            self,
            heads=chosen,
            vectors=self.vectors[:, rows],
            differences=self.differences[:, rows],
            manifest={**self.manifest, "heads": str(chosen)},
        )

    def made_of(self, user: str, example_ids: Sequence[str]) -> HeadVector:
        """The user's vector of some examples alone, to test it on others.

        Raises:
            SteeringError: the recipe is no mean of differences, or none of these is an example of the user.
        """
        if self.manifest.get("recipe", "difference") != "difference":
            raise SteeringError("made_of: only vectors of recipe 'difference' are means that examples can leave")
        owned = zip(self.user_ids, self.example_ids, strict=True)
        rows = [index for index, (owner, one) in enumerate(owned) if owner == user and one in example_ids]
        if not rows:
            raise SteeringError(f"made_of: none of these {len(example_ids)} is an example of user {user!r}")
        about = {**self.manifest, "users": [user], "examples": [key_of(user, self.example_ids[row]) for row in rows]}
        return HeadVector(self.differences[rows].mean(0), self.heads, user, about)

    def _about(self, users: Sequence[str]) -> dict[str, Any]:
        owned = zip(self.user_ids, self.example_ids, strict=True)
        return {**self.manifest, "users": list(users), "examples": [key_of(*one) for one in owned if one[0] in users]}

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
        member = torch.nn.functional.one_hot(owners, len(self)).double()
        member = member / member.sum(0)
        # Of means over sign-flipped examples, all that is needed are the products of examples.
        products, grams = differences @ differences.T, []
        for signs in _signs(n_null, len(owners), generator).split(max(1, _NUMBERS // max(member.numel(), 1))):
            flipped = signs[:, :, None] * member
            grams.append(flipped.transpose(1, 2) @ (products @ flipped))
        gram = torch.cat(grams).numpy()
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


def _signs(draws: int, examples: int, generator: torch.Generator) -> Float[Tensor, "draw example"]:
    """1 or −1, at random."""
    return torch.randint(0, 2, (draws, examples), generator=generator).double() * 2 - 1
