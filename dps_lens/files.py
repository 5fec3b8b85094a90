"""Files that are either whole or absent."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from dps_lens.errors import ScoreError

_PIECE = 2**28
_ABOUT = "dps_lens"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes `path`'s place at once."""
    with _beside(Path(path)) as temporary:
        yield temporary
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


def _make_ordinary(path: Path) -> None:
    """Give a file of mkstemp, which is private, the permissions of any other."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the whole new one."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object, *, sort_keys: bool = True) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, _as_json(value, sort_keys=sort_keys))


def _as_json(value: object, *, sort_keys: bool) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, sort_keys=sort_keys) + "\n"


def create_json(path: str | Path, value: object) -> bool:
    """Write `value` as JSON where there is no file yet; of all who try at once, one does.

    Returns:
        whether this one did.
    """
    path, text = Path(path), _as_json(value, sort_keys=True)
    if path.exists():
        return False
    with _beside(path) as temporary:
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


def write_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, whole or not at all."""
    # Copies: tensors that share memory, as a score and its only component do, would be refused.
    contiguous = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(contiguous, temporary, dict(metadata or {}))


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names, shapes, dtypes and every byte; the same on every device and in every order."""
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        values = tensors[name].detach()
        digest.update(f"{name}|{values.dtype}|{tuple(values.shape)}|".encode())
        # As bytes, for numpy knows neither bfloat16 nor float8; in pieces, for a copy of a large matrix is large.
        flat = values.contiguous().as_strided((values.numel(),), (1,))
        for piece in flat.view(torch.uint8).split(_PIECE):
            digest.update(memoryview(piece.cpu().numpy()))
    return digest.hexdigest()


def tensor_digest(values: torch.Tensor) -> str:
    """Of one tensor, as `tensors_digest`."""
    return tensors_digest({"": values})


def json_digest(value: object) -> str:
    """Of a value that JSON knows; the order of keys does not matter."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def write_unit(path: str | Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, str]) -> None:
    """Write tensors with a note of what they are; `read_unit` gives both back."""
    # One entry: safetensors writes several in any order, and equal units are equal files.
    write_tensors(path, tensors, {_ABOUT: json.dumps(dict(about), sort_keys=True)})


def read_unit(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a safetensors file with the note in it, which is empty where `write_unit` did not write it.

    Raises:
        ScoreError: the file is torn, or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(_ABOUT, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ScoreError(f"{path} is not a whole safetensors file ({error}); delete it and run again") from error
    return tensors, about if isinstance(about, dict) else {}


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file; a torn or foreign file raises `ScoreError`."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ScoreError(f"{path} is not a whole safetensors file ({error}); delete it and run again") from error
