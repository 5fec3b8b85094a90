"""Results on disk: a folder with one file a unit, so that an interrupted run resumes."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from warnings import warn

from torch import Tensor

from dps_lens.digests import json_digest
from dps_lens.errors import RunError, ScoreError
from dps_lens.files import create_json, read_object, read_unit, write_text, write_unit, writing
from dps_lens.result import provenance

_MANIFEST, _MADE = "run.json", "made.json"


class KeptUnit(dict[str, Tensor]):
    """A unit that was read; to ask it for a tensor that it lacks is an error that names its file."""

    file: Path

    def __missing__(self, name: str) -> Tensor:
        raise RunError(
            f"{self.file} holds no {name!r}, only {', '.join(sorted(self)) or 'nothing'}: it was made by other code; "
            "use another folder, or --force to start anew"
        )


class RunFolder:
    """Units of one run; each is written whole as soon as it is done, with the run that it belongs to.

    Args:
        path: the folder; made when it is not there.
        fingerprint: everything that decides the results; compared with what the folder was made with.
        force: drop what the folder holds.

    Attributes:
        identity: a digest of the fingerprint, which every unit carries.

    Raises:
        RunError: the folder was made with other settings; names them.
    """

    def __init__(self, path: str | Path, fingerprint: Mapping[str, Any], *, force: bool = False) -> None:
        self.path = Path(path)
        if force:
            self._clear()
        self.identity = json_digest(claim(self.path / _MANIFEST, fingerprint, self.path))
        create_json(self.path / _MADE, provenance())

    def _clear(self) -> None:
        with writing(self.path):
            for file in (*self._units(), *(self.path / "quarantine").glob("*.txt")):
                file.unlink(missing_ok=True)
            for name in (_MANIFEST, _MADE):
                (self.path / name).unlink(missing_ok=True)

    @property
    def made(self) -> dict[str, str]:
        """Who began the run, and when; the same after every restart."""
        try:
            found = read_object(self.path / _MADE, RunError)
        except RunError:
            return provenance()
        return found if all(isinstance(value, str) for value in found.values()) else provenance()

    def check(self, fingerprint: Mapping[str, Any]) -> None:
        """Refuse results where what decides them has changed, or the folder was begun anew by somebody else.

        Args:
            fingerprint: as it is now.

        Raises:
            RunError: names what has changed.
        """
        begun = read_manifest(self.path)
        if json_digest(begun) != self.identity:
            raise RunError(f"{self.path} was begun anew with other settings in the meantime; use another folder")
        for name, old, new in changes(begun, _plain(fingerprint)):
            raise RunError(
                f"{self.path}: {name} was {_short(old)} when the run began and is {_short(new)} now, so that its units "
                "were not all made alike; use another folder, or --force to start anew"
            )

    def _units(self) -> list[Path]:
        return sorted((self.path / "units").glob("*.safetensors"))

    def _file(self, key: str) -> Path:
        return self.path / "units" / f"{_name(key)}.safetensors"

    def _quarantine(self, key: str) -> Path:
        return self.path / "quarantine" / f"{_name(key)}.txt"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """A finished unit, or None; one that is torn, altered or not this run's own is redone with a warning."""
        file = self._file(key)
        if not file.is_file():
            return None
        try:
            unit, _ = self._own(file)
        except ScoreError as error:
            warn(f"{error}; the unit is computed again", stacklevel=2)
            return None
        kept = KeptUnit(unit)
        kept.file = file
        return kept

    def _own(self, file: Path) -> tuple[dict[str, Tensor], str]:
        """A unit of this run with its key.

        Raises:
            ScoreError: it is torn, altered, of another run, or not the unit that the file is named after.
        """
        try:
            unit, about = read_unit(file)
        except ScoreError as error:
            raise ScoreError(str(error).removesuffix("; delete it and run again")) from error
        if about.get("run") != self.identity:
            raise ScoreError(f"{file} is not of this run")
        key = str(about.get("unit"))
        if _name(key) != file.stem:
            raise ScoreError(f"{file} is another unit, {key!r}")
        return unit, key

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a finished unit."""
        write_unit(self._file(key), tensors, {"run": self.identity, "unit": key})
        self._quarantine(key).unlink(missing_ok=True)

    def adopt(self, other: Path) -> None:
        """Copy the units of another folder of the same run; any that are not whole, or not its own, are left out."""
        for file in sorted((other / "units").glob("*.safetensors")):
            try:
                unit, key = self._own(file)
            except ScoreError as error:
                warn(f"{error}; it is left out", stacklevel=3)
                continue
            self.put(key, unit)

    @property
    def n_units(self) -> int:
        """How many are finished."""
        return len(self._units())

    def quarantine(self, key: str, error: str) -> Path:
        """Note why a unit was given up; it is tried again when the run is started again."""
        write_text(self._quarantine(key), f"{key}\n\n{error}\n")
        return self._quarantine(key)


def is_run(path: str | Path) -> bool:
    """Whether a folder holds a run."""
    return (Path(path) / _MANIFEST).is_file()


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The fingerprint that a run folder was made with.

    Raises:
        RunError: there is none, or it cannot be read.
    """
    return _read(Path(path) / _MANIFEST)


def _read(manifest: Path) -> dict[str, Any]:
    try:
        return read_object(manifest, RunError)
    except RunError as error:
        raise RunError(f"{error}; use another folder, or --force to start anew") from error


def claim(manifest: Path, fingerprint: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """Write what decides the results of a place, or compare with what is written there.

    Of several that begin at once, one writes; the others compare.

    Args:
        manifest: the file.
        fingerprint: everything that decides the results.
        place: for errors, what the file stands for.

    Returns:
        what the file holds.

    Raises:
        RunError: it holds something else; names what.
    """
    wanted = _plain(fingerprint)
    if create_json(manifest, wanted):
        return dict(wanted)
    found = _read(manifest)
    changed = list(changes(found, wanted))
    if changed:
        (name, old, new), *rest = changed
        also = f" (also {', '.join(other for other, _, _ in rest)})" if rest else ""
        raise RunError(
            f"{place} was made with other settings: {name} was {_short(old)}, now {_short(new)}{also}; use another "
            f"{'folder' if place.is_dir() else 'file'}, or --force to start anew"
        )
    return found


def _plain(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """As it is read again."""
    return dict(json.loads(json.dumps(dict(fingerprint))))


def changes(found: Mapping[str, Any], wanted: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, Any, Any]]:
    """What differs between two fingerprints: dotted names with both values."""
    for key in sorted({*found, *wanted}):
        old, new = found.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from changes(old, new, f"{inside}{key}.")
        elif old != new and json.dumps(old) != json.dumps(new):  # NaN is not equal to itself
            yield f"{inside}{key}", old, new


def kept(folder: RunFolder | None, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """A unit from its folder, or made anew and kept there; without a folder, made."""
    unit = folder.get(key) if folder else None
    if unit is None:
        unit = make()
        if folder:
            folder.put(key, unit)
    return unit


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:20]


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
