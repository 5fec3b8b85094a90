"""Give a model of transformers its hooks, and leave its tokenizer and its environment as they were."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dps_lens.errors import ModelLoadError, reason
from dps_lens.model.architectures import (
    check_bridged,
    check_heads,
    has_bridge,
    is_multimodal,
    name_of,
    tl_version,
    unwrappable,
)
from dps_lens.model.multimodal import text_part
from dps_lens.model.protocol import HookedModel, is_bridge


def wrap_model(
    hf_model: Any,
    tokenizer: Any,
    source: str,
    *,
    device: str | None,
    dtype: torch.dtype,
    revision: str | None = None,
    code_revision: str | None = None,
    trust_remote_code: bool = False,
) -> HookedModel:
    """Give a Hugging Face model its hooks, with the TransformerLens that is installed.

    Args:
        hf_model: a causal language model, or a multimodal one that has one in it; hooked in place.
        tokenizer: its tokenizer. It stays as it is, except that padding gets the token of the end (or of the start)
            where it has none, which changes no text's ids. Without a start token, the model's own `to_tokens` and
            `generate` put none before a text.
        source: the Hub id or folder it came from.
        device: where it lies; None where it is spread over several.
        dtype: of its weights.
        revision: of a Hub model.
        code_revision: of the code that it brings.
        trust_remote_code: whether it brings its own code.

    Raises:
        ModelLoadError: the architecture has no bridge, or layers without attention heads.
    """
    if is_multimodal(hf_model.config):
        hf_model = text_part(hf_model)
    config = hf_model.config
    if not has_bridge():
        model = _hooked_transformer(hf_model, _stand_in(tokenizer, source), source, str(device), dtype)
    else:
        check_bridged(config)
        code = {"revision": revision, "code_revision": code_revision, "trust_remote_code": trust_remote_code}
        try:
            model = _bridge(hf_model, _stand_in(tokenizer, source), source, device=device, dtype=dtype, **code)
        except Exception as error:
            raise unwrappable(config, error) from error
    _keep_tokenizer(model, tokenizer)
    check_heads(model, config)
    return model.eval()


def _bridge(hf_model: Any, tokenizer: Any, source: str, **options: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    with _nothing_installed():
        return TransformerBridge.boot_transformers(source, hf_model=hf_model, tokenizer=tokenizer, **options)


@contextmanager
def _nothing_installed() -> Iterator[None]:
    """Keep transformer-lens from running `pip install torchvision`, which may replace torch itself."""
    from transformer_lens.model_bridge.sources.transformers import helpers

    installing = getattr(helpers, "_ensure_torchvision", None)
    if installing is None:
        yield
        return
    helpers._ensure_torchvision = lambda: False
    try:
        yield
    finally:
        helpers._ensure_torchvision = installing


def _hooked_transformer(hf_model: Any, tokenizer: Any, source: str, device: str, dtype: torch.dtype) -> Any:
    from dps_lens.model.hooked import hooked_transformer

    try:
        return hooked_transformer(hf_model, tokenizer, source, device=device, dtype=dtype)
    except Exception as error:
        raise ModelLoadError(
            f"load_model: transformer-lens {tl_version()} cannot convert {source!r} ({name_of(hf_model.config)}): "
            f"{reason(error)}; download it to a folder and load that, or install transformer-lens>=4, which wraps any "
            "Hugging Face model"
        ) from error


def _stand_in(tokenizer: Any, source: str) -> Any:
    """A tokenizer for TransformerLens to work on, which sets special tokens and may read the files again."""
    found = copy.deepcopy(tokenizer)
    if found is not None:
        found.init_kwargs = {"name_or_path": source} | found.init_kwargs | {"add_bos_token": True}
    return found


def _keep_tokenizer(model: Any, tokenizer: Any) -> None:
    """Give a model the tokenizer that belongs to it, and settings of TransformerLens that follow from it."""
    if tokenizer is None:
        return
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
    ids, bos, eos = tokenizer("a")["input_ids"], tokenizer.bos_token_id, tokenizer.eos_token_id
    model.cfg.default_prepend_bos = bos is not None
    model.cfg.tokenizer_prepends_bos = bos is not None and ids[0] == bos
    model.cfg.tokenizer_appends_eos = eos is not None and len(ids) > 1 and ids[-1] == eos
    if not is_bridge(model):
        model.tokenizer = tokenizer
        return
    # The bridge's own setter would set special tokens again.
    object.__setattr__(model, "_tokenizer", tokenizer)
    if hasattr(getattr(model, "driver", None), "tokenizer"):
        model.driver.tokenizer = tokenizer
