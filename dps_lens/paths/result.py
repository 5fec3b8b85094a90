"""Effects of paths between heads, documents and logits, as edges of a graph."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float, Float64
from torch import Tensor

from dps_lens.checks import check_number
from dps_lens.heads import Head, HeadSet
from dps_lens.result import Result
from dps_lens.stats.intervals import columns, interval, user_means
from dps_lens.stats.significance import MIN_USERS, max_t_p, smallest_p

if TYPE_CHECKING:
    import pandas

LOGITS = "logits"


class _Edge(NamedTuple):
    """One edge: who writes, who reads, into what, the names of its controls, and the effects, `[example]` of the edge
    and `[example control]` of its controls."""

    source: str
    target: str
    into: str
    beside: tuple[str, ...]
    effect: Tensor
    controls: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class PathEffects(Result):
    """What single paths carry, in nats per token: the NLL with the path patched minus the NLL without.

    Above 0, the path carries something of the own profile that lowers the NLL of the user's text.

    Attributes:
        senders: heads whose output is followed, and where it goes to.
        receivers: heads that read it.
        controls: of each of these heads, random other heads of its layer; nodes only where it has no others.
        into: `"q"`, `"k"`, `"v"` or `"resid"`, as asked for.
        user_ids: owner of each example.
        example_ids: evaluation examples.
        paths: `[example into writer receiver]`, the writers being `writers`; NaN where one is not in an earlier layer
            than the receiver.
        direct: `[example head]`, from each of `heads` to the logits, past all layers between.
        total: `[example head]`, the same with everything behind the head following: its own patch.
        documents: `[example head document]`, each head cut off from one document of the profile, the first in the
            prompt first; NaN where an example has fewer.
        manifest: settings and provenance.
    """

    stem: ClassVar[str] = "paths"
    figure: ClassVar[str] = "paths"

    senders: HeadSet
    receivers: HeadSet
    controls: Mapping[str, HeadSet]
    into: tuple[str, ...]
    user_ids: tuple[str, ...]
    example_ids: tuple[str, ...]
    paths: Float64[Tensor, "example into writer receiver"]
    direct: Float64[Tensor, "example head"]
    total: Float64[Tensor, "example head"]
    documents: Float64[Tensor, "example head document"]
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def nodes(self) -> HeadSet:
        """Senders and receivers."""
        return self.senders | self.receivers

    @property
    def heads(self) -> tuple[Head, ...]:
        """Of the second axis of `direct`, `total` and `documents`: the nodes, then other controls."""
        return measured(self.nodes, self.controls)

    @property
    def writers(self) -> tuple[Head, ...]:
        """Of the third axis of `paths`: the senders, then other controls of theirs."""
        return measured(self.senders, self.controls)

    def summary(self) -> str:
        users = len(dict.fromkeys(self.user_ids))
        return (
            f"paths from {len(self.senders)} to {len(self.receivers)} heads into {', '.join(self.into)}, and to the "
            f"logits: {len(self.user_ids)} examples of {users} users"
        )

    def to_frame(self) -> "pandas.DataFrame":
        """`edges()` at their defaults."""
        return self.edges()

    def edges(
        self, *, alpha: float = 0.05, least: float = 1e-3, level: float = 0.95, n_flips: int = 10_000, seed: int = 0
    ) -> "pandas.DataFrame":
        """All edges, largest effect first.

        Args:
            alpha: how often a graph may hold any false edge. An edge's p is the larger of two: that its effect is 0,
                and that it is as that of its controls; 1 where the two differ in sign. Both are two-sided and
                family-wise over both tests of all edges, by sign flips of whole users of the largest |t|, exact where
                effects are symmetric about 0. NaN below six users, and where a layer has one head only.
            least: an edge whose effect is smaller than this does not survive, whatever its p.
            level: of the intervals over users.
            n_flips: random sign flips.
            seed: of the flips.

        Raises:
            ScoreError: no p of so few users and flips can reach alpha.

        Returns:
            `source`, `target`, `into`; `effect` with its interval; `control`, the mean of the controls in the place of
            the source (of a cut, of the head that is cut off); `controls`, their names; `difference` with its interval;
            `p` and `survives`. Documents that some example lacks are left out.
        """
        import pandas as pd

        check_number(self.error, "edges: alpha", alpha, above=0, most=0.5)
        check_number(self.error, "edges: least", least, least=0)
        edges = list(self._edges())
        effects = np.stack([self._by_user(edge.effect) for edge in edges], 1)
        controls = np.stack([self._by_user(_mean(edge.controls)) for edge in edges], 1)
        differences, tested = effects - controls, ~np.isnan(controls).any(0)
        p, least_p = np.full(len(edges), np.nan), smallest_p(len(effects), n_flips)
        if len(effects) >= MIN_USERS and least_p > alpha:
            raise self.error(
                f"edges: no p of {len(effects)} users and n_flips={n_flips} lies below {least_p:.2g}, which is above "
                f"alpha={alpha:g}; use more of both, or a larger alpha"
            )
        if len(effects) >= MIN_USERS and tested.any():
            # One family of both, or other edges might break the one and the other.
            both = np.concatenate([effects[:, tested], differences[:, tested]], 1)
            larger = max_t_p(both, n_flips=n_flips, seed=seed).reshape(2, -1).max(0)
            agree = np.sign(effects.mean(0)) == np.sign(differences.mean(0))
            p[tested] = np.where(agree[tested], larger, 1.0)
        rows = [
            {
                "source": edge.source,
                "target": edge.target,
                "into": edge.into,
                **columns("effect", interval(effects[:, index], level)),
                "control": controls[:, index].mean(),
                "controls": ",".join(edge.beside),
                **columns("difference", interval(differences[:, index], level)),
                "p": p[index],
                "survives": bool(p[index] <= alpha and abs(effects[:, index].mean()) >= least),
            }
            for index, edge in enumerate(edges)
        ]
        order = np.argsort([-abs(row["effect"]) for row in rows], kind="stable")
        return pd.DataFrame([rows[index] for index in order])

    def heads_frame(self, *, level: float = 0.95) -> "pandas.DataFrame":
        """One row a head: `head`, the `total` effect of patching it, and the `direct` part of it, with intervals over
        users, and the means of the random heads of its layer."""
        import pandas as pd

        rows = []
        for place, head in enumerate(self.nodes):
            row: dict[str, Any] = {"head": str(head)}
            for name, values in (("total", self.total), ("direct", self.direct)):
                row |= columns(name, interval(self._by_user(values[:, place]), level))
                row[f"{name}_control"] = self._by_user(_mean(values[:, self._beside(head)])).mean()
            rows.append(row)
        return pd.DataFrame(rows)

    def _edges(self) -> Iterator[_Edge]:
        paths, direct, documents = self.paths, self.direct, self.documents
        names = {head: tuple(map(str, self.controls[str(head)])) for head in self.nodes}
        for place, sender in enumerate(self.senders):
            beside = [self.writers.index(head) for head in self.controls[str(sender)]]
            for number, receiver in enumerate(self.receivers):
                for part, into in enumerate(self.into if sender.layer < receiver.layer else ()):
                    effect, controls = paths[:, part, place, number], paths[:, part, beside, number]
                    yield _Edge(str(sender), str(receiver), into, names[sender], effect, controls)
        for place, head in enumerate(self.nodes):
            beside = self._beside(head)
            yield _Edge(str(head), LOGITS, "resid", names[head], direct[:, place], direct[:, beside])
            for number in range(documents.shape[2]):
                effect, controls = documents[:, place, number], documents[:, beside, number]
                if not effect.isnan().any():
                    yield _Edge(f"document {number + 1}", str(head), "attention", names[head], effect, controls)

    def _beside(self, head: Head) -> list[int]:
        """Places of a head's controls among `heads`."""
        return [self.heads.index(one) for one in self.controls[str(head)]]

    def _by_user(self, values: Float64[Tensor, " example"]) -> Float[np.ndarray, " user"]:
        return user_means(values, self.user_ids)


def measured(heads: HeadSet, controls: Mapping[str, HeadSet]) -> tuple[Head, ...]:
    """Heads, then those controls of some that are not among them."""
    beside = [control for head in heads for control in controls[str(head)]]
    return (*heads, *(HeadSet(beside) - heads))


def _mean(values: Float64[Tensor, "example control"]) -> Float64[Tensor, " example"]:
    """NaN where there is no control."""
    return values.mean(1)
