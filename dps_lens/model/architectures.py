"""Which architectures can be loaded: decoders with attention heads in every layer that transformer-lens can wrap."""

from importlib.metadata import version
from typing import Any

from dps_lens.errors import ModelLoadError, reason
from dps_lens.model.protocol import HookedModel, is_bridge


def tl_version() -> str:
    """Version of transformer-lens."""
    return version("transformer-lens")


def has_bridge() -> bool:
    """Whether the transformer-lens that is installed wraps Hugging Face models."""
    return int(tl_version().split(".")[0]) >= 4


def name_of(config: Any) -> str:
    """The architecture that a config declares, else the config's own name."""
    return (getattr(config, "architectures", None) or [type(config).__name__])[0]


def is_multimodal(config: Any) -> bool:
    """Whether the language model is a part of a larger one."""
    return config.get_text_config(decoder=True) is not config


def causal_class(config: Any) -> Any:
    """The class in transformers of a causal language model with this config; None where it has none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, (list, tuple)) else found


def check_config(config: Any) -> None:
    """Refuse, before any weight is read, what cannot become a hooked decoder.

    Raises:
        ModelLoadError: names the architecture and what it lacks.
    """
    name = name_of(config)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelLoadError(f"load_model: {name} is an encoder-decoder; dps_lens needs a decoder-only language model")
    if name.endswith("ForMaskedLM"):
        raise ModelLoadError(f"load_model: {name} is an encoder; dps_lens needs a decoder-only language model")
    text = config.get_text_config(decoder=True)
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if causal_class(text) is None and not own_code:
        part = f"the {type(text).__name__} of its text part" if text is not config else "it"
        raise ModelLoadError(f"load_model: {name}: transformers has no causal language model for {part}")
    if has_bridge() and text is config:
        check_bridged(config)


def check_bridged(config: Any) -> None:
    """Refuse what transformer-lens does not know.

    Raises:
        ModelLoadError: names the architecture.
    """
    from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config

    try:
        determine_architecture_from_hf_config(config)
    except ValueError as error:
        # Its message lists every architecture there is.
        raise ModelLoadError(
            f"load_model: transformer-lens {tl_version()} has no bridge for {name_of(config)} "
            f"(model type {config.model_type!r}), so its heads cannot be hooked"
        ) from error


def unwrappable(config: Any, error: Exception) -> ModelLoadError:
    """What is said when transformer-lens fails on an architecture that it knows."""
    return ModelLoadError(
        f"load_model: transformer-lens {tl_version()} cannot wrap {name_of(config)} with this config: {reason(error)}"
    )


def check_heads(model: HookedModel, config: Any) -> None:
    """Refuse a hooked model some of whose layers have no output for each head.

    Raises:
        ModelLoadError: names the architecture and the layers.
    """
    layers = range(model.cfg.n_layers)
    without = [layer for layer in layers if f"blocks.{layer}.attn.hook_z" not in model.hook_dict]
    if without:
        raise ModelLoadError(
            f"load_model: {name_of(config)} has no attention heads (hook_z) in {_layers(without)} of {len(layers)}; "
            "dps_lens needs them in every layer"
        )
    if not is_bridge(model):
        return
    expected = model.cfg.n_heads * model.cfg.d_head
    widths = {layer: _inputs(model.blocks[layer].attn.o.original_component) for layer in layers}
    other = [layer for layer, width in widths.items() if width not in (None, expected)]
    if other:
        raise ModelLoadError(
            f"load_model: {name_of(config)} has no output for each head: the output projection of {_layers(other)} "
            f"reads {widths[other[0]]} values, not {model.cfg.n_heads} heads × {model.cfg.d_head}"
        )


def _layers(layers: list[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers[:4]))}{', …' if len(layers) > 4 else ''}"


def _inputs(projection: Any) -> int | None:
    """How many values a projection reads, where it says so; GPT-2's Conv1D and linear layers do."""
    width = getattr(projection, "in_features", None)
    return int(getattr(projection, "nx", 0)) or None if width is None else int(width)
