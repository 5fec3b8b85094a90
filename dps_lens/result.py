"""What every result can do: say what it is, be a table and a figure, and be kept in a folder."""

import hashlib
import html
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from jaxtyping import jaxtyped

from dps_lens.digests import tensors_digest
from dps_lens.errors import DPSLensError, ScoreError, reason
from dps_lens.files import as_json, read_object, read_tensors, replacing, write_tensors
from dps_lens.heads import HeadSet
from dps_lens.version import __version__

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

_FORMAT = 2
_UNREADABLE = (
    DPSLensError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, AssertionError
)  # fmt: skip
_ROWS = 8

Self = TypeVar("Self", bound="Result")


def provenance() -> dict[str, str]:
    """Who made a result: version of dps_lens, command, and the time in UTC."""
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv else ""
    return {
        "dps_lens": __version__,
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
        """Write `STEM.json` and, for tensors, `STEM.safetensors`, with a digest of both that `load` checks.

        Raises:
            FileError: they cannot be written; a result that the folder held before is still there.
        """
        tensors: dict[str, torch.Tensor] = {}
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.init and one.name != "manifest"}  # type: ignore[arg-type]
        packed = {name: _packed(value, name, tensors) for name, value in own.items()}
        manifest = {"made": provenance(), **self.manifest}
        meta = {"kind": type(self).__name__, "format": _FORMAT, "fields": packed, "manifest": manifest}
        file = Path(folder) / f"{self.stem}.json"
        # Both are written before either takes its place: a disk that fills up leaves the former result whole.
        with replacing(file) as new:
            new.write_text(_as_text(meta | {"digest": _digest(meta, tensors)}), encoding="utf-8")
            if tensors:
                write_tensors(file.with_suffix(".safetensors"), tensors)
            else:
                file.with_suffix(".safetensors").unlink(missing_ok=True)

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
        if not os.path.isfile(file):
            raise cls.error(f"{folder} holds no {cls.__name__} (no {file.name}); is the run finished?")
        try:
            meta = read_object(file, cls.error)
            values = _values(cls, meta, file.with_suffix(".safetensors"))
            return cls(**values)
        except _UNREADABLE as error:
            raise cls.error(f"{file} is not a whole {cls.__name__} ({reason(error)}); make it anew") from error


def _as_text(meta: Mapping[str, Any]) -> str:
    return as_json(meta, sort_keys=False)  # methods and families have an order


def _digest(meta: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    return hashlib.sha256(f"{_as_text(meta)}{tensors_digest(tensors)}".encode()).hexdigest()[:32]


def _values(cls: type[Result], meta: dict[str, Any], beside: Path) -> dict[str, Any]:
    """The fields of a result, of their types and with the digest that was written with them.

    Raises:
        ValueError: they are not.
    """
    digest = meta.pop("digest", None)  # whoever edits a file by hand leaves it out
    if {*meta} != {"kind", "format", "fields", "manifest"}:
        raise ValueError(f"its fields are {', '.join(meta)}"[:200])
    if (meta["kind"], meta["format"]) != (cls.__name__, _FORMAT):
        raise ValueError(f"it is a {meta['kind']!r:.40} of format {meta['format']!r:.40}")
    text = _as_text(meta)
    has_tensors = '"$": "tensor"' in text or '"$": "array"' in text
    tensors = read_tensors(beside) if has_tensors else {}
    if digest is not None and digest != _digest(meta, tensors):
        raise ValueError("its content is not what was written")
    types = {one.__name__: one for one in cls.parts}
    values = {name: _unpacked(value, tensors, types) for name, value in meta["fields"].items()}
    _check_types(cls, values | {"manifest": meta["manifest"]})
    return values | {"manifest": meta["manifest"]}


def _check_types(cls: type, values: Mapping[str, Any]) -> None:
    import pandas

    hints = get_type_hints(cls, localns={"pandas": pandas, "pd": pandas})
    with jaxtyped("context"):  # an axis of one name has one length
        for name, value in values.items():
            if name in hints and not _fits(value, hints[name]):
                raise TypeError(f"field {name!r} holds a {type(value).__name__} that does not fit {hints[name]}")


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is what an annotation says, down to the items of lists and the axes of tensors."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if hasattr(hint, "_fields"):  # a named tuple, which may have been kept as a tuple
        kinds = get_type_hints(hint).values()
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return hint is Any or (_holds(value, origin, inner) if origin is not None else isinstance(value, hint))


def _holds(value: object, kind: type, inner: tuple[Any, ...]) -> bool:
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping) and all(_fits(each, inner[1]) for each in value.values())
    if not isinstance(value, (list, tuple)) or (kind in (list, tuple) and not isinstance(value, kind)):
        return False
    if kind is tuple and inner[-1] is not Ellipsis:
        return len(value) == len(inner) and all(map(_fits, value, inner))
    return all(_fits(each, inner[0]) for each in value)


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
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        tagged = {"$": type(value).__name__, **value._asdict()}
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
        "heads": _heads,
        "frame": _frame,
        "tuple": lambda items: (*items,),
        None: dict,
        **types,
    }
    own = {key: _unpacked(each, tensors, types) for key, each in value.items() if key != "$"}
    kind = value.get("$")
    if kind in types:
        _check_types(types[str(kind)], own)
    return make[kind](**own)


def _heads(names: str, label: str, shape: list[int] | None) -> HeadSet:
    if not isinstance(label, str) or not _fits(shape, list[int] | None) or len(shape or (0, 0)) != 2:
        raise TypeError(f"heads of label {label!r:.40} and shape {shape!r:.40}")
    return HeadSet(HeadSet.parse(names), label, (shape[0], shape[1]) if shape else None)


def _frame(data: list[Any], columns: list[str]) -> "pandas.DataFrame":
    import pandas as pd

    return pd.DataFrame(data, columns=columns)
