"""SetEffects: what ablating or patching sets of heads does, family by family, beside random sets."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from dps_lens.analysis.intervals import add_one_p, crossed_interval, interval, ratio_interval, user_means
from dps_lens.errors import ScoreError
from dps_lens.files import read_tensors, write_json, write_tensors
from dps_lens.heads import HeadSet

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

Part: TypeAlias = Literal["all", "copied", "rest"]
FULL = "full model"
CONDITIONS = ("own", "no_profile", "other_user", "neutral")
MIN_DRAWS = 20
_FILES = ("effects.safetensors", "effects.json")
_NOTHING = {"mean": float("nan"), "low": float("nan"), "high": float("nan")}


class Measure(NamedTuple):
    """A sum of changes of NLL over conditions, and the gain that it is a part of.

    Attributes:
        weights: condition → weight of its change under the edit.
        gain: condition → weight of its NLL in the full model; empty where no share is defined.
        kept: count what is left of the gain instead of what is gone.
    """

    weights: Mapping[str, float]
    gain: Mapping[str, float]
    kept: bool = False


_GAIN = {"no_profile": 1.0, "own": -1.0}
_GAIN_OTHER = {"other_user": 1.0, "own": -1.0}
MEASURES = {
    "taken": Measure({"own": 1.0, "no_profile": -1.0}, _GAIN),
    "kept": Measure({"own": 1.0, "no_profile": -1.0}, _GAIN, kept=True),
    "taken (other)": Measure({"own": 1.0, "other_user": -1.0}, _GAIN_OTHER),
    "kept (other)": Measure({"own": 1.0, "other_user": -1.0}, _GAIN_OTHER, kept=True),
    "harm": Measure({"no_profile": 1.0}, {}),
    "neutral": Measure({"neutral": 1.0}, {}),
    "necessity": Measure({"noising": 1.0}, _GAIN),
    "sufficiency": Measure({"denoising": -1.0}, _GAIN),
    "recovered": Measure({"vector": -1.0}, _GAIN),
    "recovered (other)": Measure({"vector (other)": -1.0}, _GAIN),
    "necessity (other)": Measure({"noising (other)": 1.0}, _GAIN_OTHER),
    "sufficiency (other)": Measure({"denoising (other)": -1.0}, _GAIN_OTHER),
}


@dataclass(frozen=True)
class SetEffects:
    """Changes of NLL when sets of heads are edited, nats per token, of `ablation_curve` or `patch_heads`.

    The last axis of every tensor is (all tokens, copied tokens): the second counts only response tokens that
    continue an n-gram of the user's profile, divided by all tokens, so that copied + rest = all.

    Attributes:
        families: names.
        ks: sizes of the sets.
        user_ids: owner of each example.
        example_ids: one a row.
        full: condition → `Float64[Tensor, "example 2"]`, NLL of the unedited model.
        chosen: condition → `Float64[Tensor, "example family k 2"]`, NLL edited − unedited.
        draws: condition → `Float64[Tensor, "draw user family k 2"]`, the same for random sets; draw d is
            measured on example `d mod n` of a user's n, so that draws are spread over the examples.
        manifest: settings and rankings.
    """

    families: tuple[str, ...]
    ks: tuple[int, ...]
    user_ids: tuple[str, ...]
    example_ids: tuple[str, ...]
    full: dict[str, Float64[Tensor, "example 2"]]
    chosen: dict[str, Float64[Tensor, "example family k 2"]]
    draws: dict[str, Float64[Tensor, "draw user family k 2"]]
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def measures(self) -> tuple[str, ...]:
        """Measures that these conditions allow."""
        return tuple(name for name, measure in MEASURES.items() if {*measure.weights} <= {*self.chosen})

    def to_frame(self, *, part: Part = "all", level: float = 0.95) -> "pandas.DataFrame":
        """One row a family, k and measure.

        `taken` is the part of the gain NLL(no profile) − NLL(own profile) that goes with the heads, `kept` the
        part that stays, `(other)` the same against another user's profile. `harm` is the cost without a
        profile, `neutral` the cost on text that has nothing to do with users. `necessity`: loss when the heads'
        z of a run without profile is patched in; `sufficiency`: what is recovered by patching the
        profile run's z into a run without profile. `recovered`: what adding the heads' mean output to a run without
        profile recovers; `recovered (other)`, the mean output over another user's texts.

        `NLL, …` is the NLL itself under ablation.

        Columns: `mean`, `low`, `high` (Student's t over users); `percent…` of the gain (Fieller over users, NaN
        where the gain's interval spans 0); `control`, the mean of the random sets over the same examples, with
        `control_low` and `control_high`, between which 95% of them lie; `difference` from them, its interval over
        users and draws; `p`, one-sided and add-one, against them. Fewer than 20 random sets give no band and no
        p. `controls` says whether the random sets are of the `same layers`, or partly of the `nearest layers` where
        a layer has too few other heads.

        Args:
            part: `"all"` tokens, the `"copied"` ones, or the `"rest"`; the two add up to all.
            level: of the intervals.
        """
        import pandas as pd

        rows = self._full_rows(part, level)
        for index, family in enumerate(self.families):
            for position, k in enumerate(self.ks):
                about = {"family": family, "k": k}
                for name in self.measures:
                    rows.append(about | {"measure": name} | self._row(MEASURES[name], index, position, part, level))
                for name in (name for name in CONDITIONS if name in self.full and name in self.chosen):
                    values = self.full[name] + self.chosen[name][:, index, position]
                    found = interval(self._users({name: values}, {name: 1.0}, part), level)
                    rows.append(about | {"measure": f"NLL, {name}"} | found)
        return pd.DataFrame(rows)

    def _full_rows(self, part: Part, level: float) -> list[dict[str, Any]]:
        known = [name for name in CONDITIONS if name in self.full]
        conditions: dict[str, Mapping[str, float]] = {f"NLL, {name}": {name: 1.0} for name in known}
        if "no_profile" in self.full:
            conditions["gain"] = _GAIN
        if "other_user" in self.full:
            conditions["gain (other)"] = _GAIN_OTHER
        return [
            {"family": FULL, "k": 0, "measure": name, **interval(self._users(self.full, weights, part), level)}
            for name, weights in conditions.items()
        ]

    def _row(self, measure: Measure, family: int, k: int, part: Part, level: float) -> dict[str, Any]:
        chosen = {name: values[:, family, k] for name, values in self.chosen.items()}
        values = self._users(chosen, measure.weights, part)
        gain = self._users(self.full, measure.gain, part) if measure.gain else None
        if measure.kept and gain is not None:
            values = gain - values
        row: dict[str, Any] = interval(values, level)
        percent = ratio_interval(values, gain, level) if gain is not None else _NOTHING
        row |= {f"percent{_suffix(name)}": 100 * value for name, value in percent.items()}
        if not self.draws or not all(name in self.draws for name in measure.weights):
            return row
        draws = {name: found[:, :, family, k] for name, found in self.draws.items()}
        random = self._levelled(_sum(draws, measure.weights, part).numpy())
        if measure.kept and gain is not None:
            random = gain - random
        row |= {"control": float(random.mean()), "controls": self._controls(family, k)}
        row |= {f"difference{_suffix(n)}": v for n, v in crossed_interval(values - random, level).items()}
        if len(random) >= MIN_DRAWS:
            means, tail = random.mean(1), (1 - level) / 2
            low, high = np.quantile(means, [tail, 1 - tail])
            row |= {"control_low": float(low), "control_high": float(high)}
            row["p"] = add_one_p(-values.mean(), -means) if measure.kept else add_one_p(values.mean(), means)
        return row

    def _levelled(self, draws: Float[np.ndarray, "draw user"]) -> Float[np.ndarray, "draw user"]:
        """Random sets as if each had been measured on all of a user's examples.

        An example's level, the mean of the draws on it, is replaced by the mean level of the user's examples;
        what is left of a draw is widened by `√(m / (m − 1))` for the m draws that the level was taken from.
        """
        found = np.empty_like(draws)
        for column, user in enumerate(dict.fromkeys(self.user_ids)):
            n = self.user_ids.count(user)
            of_example = [draws[start::n, column] for start in range(min(n, len(draws)))]
            level = np.mean([own.mean() for own in of_example])
            for start, own in enumerate(of_example):
                widen = (len(own) / (len(own) - 1)) ** 0.5 if len(own) > 1 else 0.0
                found[start::n, column] = level + (own - own.mean()) * widen
        return found

    def _controls(self, family: int, k: int) -> str:
        """Whether every layer has as many other heads as the chosen set holds there."""
        n_heads = self.manifest["model"]["n_heads"]
        for sets in self.manifest["sets"][self.families[family]].values():
            layers = Counter(head.layer for head in HeadSet.parse(sets[k]))
            if any(2 * count > n_heads for count in layers.values()):
                return "nearest layers"
        return "same layers"

    def _users(self, tensors: Mapping[str, Tensor], weights: Mapping[str, float], part: Part) -> np.ndarray:
        return user_means(_sum(tensors, weights, part), self.user_ids)

    def plot(self, measure: str | None = None) -> "plotly.graph_objects.Figure":
        """`dps_lens.plots.ablation` of these effects."""
        from dps_lens.plots import ablation

        return ablation(self, measure=measure)

    def save(self, folder: str | Path) -> None:
        """Write `effects.safetensors` and `effects.json`; a failed write leaves nothing that loads."""
        tensors_file, manifest = (Path(folder) / name for name in _FILES)
        manifest.unlink(missing_ok=True)  # never new values under an old manifest
        groups = {"full": self.full, "chosen": self.chosen, "draws": self.draws}
        write_tensors(
            tensors_file, {f"{g}.{name}": value for g, group in groups.items() for name, value in group.items()}
        )
        names = ("families", "ks", "user_ids", "example_ids", "manifest")
        write_json(manifest, {"format": 1, **{name: getattr(self, name) for name in names}})

    @classmethod
    def load(cls, folder: str | Path) -> "SetEffects":
        """Read what `save` wrote.

        Raises:
            ScoreError: the folder holds no whole effects.
        """
        tensors_file, manifest = (Path(folder) / name for name in _FILES)
        if not manifest.is_file():
            raise ScoreError(f"{folder} holds no effects (no {manifest.name}); is the run finished?")
        try:
            meta = json.loads(manifest.read_text(encoding="utf-8"))
            families, ks, users, examples = (tuple(meta[n]) for n in ("families", "ks", "user_ids", "example_ids"))
            settings = meta["manifest"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ScoreError(f"{manifest} is not a manifest of effects ({error})") from error
        tensors = read_tensors(tensors_file)
        groups: dict[str, dict[str, Tensor]] = {"full": {}, "chosen": {}, "draws": {}}
        for name, tensor in tensors.items():
            group, condition = name.split(".", 1)
            groups[group][condition] = tensor
        return cls(families, ks, users, examples, groups["full"], groups["chosen"], groups["draws"], settings)


def _sum(tensors: Mapping[str, Tensor], weights: Mapping[str, float], part: Part) -> Tensor:
    return torch.stack([weight * _part(tensors[name], part) for name, weight in weights.items()]).sum(0)


def _part(values: Float64[Tensor, "*rest 2"], part: Part) -> Float64[Tensor, "*rest"]:
    if part == "rest":
        return values[..., 0] - values[..., 1]
    if part not in ("all", "copied"):
        raise ScoreError(f"to_frame: part {part!r} is unknown; use 'all', 'copied' or 'rest'")
    return values[..., 0 if part == "all" else 1]


def _suffix(name: str) -> str:
    return "" if name == "mean" else f"_{name}"


def stack_draws(rows: Sequence[Mapping[int, Tensor]], user_ids: Sequence[str], n_draws: int) -> Tensor:
    """`[draw user family k 2]` from each example's draws, `draw → [family k 2]`; draws that every user has."""
    by_user: dict[str, dict[int, Tensor]] = {}
    for owner, found in zip(user_ids, rows, strict=True):
        by_user.setdefault(owner, {}).update(found)
    complete = [draw for draw in range(n_draws) if all(draw in own for own in by_user.values())]
    return torch.stack([torch.stack([own[draw] for own in by_user.values()]) for draw in complete])
