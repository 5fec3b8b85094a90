"""What a manifest says about a model."""

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dps_lens.model.attention import HookedModel

_SAMPLED = 16


def describe_model(model: HookedModel) -> dict[str, Any]:
    """Name, size, dtype, library versions, and a digest of values sampled from every weight."""
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
