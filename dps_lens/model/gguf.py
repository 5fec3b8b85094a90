"""GGUF files, converted once to safetensors."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import xxhash
from platformdirs import user_cache_path

from dps_lens.errors import DPSLensError, ModelLoadError, reason
from dps_lens.model.checkpoint import check_complete

_PIECE = 2**24


def converted(gguf: Path, dtype: torch.dtype) -> Path:
    """The safetensors form of a GGUF file in the user's cache, made when it is not there yet.

    Raises:
        ModelLoadError: there is no such file, it cannot be read, or weights are missing in it.
    """
    if not gguf.is_file():
        raise ModelLoadError(f"load_model: there is no file {gguf}")
    folder = user_cache_path("dps_lens") / "models" / _content_key(gguf, dtype) / gguf.stem
    if not folder.is_dir():
        try:
            _convert(gguf, dtype, folder)
        except DPSLensError:
            raise
        except Exception as error:
            raise ModelLoadError(f"load_model: {gguf} cannot be read as GGUF: {reason(error)}") from error
    return folder


def _content_key(gguf: Path, dtype: torch.dtype) -> str:
    """A digest of every byte of a file, and the dtype it is converted to."""
    digest = xxhash.xxh3_64(str(dtype).encode())
    with gguf.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()[:12]


def _convert(gguf: Path, dtype: torch.dtype, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read: Any = AutoModelForCausalLM.from_pretrained
    model, found = read(
        gguf.parent, gguf_file=gguf.name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    check_complete(str(gguf), found)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # What is saved is plain weights; the marks of the quantised origin would stop a plain load.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    setattr(model, "hf_quantizer", None)  # noqa: B010
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else somebody else was quicker
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
