"""Results on disk: a folder with one file a unit, so that an interrupted run resumes; and how units are made."""

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias
from warnings import warn

from torch import Tensor
from tqdm.auto import tqdm

from dps_lens.errors import RunError, ScoreError
from dps_lens.files import read_tensors, replacing, write_json, write_tensors, write_text

_MANIFEST = "run.json"


class RunFolder:
    """Units of one run; each is written whole as soon as it is done.

    Args:
        path: the folder; made when it is not there.
        fingerprint: everything that decides the results; compared with what the folder was made with.
        force: drop what the folder holds.

    Raises:
        RunError: the folder was made with other settings; names them.
    """

    def __init__(self, path: str | Path, fingerprint: Mapping[str, Any], *, force: bool = False) -> None:
        self.path = Path(path)
        manifest = self.path / _MANIFEST
        wanted = json.loads(json.dumps(dict(fingerprint)))
        if force and self.path.is_dir():
            for unit in (*self._units(), *(self.path / "quarantine").glob("*.txt")):
                unit.unlink()
            for result in (manifest, self.path / "scores.json", self.path / "scores.safetensors"):
                result.unlink(missing_ok=True)
        if manifest.is_file():
            self._compare(manifest, wanted)
        else:
            write_json(manifest, wanted)

    def _units(self) -> list[Path]:
        return sorted((self.path / "units").glob("*.safetensors"))

    def _compare(self, manifest: Path, wanted: dict[str, Any]) -> None:
        try:
            found = json.loads(manifest.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise RunError(f"{manifest} is not valid JSON ({error}); use another folder or --force") from error
        changed = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
        if changed:
            first = changed[0]
            raise RunError(
                f"{self.path} was made with other settings: {first} was {_short(found.get(first))}, now "
                f"{_short(wanted.get(first))}"
                + (f" (also {', '.join(changed[1:])})" if len(changed) > 1 else "")
                + "; use another folder, or --force to start anew"
            )

    def _file(self, key: str) -> Path:
        return self.path / "units" / f"{_name(key)}.safetensors"

    def _quarantine(self, key: str) -> Path:
        return self.path / "quarantine" / f"{_name(key)}.txt"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """A finished unit, or None; a torn file is redone with a warning."""
        file = self._file(key)
        if not file.is_file():
            return None
        try:
            return read_tensors(file)
        except ScoreError:
            warn(f"{file} is not whole; the unit is computed again", stacklevel=2)
            return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a finished unit."""
        write_tensors(self._file(key), tensors, {"unit": key})
        self._quarantine(key).unlink(missing_ok=True)

    def adopt(self, other: Path) -> None:
        """Copy the whole units of another folder of the same run."""
        for unit in sorted((other / "units").glob("*.safetensors")):
            try:
                read_tensors(unit)
            except ScoreError:
                warn(f"{unit} is not whole and is left out", stacklevel=3)
                continue
            with replacing(self.path / "units" / unit.name) as copy:
                shutil.copyfile(unit, copy)

    @property
    def n_units(self) -> int:
        """How many are finished."""
        return len(self._units())

    def quarantine(self, key: str, error: str) -> Path:
        """Note why a unit was given up; it is tried again when the run is started again."""
        write_text(self._quarantine(key), f"{key}\n\n{error}\n")
        return self._quarantine(key)


def kept(folder: RunFolder | None, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """A unit from its folder, or made anew and kept there; without a folder, made."""
    found = folder.get(key) if folder else None
    if found is None:
        found = make()
        if folder:
            folder.put(key, found)
    return found


class Work(ABC):
    """A run that falls into units, each made from its key, on this machine or another.

    Subclasses are dataclasses. Their fields travel; `model` does not, every machine loads it for itself.
    """

    model: Any

    def given(self, key: str) -> Any:
        """What a unit needs of units that were made before; it travels with the key."""
        return None

    def owner(self, key: str) -> str:
        """Units of one owner belong into one shard."""
        return key

    @abstractmethod
    def make(self, key: str, given: Any = None) -> dict[str, Tensor]:
        """One unit."""

    def __getstate__(self) -> dict[str, Any]:
        names = {one.name for one in fields(self)} - {"model"}  # type: ignore[arg-type]
        return {name: value for name, value in vars(self).items() if name in names}


@dataclass(frozen=True)
class Failure:
    """A unit that was given up, with its traceback."""

    error: str

    @property
    def reason(self) -> str:
        """The last line."""
        return self.error.strip().splitlines()[-1]


Unit: TypeAlias = dict[str, Tensor] | Failure


class Engine(ABC):
    """Where units are made; without one, here and in order."""

    status: str = ""
    """Beside the progress bar."""

    def start(self, model: Any) -> None:  # noqa: B027
        """Be ready for work on this model; called before its description is asked for."""

    def share(self, work: Work, keys: Sequence[str]) -> Sequence[str]:
        """The keys that are made in this run."""
        return keys

    @abstractmethod
    def make(self, work: Work, keys: Sequence[str], folder: Path | None) -> Iterator[tuple[str, Unit]]:
        """Units as they are finished."""

    def note(self, manifest: dict[str, Any]) -> None:  # noqa: B027
        """Say in a manifest what this engine leaves out."""


@dataclass
class Units:
    """The units of a run, in the order of their keys, and those that were given up: key → reason."""

    made: dict[str, dict[str, Tensor]]
    quarantined: dict[str, str] = field(default_factory=dict)

    def note(self, manifest: dict[str, Any], engine: Engine | None) -> None:
        """Say in a manifest what is not in the result."""
        if self.quarantined:
            manifest["quarantined"] = self.quarantined
        if engine is not None:
            engine.note(manifest)


def make_units(
    work: Work,
    keys: Sequence[str],
    *,
    folder: RunFolder | None = None,
    engine: Engine | None = None,
    what: str = "units",
    unit: str = "example",
    split: bool = True,
    progress: bool = True,
) -> Units:
    """Make units that are not in the folder yet, here or on an engine, and keep each as soon as it is there.

    Args:
        work: makes them.
        keys: which.
        folder: where they are kept, if anywhere.
        engine: who makes them.
        what: on the progress bar.
        unit: on the progress bar.
        split: a shard makes its part only; else all of them.
        progress: show a progress bar.

    Raises:
        RunError: not one unit could be made.
    """
    if not keys:
        return Units({})
    if engine is not None and split:
        keys = engine.share(work, keys)
    found = {key: one for key in keys if folder is not None and (one := folder.get(key)) is not None}
    missing = [key for key in keys if key not in found]
    if engine is None:
        source: Iterator[tuple[str, Unit]] = ((key, work.make(key, work.given(key))) for key in missing)
    else:
        source = engine.make(work, missing, folder.path if folder else None)
    quarantined = {}
    disable = None if progress else True
    with tqdm(total=len(keys), initial=len(found), desc=what, unit=unit, disable=disable) as bar:
        for key, made in source:
            if isinstance(made, Failure):
                quarantined[key] = made.reason
                place = f"; its traceback is in {folder.quarantine(key, made.error)}" if folder else ""
                warn(f"unit {key!r} was given up: {made.reason}{place}", stacklevel=3)
            else:
                if folder:
                    folder.put(key, made)
                found[key] = made
            if engine is not None:
                bar.set_postfix_str(engine.status, refresh=False)
            bar.update()
    if quarantined and not found:
        raise RunError(f"{what}: every unit was given up, the first because of {next(iter(quarantined.values()))}")
    return Units({key: found[key] for key in keys if key in found}, quarantined)


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:20]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
