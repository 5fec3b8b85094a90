"""Files that are either whole or absent."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dps_lens.errors import ScoreError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes `path`'s place at once."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes it private; results are ordinary files
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the whole new one."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object, *, sort_keys: bool = True) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, sort_keys=sort_keys) + "\n")


def write_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, whole or not at all."""
    # Copies: tensors that share memory, as a score and its only component do, would be refused.
    contiguous = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(contiguous, temporary, dict(metadata or {}))


def tensor_digest(values: torch.Tensor) -> str:
    """Of the numbers, whatever their dtype."""
    return hashlib.sha256(values.detach().float().cpu().numpy().tobytes()).hexdigest()[:16]


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file; a torn or foreign file raises `ScoreError`."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ScoreError(f"{path} is not a whole safetensors file ({error}); delete it and run again") from error
