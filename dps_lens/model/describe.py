"""What a manifest says about a model."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dps_lens.errors import ModelCheckError
from dps_lens.model.protocol import HookedModel, hf_model_of, is_bridge
from dps_lens.model.weights import weights_digest
from dps_lens.version import __version__

_LIBRARIES = ("torch", "transformers", "tokenizers", "transformer-lens")
_NO_PART = {
    "_from_model_config",
    "_name_or_path",
    "architectures",
    "checkpoint_index",
    "checkpoint_label_type",
    "checkpoint_value",
    "device",
    "dtype",
    "id2label",
    "init_mode",
    "init_weights",
    "initializer_range",
    "label2id",
    "model_name",
    "n_devices",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "seed",
    "tokenizer_name",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Of a config: where it came from, what weights say themselves, and what every pass is given anew."""


def describe_model(model: HookedModel) -> dict[str, Any]:
    """Name, size, number format, config and library versions, and a digest of every weight.

    Results of equal descriptions are equal up to rounding: threads, batches and fast paths are not in it.

    Raises:
        ModelCheckError: the model was loaded without weights, and nobody who has them has described it.
    """
    known = vars(model).get("_dps_lens_description")
    if known is not None:
        return dict(known)
    check_weights(model)
    first = next(model.parameters())
    return {
        "name": Path(str(model.cfg.model_name)).name,
        "n_layers": model.cfg.n_layers,
        "n_heads": model.cfg.n_heads,
        "dtype": str(first.dtype).removeprefix("torch."),
        "device": first.device.type,
        "matmul": torch.get_float32_matmul_precision(),
        "weights": weights_digest(model),
        **_configs(model),
        "libraries": {"dps_lens": __version__} | {name: version(name) for name in _LIBRARIES},
    }


def _configs(model: HookedModel) -> dict[str, Any]:
    """What decides a pass beside the weights, and what text ends at."""
    if not is_bridge(model):
        return {"config": _plain(model.cfg.to_dict())}
    hf_model = hf_model_of(model)
    generation = getattr(hf_model, "generation_config", None)
    found = {"config": _plain(hf_model.config.to_dict())}
    return found | ({"generation": _plain(generation.to_diff_dict())} if generation is not None else {})


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    known = {name: value for name, value in config.items() if name not in _NO_PART and value is not None}
    return dict(json.loads(json.dumps(known, sort_keys=True, default=str)))


def has_hooks(model: HookedModel) -> bool:
    """Whether something acts on the model that its description does not tell, as inside `ablate`."""
    return any(point.fwd_hooks for point in model.hook_dict.values())


def has_weights(model: HookedModel) -> bool:
    """Whether it was loaded with any; `device="meta"` reads none."""
    return not vars(model).get("_dps_lens_empty", False)


def check_weights(model: HookedModel) -> None:
    """Refuse a model without weights.

    Raises:
        ModelCheckError: it has none.
    """
    if not has_weights(model):
        raise ModelCheckError(
            "the model was loaded with device='meta' and has no weights; give engine=RayEngine(…), or another device"
        )


def described_as(model: HookedModel, description: dict[str, Any]) -> None:
    """Let a model without weights be described as the same model is where it has them."""
    object.__setattr__(model, "_dps_lens_description", description)
