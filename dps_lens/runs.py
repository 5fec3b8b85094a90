"""Results on disk: a folder with one file a unit, so that an interrupted run resumes."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from warnings import warn

from torch import Tensor

from dps_lens.errors import RunError, ScoreError
from dps_lens.files import read_object, read_tensors, replacing, write_json, write_tensors, write_text, writing
from dps_lens.result import provenance

_MANIFEST, _MADE = "run.json", "made.json"


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
            with writing(self.path):
                for unit in (*self._units(), *(self.path / "quarantine").glob("*.txt")):
                    unit.unlink()
                for file in (manifest, self.path / _MADE):
                    file.unlink(missing_ok=True)
        if manifest.is_file():
            self._compare(manifest, wanted)
        else:
            write_json(manifest, wanted)
            write_json(self.path / _MADE, provenance())

    @property
    def made(self) -> dict[str, str]:
        """Who began the run, and when; the same after every restart."""
        try:
            found = read_object(self.path / _MADE, RunError)
        except RunError:
            return provenance()
        return found if all(isinstance(value, str) for value in found.values()) else provenance()

    def _units(self) -> list[Path]:
        return sorted((self.path / "units").glob("*.safetensors"))

    def _compare(self, manifest: Path, wanted: dict[str, Any]) -> None:
        try:
            found = read_object(manifest, RunError)
        except RunError as error:
            raise RunError(f"{error}; use another folder, or --force to start anew") from error
        changed = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
        if changed:
            first = changed[0]
            raise RunError(
                f"{self.path} was made with other settings: {first[:60]} was {_short(found.get(first))}, now "
                f"{_short(wanted.get(first))}"
                + (f" (also {', '.join(changed[1:])[:200]})" if len(changed) > 1 else "")
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
