"""Digests by which equal things are known, the same in every process and on every device."""

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import xxhash

_PIECE = 2**28


def tensor_digest(values: torch.Tensor) -> str:
    """Of one tensor, as `tensors_digest`."""
    return tensors_digest({"": values})


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names, dtypes, shapes and every byte; the same on every device and in every order."""
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        values = tensors[name].detach()
        digest.update(json.dumps([name, str(values.dtype), list(values.shape)]).encode())
        # As bytes, for numpy knows neither bfloat16 nor float8; in pieces, for a copy of a large matrix is large.
        flat = values.contiguous().as_strided((values.numel(),), (1,))
        for piece in flat.view(torch.uint8).split(_PIECE):
            digest.update(memoryview(piece.cpu().numpy()))
    return digest.hexdigest()


def json_digest(value: object) -> str:
    """Of a value that JSON knows; the order of keys does not matter."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as opened:
        for block in iter(partial(opened.read, 2**20), b""):
            digest.update(block)
    return digest.hexdigest()
