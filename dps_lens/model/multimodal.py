"""The language model in a multimodal one, as a model of its own."""

from typing import Any

import torch

from dps_lens.errors import ModelLoadError
from dps_lens.model.architectures import causal_class, name_of
from dps_lens.model.same import deviation, logits_of


def text_part(whole: Any) -> Any:
    """A causal language model made of those modules of a multimodal model that text alone passes through.

    Args:
        whole: a model of transformers that also reads pictures or sound; the parts that do are left out.

    Raises:
        ModelLoadError: transformers has no such language model, its modules are elsewhere in the whole, or it computes
            something else than the whole.
    """
    name, config = name_of(whole.config), whole.config.get_text_config(decoder=True)
    kind = causal_class(config)
    if kind is None:
        raise ModelLoadError(f"load_model: {name}: transformers has no causal language model for its text part")
    if len({*getattr(whole, "hf_device_map", {}).values()}) > 1:
        raise ModelLoadError(f"load_model: the text part of {name} cannot be spread over devices; give device=")
    with torch.device("meta"):
        text = kind(config)
    inner = [module for module in whole.modules() if type(module) is type(text.base_model)]
    if len(inner) != 1:
        raise ModelLoadError(f"load_model: {name} has {len(inner)} {type(text.base_model).__name__}, not one")
    _fill(text, inner[0], whole)
    if whole.device.type != "meta":
        _check_same(text, whole, name)
    return text


def _fill(text: Any, inner: Any, whole: Any) -> None:
    setattr(text, text.base_model_prefix, inner)
    text.set_output_embeddings(whole.get_output_embeddings())
    text.config, text.generation_config = inner.config, whole.generation_config
    text.config.architectures = [type(text).__name__]
    text.name_or_path = text.config.name_or_path = whole.name_or_path
    text.eval()


def _check_same(text: Any, whole: Any, name: str) -> None:
    empty = [module for module, weight in text.named_parameters() if weight.device.type == "meta"]
    if empty:
        raise ModelLoadError(f"load_model: {name} holds no {', '.join(empty[:4])}, which its text part needs")
    if error := deviation(logits_of(text), logits_of(whole)):
        raise ModelLoadError(
            f"load_model: the text part of {name} gives other logits than the whole, by {error:.2g} of the largest"
        )
