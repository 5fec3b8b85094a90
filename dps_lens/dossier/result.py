"""The dossier of a head."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from dps_lens.dossier.measures import MEASURES, SECTIONS
from dps_lens.errors import ScoreError
from dps_lens.heads import Head, HeadSet
from dps_lens.result import Result
from dps_lens.stats.intervals import columns, interval, user_means

if TYPE_CHECKING:
    import pandas

DIRECTION = "direction, cosine of a user's with the others'"


@dataclass(frozen=True, eq=False, repr=False)
class Dossier(Result):
    """What one head reads and writes, and which tokens need it, beside random heads of its layer.

    Attributes:
        head: the head.
        controls: other heads of its layer.
        user_ids: owner of each example.
        example_ids: evaluation examples.
        values: one row an example, one column the head and each control, by measure (`MEASURES`).
        z: mean z over the response, own minus other run.
        pieces: the response's tokens as text, of each example.
        changes: what patching the head changes in the loss of each of them, nats.
        weights: of the output circuit, a number for the head and each control.
        spectrum: singular values of `W_V W_O`.
        readers: later heads, what of them reads where the head writes, and the overlap; of keys and values that heads
            share, the first of these heads.
        raised: tokens that the head's mean difference raises most.
        lowered: those that it lowers most.
        ranks: family → score, rank, number of heads, median score.
        manifest: settings and provenance.
    """

    stem: ClassVar[str] = "dossier"
    figure: ClassVar[str] = "dossier"
    parts: ClassVar[tuple[type, ...]] = (Head,)

    head: Head
    controls: HeadSet
    user_ids: tuple[str, ...]
    example_ids: tuple[str, ...]
    values: Float64[Tensor, "example head measure"]
    z: Float[Tensor, "example head d_head"]
    pieces: tuple[tuple[str, ...], ...]
    changes: tuple[tuple[float, ...], ...]
    weights: Mapping[str, tuple[float, ...]]
    spectrum: Float[Tensor, "head d_head"]
    readers: tuple[tuple[str, str, float], ...]
    raised: tuple[str, ...]
    lowered: tuple[str, ...]
    ranks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "head", Head(*self.head))
        if self.values.shape[-1] != len(MEASURES):
            raise ScoreError(
                f"this dossier of {self.head} holds {self.values.shape[-1]} measures, not {len(MEASURES)}: another "
                "version made it; make it anew"
            )

    def summary(self) -> str:
        rows = self.to_frame().set_index("measure")

        def told(measure: str) -> str:
            return f"{rows.loc[measure, 'mean']:.3g} ({rows.loc[measure, 'control']:.3g} of others)"

        return (
            f"{self.head}, {self.role}: attention to the profile {told('profile')}, to the token that it is written "
            f"next {told('token that is written')}; patched {told('patched')} nats, directly {told('directly')}"
        )

    @property
    def role(self) -> str:
        """`"facilitating"` where patching the head raises the NLL of the own text, its 95% interval over users above 0;
        `"interfering"` where it lowers it; else `"undecided"`."""
        found = interval(user_means(self.values, self.user_ids)[:, 0, MEASURES.index("patched")])
        if found["low"] > 0:
            return "facilitating"
        return "interfering" if found["high"] < 0 else "undecided"

    def to_frame(self, *, level: float = 0.95) -> "pandas.DataFrame":
        """One row a measure: `section`, `measure`, its mean over users with an interval, the mean of the random heads
        of the layer as `control`, and the `difference` with an interval.

        Weights have no intervals, nor has the direction, whose cosines depend on each other. "profile" counts the
        heading that "rest of the prompt" counts, too.
        """
        import pandas as pd

        values = np.concatenate([user_means(self.values, self.user_ids), self._directions()[:, :, None]], axis=2)
        names = [*MEASURES, DIRECTION]
        sections = {name: section for section, inside in SECTIONS.items() for name in inside} | {DIRECTION: "writes"}
        rows = []
        for place, name in sorted(enumerate(names), key=lambda one: [*SECTIONS].index(sections[one[1]])):
            own, beside = values[:, 0, place], values[:, 1:, place]
            row = {"section": sections[name], "measure": name, **interval(own, level)}
            if beside.shape[1]:
                difference = interval(own - beside.mean(1), level)
                row |= {"control": float(beside.mean()), **columns("difference", difference)}
            rows.append({key: row[key] for key in _POINTS if key in row} if name == DIRECTION else row)
        for name, (own_weight, *others) in self.weights.items():
            row = {"section": "weights", "measure": name, "mean": own_weight}
            rows.append(row | ({"control": float(np.mean(others))} if others else {}))
        return pd.DataFrame(rows).reindex(columns=_COLUMNS)

    def tokens(self) -> "pandas.DataFrame":
        """One row a token of a response: `user`, `example`, `position`, `token`, and the `change` of its loss when the
        head is patched, nats."""
        import pandas as pd

        return pd.DataFrame(
            {"user": user, "example": example, "position": position, "token": piece, "change": change}
            for user, example, pieces, changes in zip(
                self.user_ids, self.example_ids, self.pieces, self.changes, strict=True
            )
            for position, (piece, change) in enumerate(zip(pieces, changes, strict=True))
        )

    def families(self) -> "pandas.DataFrame":
        """One row a family: `family`, `score`, `rank`, `heads`, `median`."""
        import pandas as pd

        rows = [{"family": name, **found} for name, found in self.ranks.items()]
        return pd.DataFrame(rows, columns=["family", "score", "rank", "heads", "median"])

    def _directions(self) -> Float[np.ndarray, "user head"]:
        """Cosine of each user's mean difference with that of all other users, by head."""
        means = torch.from_numpy(user_means(self.z.double(), self.user_ids))
        if len(means) < 2:
            return np.full(means.shape[:2], np.nan)
        others = (means.sum(0) - means) / (len(means) - 1)
        return torch.nn.functional.cosine_similarity(means, others, dim=-1).numpy()


_POINTS = ("section", "measure", "mean", "control", "difference")
_COLUMNS = [
    "section",
    "measure",
    "mean",
    "low",
    "high",
    "control",
    "difference",
    "difference_low",
    "difference_high",
]
