"""Read a checkpoint's config, tokenizer and weights with transformers; weights that are not all there are refused."""

import re
from dataclasses import dataclass
from typing import Any

import torch

from dps_lens.errors import ModelLoadError, reason
from dps_lens.model.adapted import Adapter, find_adapter, merged
from dps_lens.model.architectures import check_config, has_bridge, is_multimodal, name_of
from dps_lens.model.options import Options

# Causal masks and rotary frequencies that older versions of transformers wrote beside the weights.
_FORMER_BUFFERS = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$|(^|\.)position_ids$")
_NAMED = 4


@dataclass(frozen=True)
class Checkpoint:
    """What was read.

    Args:
        model: of transformers.
        tokenizer: as its files define it.
        source: the folder or Hub id of the (base) model.
        name: of the model in manifests: the source, and the adapter that was merged into it.
    """

    model: Any
    tokenizer: Any
    source: str
    name: str


def read_checkpoint(source: str, *, device: str, dtype: torch.dtype, options: Options) -> Checkpoint:
    """Read a model and its tokenizer; an adapter is merged into its base model.

    Raises:
        ModelLoadError: the architecture cannot be used, weights are missing, or an adapter cannot be merged.
        OSError, ValueError, …: what transformers raises of files that it cannot read.
    """
    adapter = find_adapter(source, options)
    if adapter is not None:
        return _read_adapted(adapter, device=device, dtype=dtype, options=options)
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(source, **options.hub)
    options.set_fields(config)
    check_config(config)
    tokenizer = AutoTokenizer.from_pretrained(source, **options.hub)
    if device == "meta":
        model = _empty_model(source, config, dtype, options)
    else:
        model = _read_weights(source, config, dtype, options)
    return Checkpoint(model, tokenizer, source, source)


def _read_adapted(adapter: Adapter, *, device: str, dtype: torch.dtype, options: Options) -> Checkpoint:
    from transformers import AutoTokenizer

    try:
        base = read_checkpoint(adapter.base, device=device, dtype=dtype, options=options.of_base(adapter.base_revision))
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"load_model: the adapter {adapter.source!r} changes the model {adapter.base!r}, which cannot be loaded: "
            f"{reason(error)}"
        ) from error
    own = adapter.has_tokenizer(options)
    tokenizer = AutoTokenizer.from_pretrained(adapter.source, **options.hub) if own else base.tokenizer
    model = base.model if device == "meta" else merged(base.model, adapter, options)
    # Whatever names the model that these weights are of (an exported adapter does) has to name the adapter.
    model.name_or_path = adapter.source
    return Checkpoint(model, tokenizer, base.source, adapter.label(base.name))


def _empty_model(source: str, config: Any, dtype: torch.dtype, options: Options) -> Any:
    from transformers import AutoModelForCausalLM

    config.name_or_path = source
    if is_multimodal(config):
        config = config.get_text_config(decoder=True)
        config.name_or_path = source
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=options.trusts)


def _read_weights(source: str, config: Any, dtype: torch.dtype, options: Options) -> Any:
    where = _placement(options.placement)
    # Other shapes are told of like other weights that do not fit; transformers alone would not name them.
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    read = {"config": config, **options.hub}
    if options.trusts and has_bridge() and not is_multimodal(config):
        _mend_code(source, config, dtype, read)
    model, found = _class_of(config).from_pretrained(source, **read, dtype=dtype, **told, **where, **options.weights)
    check_complete(source, found)
    return model


def _mend_code(source: str, config: Any, dtype: torch.dtype, read: dict[str, Any]) -> None:
    """Let transformer-lens mend code that a checkpoint brings and that was written for an older transformers.

    Some of it would otherwise draw new weights over those that were read.
    """
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
    from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config

    bridged = build_bridge_config_from_hf(config, determine_architecture_from_hf_config(config), source, dtype)
    ArchitectureAdapterFactory.select_architecture_adapter(bridged).prepare_loading(source, read)


def _class_of(config: Any) -> Any:
    """A multimodal checkpoint is read whole, by the class that it names, so that every weight finds its place."""
    import transformers

    whole = getattr(transformers, name_of(config), None)
    return whole if is_multimodal(config) and whole is not None else transformers.AutoModelForCausalLM


def _placement(placement: dict[str, Any]) -> dict[str, Any]:
    if placement and not has_bridge():
        raise ModelLoadError(f"load_model: {', '.join(placement)} need transformer-lens>=4")
    if "n_devices" not in placement:
        return placement
    from transformer_lens.utilities.multi_gpu import resolve_device_map

    rest = {name: value for name, value in placement.items() if name not in ("n_devices", "max_memory")}
    spread, memory = resolve_device_map(placement["n_devices"], None, None, placement.get("max_memory"))
    return rest | {"device_map": spread, "max_memory": memory}


def check_complete(source: str, found: dict[str, Any]) -> None:
    """Refuse weights that transformers had to make up, or did not know what to do with.

    Args:
        source: that was read.
        found: what `from_pretrained(…, output_loading_info=True)` says.

    Raises:
        ModelLoadError: names the first of them.
    """
    unexpected = [name for name in found["unexpected_keys"] if not _FORMER_BUFFERS.search(name)]
    shapes = [f"{name} {tuple(held)} instead of {tuple(needed)}" for name, held, needed in found["mismatched_keys"]]
    wrong = {
        "does not hold": list(found["missing_keys"]),
        "holds what its config has no place for:": unexpected,
        "holds other shapes:": shapes,
        "could not be read:": [reason(ValueError(message)) for message in found.get("error_msgs", [])],
    }
    said = [f"{what} {_first(names)}" for what, names in wrong.items() if names]
    if said:
        raise ModelLoadError(
            f"load_model: the weights of {source!r} do not fit its config: it {', and '.join(said)}; get the whole "
            "checkpoint, or the config that belongs to it"
        )


def _first(names: list[str]) -> str:
    ordered = sorted(names, key=_in_order)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(ordered[:_NAMED]) + more


def _in_order(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
