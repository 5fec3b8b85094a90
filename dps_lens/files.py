"""Files that are either whole or absent, and readers that name what is wrong with a file."""

import errno
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dps_lens.digests import tensors_digest
from dps_lens.errors import DPSLensError, FileError, ScoreError, reason

_DIGEST, _ABOUT = "digest", "about"
# Asked for once: it can be asked for only by setting it, for all threads.
_UMASK = os.umask(0)
os.umask(_UMASK)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MARKS = {
    b"\x1f\x8b": "is compressed with gzip; unpack it first",
    b"PK\x03\x04": "is a zip archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; unpack it first",
    b"PAR1": "is a Parquet file; write it as JSON lines",
    b"\xff\xfe": "is UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text; save it as UTF-8",
}
_FULL, _DENIED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), (errno.EACCES, errno.EPERM, errno.EROFS)
_TAKEN = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
_FIXES = {
    **dict.fromkeys(_FULL, "make room and run the same again"),
    **dict.fromkeys(_DENIED, "name a place that may be written to"),
    **dict.fromkeys(_TAKEN, "a file stands where a folder is needed, or the reverse; name another place"),
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ELOOP: "a link leads back to itself; remove it",
}


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Say in one sentence why something cannot be written.

    Raises:
        FileError: no room, no permission, or something else stands there.
    """
    try:
        yield
    except DPSLensError:
        raise
    except (OSError, SafetensorError) as error:
        fix = _FIXES.get(getattr(error, "errno", None) or 0, "mend that and run the same again")
        raise FileError(
            f"{path} could not be written ({reason(error)}); what was there before is kept; {fix}"
        ) from error


@contextmanager
def replacing(path: str | Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes `path`'s place at once.

    Args:
        path: the file.
        private: nobody but its owner may read it.

    Raises:
        FileError: it cannot be written; what stood at `path` is still there.
    """
    path = Path(path)
    with writing(path), _beside(path) as temporary:
        yield temporary
        if not private:
            _make_ordinary(temporary)
        os.replace(temporary, path)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which is gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def leftovers(path: str | Path) -> Iterator[Path]:
    """Temporary files of writers of a file that were killed, or are at work."""
    path = Path(path)
    yield from path.parent.glob(f".{escape(path.name)}.*.tmp")


def _make_ordinary(path: Path) -> None:
    """Give a file of mkstemp, which is private, the permissions of any other."""
    path.chmod(0o666 & ~_UMASK)


def write_text(path: str | Path, text: str, *, private: bool = False) -> None:
    """Write `text` so that a reader sees the old file or the whole new one; a private one is for its owner alone."""
    with replacing(path, private=private) as temporary:
        temporary.write_text(text, encoding="utf-8")


def as_json(value: object, *, sort_keys: bool = True) -> str:
    """The text that `write_json` writes."""
    return json.dumps(value, indent=1, ensure_ascii=False, sort_keys=sort_keys) + "\n"


def write_json(path: str | Path, value: object, *, sort_keys: bool = True) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, as_json(value, sort_keys=sort_keys))


def create_json(path: str | Path, value: object) -> bool:
    """Write `value` as JSON where there is no file yet; of all who try at once, one does.

    Returns:
        whether this one did.

    Raises:
        FileError: it cannot be written.
    """
    path, text = Path(path), as_json(value)
    if path.exists():
        return False
    with writing(path), _beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        _make_ordinary(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # this file system has no hard links
            return _create(path, text)
    return True


def _create(path: Path, text: str) -> bool:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def append_line(path: str | Path, line: str) -> None:
    """Add a line to a file, which is made where it is missing.

    Raises:
        FileError: it cannot be written; a line that was cut off has no end.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def write_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, whole or not at all, with a digest that `read_tensors` checks."""
    _save(path, tensors, {**(metadata or {}), _DIGEST: tensors_digest(tensors)})


def _save(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    # Copies: tensors that share memory, as a score and its only component do, would be refused.
    contiguous = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(contiguous, temporary, metadata)


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises:
        ScoreError: the file is torn or foreign, or its numbers are not those that were written.
    """
    return read_unit(path)[0]


def write_unit(path: str | Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, str]) -> None:
    """Write tensors with a note of what they are; `read_unit` gives both back. Equal units are equal files."""
    # One entry, for safetensors writes several in any order.
    noted = {**about, _DIGEST: tensors_digest(tensors)}
    _save(path, tensors, {_ABOUT: json.dumps(noted, sort_keys=True)})


def read_unit(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a safetensors file with the note in it, which is empty where `write_unit` did not write it.

    Raises:
        ScoreError: the file is torn or foreign, or its numbers are not those that were written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = dict(json.loads(metadata.get(_ABOUT, "{}")))
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise ScoreError(
            f"{path} is not a whole safetensors file ({reason(error)}); delete it and run again"
        ) from error
    if metadata.get(_DIGEST, about.get(_DIGEST)) not in (None, tensors_digest(tensors)):
        raise ScoreError(f"{path} is damaged: its numbers are not those that were written; delete it and run again")
    return tensors, about


def read_text(path: str | Path, kind: type[DPSLensError]) -> str:
    """Read UTF-8 text, with or without a byte order mark.

    Args:
        path: the file.
        kind: of the error.

    Raises:
        DPSLensError: of this kind: the file cannot be read, or is something else; names it.
    """
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise kind(f"{path} cannot be read ({reason(error)})") from error
    for mark, found in _MARKS.items():
        if data.startswith(mark):
            raise kind(f"{path} {found}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise kind(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def parse_json(text: str, where: str, kind: type[DPSLensError]) -> Any:
    """A value of JSON that says one thing: every name once, whole characters, numbers and nesting of a usual size.

    Args:
        text: JSON.
        where: it stands, for the error.
        kind: of the error.

    Raises:
        DPSLensError: of this kind: the text is something else; names the place.
    """
    try:
        value = json.loads(text, object_pairs_hook=_one_each)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}" if "\n" in text.strip() else f"character {error.colno}"
        raise kind(f"{where}: not valid JSON at {at} ({error.msg}); is it cut off?") from error
    except RecursionError as error:
        raise kind(f"{where}: JSON that is nested too deeply; write it flat") from error
    except UnicodeEncodeError as error:
        raise kind(f"{where}: a text holds half of a character (\\ud800 to \\udfff alone); remove it") from error
    except ValueError as error:
        raise kind(f"{where}: {reason(error)}") from error
    return value


def _one_each(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice[:60]!r} stands twice in one object; keep one of them")
    return found


def read_json(path: str | Path, kind: type[DPSLensError]) -> Any:
    """Read a JSON file, as `read_text` and `parse_json` do."""
    return parse_json(read_text(path, kind), str(path), kind)


def read_object(path: str | Path, kind: type[DPSLensError]) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        DPSLensError: of this kind: it holds something else.
    """
    found = read_json(path, kind)
    if not isinstance(found, dict):
        raise kind(f"{path}: expected an object, found {type(found).__name__}")
    return found
