"""Download LaMP."""

import hashlib
import json
from functools import partial
from pathlib import Path

from platformdirs import user_cache_path

from dps_lens.errors import DataError
from dps_lens.files import write_json

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
        DataError: the name is unknown, the network or server fails (what came is kept), or a file is no JSON list.
    """
    number = name.lower().removeprefix("lamp-")
    if number not in tuple("1234567") or split not in ("dev", "train"):
        raise DataError(f"fetch: {name!r}, {split!r} are not a task and split; use lamp-1 to lamp-7, 'dev' or 'train'")
    folder = Path(to) if to is not None else folder_of(f"lamp-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    sums = _known(folder)
    for part in _PARTS:
        file = folder / f"{split}_{part}.json"
        if not (file.is_file() and sums.get(file.name) == _digest(file)):
            place = "LaMP_2/new" if number == "2" else f"LaMP_{number}"
            _download(f"{mirror.rstrip('/')}/{place}/{split}/{file.name}", file)
            sums[file.name] = _digest(file)
            write_json(folder / _SUMS, sums)
    return folder / f"{split}_questions.json"


def _known(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / _SUMS).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        for block in iter(partial(opened.read, 2**20), b""):
            digest.update(block)
    return digest.hexdigest()


def _download(url: str, file: Path) -> None:
    from huggingface_hub.file_download import http_get

    part = file.with_name(f"{file.name}.part")
    try:
        with part.open("ab") as opened:
            http_get(url, opened, resume_size=opened.tell(), displayed_filename=file.name)
    except Exception as error:  # whatever the network raises
        if "416" in str(error):
            part.unlink()  # the server has a shorter file than what came
        raise DataError(
            f"fetch: {url} could not be read ({type(error).__name__}: {str(error).splitlines()[0]}); what came is kept "
            f"in {part.parent}, run the same again to go on, or put the files there by hand"
        ) from error
    try:
        whole = isinstance(json.loads(part.read_bytes()), (list, dict))
    except (json.JSONDecodeError, UnicodeDecodeError):
        whole = False
    if not whole:
        part.unlink()
        raise DataError(f"fetch: what {url} gave is not JSON; run the same again, or see whether the address has moved")
    part.replace(file)
