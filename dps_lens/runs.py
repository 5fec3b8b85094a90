"""Results on disk: a folder with one file a unit, so that an interrupted run resumes."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from warnings import warn

from torch import Tensor

from dps_lens.errors import RunError, ScoreError
from dps_lens.files import read_tensors, write_json, write_tensors

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
            for unit in self._units():
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
        return self.path / "units" / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.safetensors"

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


def kept(folder: RunFolder | None, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """A unit from its folder, or made anew and kept there; without a folder, made."""
    found = folder.get(key) if folder else None
    if found is None:
        found = make()
        if folder:
            folder.put(key, found)
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
