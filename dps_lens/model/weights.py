"""A digest of everything that a model computes with."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from dps_lens.digests import tensor_digest
from dps_lens.errors import ModelCheckError
from dps_lens.model.protocol import HookedModel

_RECOMPUTED = ("dynamic", "longrope")


def weights_digest(model: HookedModel) -> str:
    """Of every byte of all parameters and buffers, with names, shapes and dtypes; the same on every device.

    Read anew at each call, for nothing tells of an edit in place. Weights that are offloaded to memory or a disk are
    read from there.

    Raises:
        ModelCheckError: a weight is on the meta device, and nothing says where its values are.
    """
    digest, elsewhere = xxhash.xxh3_128(), _offloaded(model)
    for name, values in sorted(_named(model), key=lambda one: one[0]):
        if values.device.type == "meta" and id(values) not in elsewhere:
            raise ModelCheckError(f"weight {name} has no values here; load the model with weights")
        here = elsewhere[id(values)]() if values.device.type == "meta" else values
        digest.update(f"{name}|{tensor_digest(here)}|".encode())
    return digest.hexdigest()


def _named(model: HookedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, but for frequencies that every pass computes anew."""
    passing = {
        id(buffer)
        for module in model.modules()
        if any(kind in str(getattr(module, "rope_type", "")) for kind in _RECOMPUTED)
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and "original" not in name
    }
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if id(buffer) not in passing)


def _offloaded(model: HookedModel) -> dict[int, Callable[[], Tensor]]:
    """What reads the values of tensors that accelerate keeps elsewhere, by the tensor's id."""
    found: dict[int, Callable[[], Tensor]] = {}
    for module in model.modules():
        for values in _maps(module):
            own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
            for name, tensor in own.items():
                if tensor.device.type == "meta":
                    found[id(tensor)] = partial(_value, values, name)
    return found


def _value(values: Any, name: str) -> Tensor:
    return torch.as_tensor(values[name])


def _maps(module: nn.Module) -> Iterator[Any]:
    """Where the hooks of accelerate read a module's weights, if it has any."""
    hook = vars(module).get("_hf_hook")
    for one in (hook, *getattr(hook, "hooks", ())):
        if getattr(one, "weights_map", None) is not None:
            yield one.weights_map
