"""What a manifest says about a model."""

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dps_lens.errors import ModelCheckError
from dps_lens.model.protocol import HookedModel

_SAMPLED = 16


def describe_model(model: HookedModel) -> dict[str, Any]:
    """Name, size, dtype, library versions, and a digest of values sampled from every weight.

    Raises:
        ModelCheckError: the model was loaded without weights, and nobody who has them has described it.
    """
    known = vars(model).get("_dps_lens_description")
    if known is not None:
        return dict(known)
    check_weights(model)
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.device.type != "meta":
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED]
            digest.update(f"{name}{sample.double().cpu().tolist()}".encode())
    first = next(model.parameters())
    return {
        "name": Path(str(model.cfg.model_name)).name,
        "n_layers": model.cfg.n_layers,
        "n_heads": model.cfg.n_heads,
        "dtype": str(first.dtype).removeprefix("torch."),
        "device": first.device.type,
        "weights": digest.hexdigest()[:16],
        "libraries": {name: version(name) for name in ("torch", "transformers", "transformer-lens")},
    }


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
