"""What every result can do: say what it is, be a table and a figure, and be kept in a folder."""

import html
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime, timezone
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch

from dps_lens.errors import DPSLensError, ScoreError
from dps_lens.files import read_tensors, replacing, write_json, write_tensors
from dps_lens.heads import HeadSet

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

_FORMAT = 2
_ROWS = 8

Self = TypeVar("Self", bound="Result")


def provenance() -> dict[str, str]:
    """Who made a result: version of dps_lens, command, and the time in UTC."""
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv else ""
    return {
        "dps_lens": version("dps_lens"),
        "command": command,
        "date": f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%MZ}",
    }


class Result(ABC):
    """Base of all results, which are dataclasses with a `manifest`: settings, seeds, digests and provenance.

    Attributes:
        stem: of the files that `save` writes.
        figure: the function of `dps_lens.plots` that draws it.
        error: what `load` raises.
        parts: dataclasses that its fields are made of.
    """

    stem: ClassVar[str]
    figure: ClassVar[str] = ""
    error: ClassVar[type[DPSLensError]] = ScoreError
    parts: ClassVar[tuple[type, ...]] = ()
    manifest: dict[str, Any]

    @abstractmethod
    def to_frame(self) -> "pandas.DataFrame":
        """The numbers as a tidy table."""

    def summary(self) -> str:
        """What it holds, in a line."""
        return ""

    def plot(self, *arguments: Any, **options: Any) -> "plotly.graph_objects.Figure":
        """The figure of `dps_lens.plots` that belongs to this result; its options are taken.

        Raises:
            DPSLensError: none belongs to it.
        """
        if not self.figure:
            raise self.error(f"a {type(self).__name__} has no figure; its numbers are in .to_frame()")
        # Named, not imported: figures stand above results, and a result knows its figure as a script its entry point.
        return getattr(import_module("dps_lens.plots"), self.figure)(self, *arguments, **options)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.summary()})"

    def _repr_html_(self) -> str:
        frame = self.to_frame()
        rest = f"<p>… {len(frame) - _ROWS} rows more in <code>.to_frame()</code></p>" if len(frame) > _ROWS else ""
        table = frame.head(_ROWS).to_html(index=False, border=0, float_format="{:.4g}".format)
        return f"<p><b>{type(self).__name__}</b>: {html.escape(self.summary())}</p>{table}{rest}"

    def save(self, folder: str | Path) -> None:
        """Write `STEM.json` and, for tensors, `STEM.safetensors`; a failed write leaves what was there, or nothing."""
        tensors: dict[str, torch.Tensor] = {}
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.init and one.name != "manifest"}  # type: ignore[arg-type]
        packed = {name: _packed(value, name, tensors) for name, value in own.items()}
        manifest = {"made": provenance(), **self.manifest}
        meta = {"kind": type(self).__name__, "format": _FORMAT, "fields": packed, "manifest": manifest}
        with replacing(Path(folder) / f"{self.stem}.json") as new:
            write_json(new, meta, sort_keys=False)  # methods and families have an order
            self._save_tensors(Path(folder), tensors)

    def _save_tensors(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put new tensors in the place of old ones; what was saved before goes when all that is new is written."""
        if not tensors:
            self.remove(folder)
            return
        with replacing(folder / f"{self.stem}.safetensors") as values:
            write_tensors(values, tensors)
            self.remove(folder)  # never new values under an old manifest

    @classmethod
    def remove(cls, folder: str | Path) -> None:
        """Delete what `save` wrote."""
        for ending in ("json", "safetensors"):
            (Path(folder) / f"{cls.stem}.{ending}").unlink(missing_ok=True)

    @classmethod
    def load(cls: type[Self], folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            DPSLensError: the folder holds no whole result of this kind.
        """
        file = Path(folder) / f"{cls.stem}.json"
        if not file.is_file():
            raise cls.error(f"{folder} holds no {cls.__name__} (no {file.name}); is the run finished?")
        try:
            text = file.read_text(encoding="utf-8")
            meta = json.loads(text)
            if (meta["kind"], meta["format"]) != (cls.__name__, _FORMAT):
                raise ValueError(f"{meta['kind']} of format {meta['format']}")
            has_tensors = '"$": "tensor"' in text or '"$": "array"' in text
            tensors = read_tensors(file.with_suffix(".safetensors")) if has_tensors else {}
            types = {one.__name__: one for one in cls.parts}
            values = {name: _unpacked(value, tensors, types) for name, value in meta["fields"].items()}
            values["manifest"] = meta["manifest"]
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DPSLensError):
                raise
            raise cls.error(f"{file} is not a whole {cls.__name__} ({error}); make it anew") from error


def _packed(value: object, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """A field as JSON; tensors go beside it, under the field's name."""
    tagged: Any = value
    if isinstance(value, torch.Tensor):
        tensors[name], tagged = value, {"$": "tensor", "name": name}
    elif isinstance(value, np.ndarray):
        tensors[name], tagged = torch.from_numpy(np.ascontiguousarray(value)), {"$": "array", "name": name}
    elif isinstance(value, HeadSet):
        tagged = {"$": "heads", "names": str(value), "label": value.label, "shape": value.shape}
    elif hasattr(value, "to_dict") and hasattr(value, "columns"):
        tagged = {"$": "frame", **value.to_dict("split", index=False)}
    elif is_dataclass(value) and not isinstance(value, type):
        own = {one.name: _packed(getattr(value, one.name), f"{name}.{one.name}", tensors) for one in fields(value)}
        tagged = {"$": type(value).__name__, **own}
    elif isinstance(value, Mapping):
        tagged = {str(key): _packed(each, f"{name}.{key}", tensors) for key, each in value.items()}
    elif isinstance(value, (list, tuple)):
        items = [_packed(each, f"{name}.{index}", tensors) for index, each in enumerate(value)]
        tagged = {"$": "tuple", "items": items} if isinstance(value, tuple) else items
    return tagged


def _unpacked(value: object, tensors: Mapping[str, torch.Tensor], types: Mapping[str, type]) -> Any:
    if isinstance(value, list):
        return [_unpacked(each, tensors, types) for each in value]
    if not isinstance(value, dict):
        return value
    make: dict[Any, Any] = {
        "tensor": lambda name: tensors[name],
        "array": lambda name: tensors[name].numpy(),
        "heads": lambda names, label, shape: HeadSet(HeadSet.parse(names), label, tuple(shape) if shape else None),
        "frame": _frame,
        "tuple": lambda items: (*items,),
        None: dict,
        **types,
    }
    own = {key: _unpacked(each, tensors, types) for key, each in value.items() if key != "$"}
    return make[value.get("$")](**own)


def _frame(data: list[Any], columns: list[str]) -> "pandas.DataFrame":
    import pandas as pd

    return pd.DataFrame(data, columns=columns)
