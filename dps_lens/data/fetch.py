"""Download LaMP."""

import os
from pathlib import Path
from typing import BinaryIO

from platformdirs import user_cache_path

from dps_lens.digests import file_digest
from dps_lens.errors import DataError, FileError, reason
from dps_lens.files import read_json, read_object, write_json, writing

MAX_BYTES = 16 * 2**30
"""Of a file, unpacked; the largest of LaMP is far smaller."""

LAMP = "https://ciir.cs.umass.edu/downloads/LaMP"
_PARTS = ("questions", "outputs")
_SUMS = "sha256.json"


def folder_of(name: str) -> Path:
    """Where `fetch` puts a task by default."""
    return user_cache_path("dps_lens") / "data" / name


def fetch(name: str, *, split: str = "dev", to: str | Path | None = None, mirror: str = LAMP) -> Path:
    """Download questions and outputs of a LaMP task; goes on where an earlier download stopped.

    A file counts as there if it has the SHA-256 that was written down when it was complete.

    Args:
        name: `"lamp-1"` … `"lamp-7"`.
        split: `"dev"` or `"train"`; the outputs of `test` are not public.
        to: folder; one of the user's cache by default, where `load_users(name)` looks.
        mirror: an address with the folders of the official one.

    Returns:
        the questions file, for `load_users`.

    Raises:
        DataError: the name is unknown, the network or server fails (what came is kept), or what came is no list of
            questions or answers, or has no end (nothing is kept).
        FileError: the folder cannot be written.
    """
    number = name.lower().removeprefix("lamp-")
    if number not in tuple("1234567") or split not in ("dev", "train"):
        raise DataError(f"fetch: {name!r}, {split!r} are not a task and split; use lamp-1 to lamp-7, 'dev' or 'train'")
    folder = Path(to) if to is not None else folder_of(f"lamp-{number}")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    sums = _known(folder)
    for part in _PARTS:
        file = folder / f"{split}_{part}.json"
        if not (os.path.isfile(file) and sums.get(file.name) == file_digest(file)):
            place = "LaMP_2/new" if number == "2" else f"LaMP_{number}"
            _download(f"{mirror.rstrip('/')}/{place}/{split}/{file.name}", file)
            sums[file.name] = file_digest(file)
            write_json(folder / _SUMS, sums)
    return folder / f"{split}_questions.json"


def _known(folder: Path) -> dict[str, str]:
    try:
        found = read_object(folder / _SUMS, DataError)
    except DataError:
        return {}
    return {name: digest for name, digest in found.items() if isinstance(digest, str)}


class _Bounded:
    """A file that takes so many bytes and no more; a server may send without end, or packed."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path

    def write(self, data: bytes) -> int:
        if self._file.tell() + len(data) > MAX_BYTES:
            raise _EndlessError(f"more than {MAX_BYTES} bytes came")
        # Errors of the network are errors of the system, too: only here it is known which it is.
        with writing(self._path):
            count = self._file.write(data)
            self._file.flush()
        return count

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


class _EndlessError(Exception):
    """More came than any file of the data set holds."""


def _download(url: str, file: Path) -> None:
    part = file.with_name(f"{file.name}.part")
    try:
        _load(url, part)
    except FileError:
        raise
    except Exception as error:  # whatever the network raises
        kept = f"what came is kept in {part.parent}, run the same again to go on, or put the files there by hand"
        if "416" in str(error) or isinstance(error, _EndlessError):  # a shorter file than what came, or an endless one
            part.unlink(missing_ok=True)
            kept = "run the same again, or put the files there by hand"
        said = f"{type(error).__name__}: {reason(error)}"
        raise DataError(f"fetch: {url} could not be read ({said}); {kept}") from error
    try:
        _check(part)
    except DataError as error:
        part.unlink()
        raise DataError(
            f"fetch: what {url} gave is not JSON as it is read here ({error}); run the same again, or see whether the "
            "address has moved"
        ) from error
    with writing(file):
        part.replace(file)


def _load(url: str, part: Path) -> None:
    from huggingface_hub.file_download import http_get

    with writing(part):
        opened = part.open("ab")
    with opened:
        http_get(url, _Bounded(opened, part), resume_size=opened.tell(), displayed_filename=part.stem)  # type: ignore[arg-type]


def _check(part: Path) -> None:
    found = read_json(part, DataError)
    rows = found.get("golds") if isinstance(found, dict) else found
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError("it is no list of records")
