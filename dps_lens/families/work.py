"""Families in units: a prompt, a needle or a trial each, made here or on an engine."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from dps_lens.model import HookedModel
from dps_lens.runs import RunFolder
from dps_lens.work import Engine, Work, make_units


@runtime_checkable
class InUnits(Protocol):
    """A family that scores one key at a time."""

    def measure(self, model: HookedModel, key: str, given: object = None) -> dict[str, Tensor]:
        """What one key gives."""
        ...


@dataclass
class FamilyWork(Work):
    """The units of a family.

    Attributes:
        family: makes them.
        inputs: what a unit needs of units that were made before.
        left_out: for the manifest, the units that could not be made.
    """

    model: HookedModel
    family: InUnits
    inputs: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, Any] = field(default_factory=dict)

    def given(self, key: str) -> Any:
        return self.inputs.get(key)

    def make(self, key: str, given: object = None) -> dict[str, Tensor]:
        return self.family.measure(self.model, key, given)

    def run(
        self,
        keys: Sequence[str],
        *,
        folder: RunFolder | None,
        engine: Engine | None,
        what: str,
        unit: str,
        progress: bool,
    ) -> dict[str, dict[str, Tensor]]:
        """Units by key; all of them also where an engine is a shard, for all shards compare with the same heads."""
        found = make_units(
            self, keys, folder=folder, engine=engine, what=what, unit=unit, split=False, progress=progress
        )
        if found.quarantined:
            self.left_out.setdefault("quarantined", {}).update(found.quarantined)
        return found.made
