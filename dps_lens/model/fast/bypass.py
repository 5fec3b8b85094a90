"""Decoding steps with as little as possible around the matrix products.

A `TransformerBridge` puts a component with hook points around every module of the Hugging Face model;
in a decoding step of a small model they cost a third of the time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dps_lens.model.fast.switch import is_fast
from dps_lens.model.protocol import HookedModel, hf_model_of, is_bridge

_FEW_ROWS = range(2, 5)
_CAPTURING = ("use_hook_mlp_in", "use_attn_in", "use_split_qkv_input")


class BypassedHooks:
    """A context in which components without hooks stand aside, so that the plain modules inside them run.

    What has a hook when this is made fires; hooks that are added later may not, which `is_current` tells. In
    float32 on a CPU, products with 2 to 4 rows take the form that is fast there. Inside, run the Hugging Face model,
    not the bridge around it; outside, the model is as it was. The context can be entered again and again. A
    `HookedTransformer`, or a bridge in compatibility mode, runs as it is.

    Right because a component without hooks only calls the module inside it; which have hooks is asked once, here.
    """

    def __init__(self, model: HookedModel, *, linears: bool = True) -> None:
        self._few = linears
        self._places: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
        self._linears: list[nn.Linear] = []
        self._silent: list[nn.Module] = []
        if not is_bridge(model) or getattr(model, "compatibility_mode", False) or not is_fast():
            return
        # Blocks hang these on their norms at the first pass, for hook points that are off unless asked for.
        handles = [handle for block in model.blocks for handle in getattr(block, "_capture_hook_handles", ())]
        used = any(getattr(model.cfg, name, False) for name in _CAPTURING)
        self._ignored = set() if used else {handle.id for handle in handles}
        self._walk(hf_model_of(model))

    def is_current(self) -> bool:
        """Whether there are still no hooks on what stands aside."""
        return not any(map(self._is_hooked, self._silent))

    def _walk(self, parent: nn.Module) -> None:
        for name, child in parent._modules.items():
            if child is None:
                continue
            plain: Any = child
            while _is_component(plain):
                # What hangs on a component, or on parts of it that are not in the Hugging Face model.
                inside = {*plain.original_component.modules()}
                own = [module for module in plain.modules() if module not in inside]
                if any(map(self._is_hooked, own)):
                    break
                self._silent += own
                plain = plain.original_component
            if plain is not child:
                self._places.append((parent, name, child, plain))
            if self._few and type(plain) is nn.Linear and _is_plain(plain):
                self._linears.append(plain)
            self._walk(plain.original_component if _is_component(plain) else plain)

    def _is_hooked(self, module: nn.Module) -> bool:
        hooks, before = module._forward_hooks, module._forward_pre_hooks
        return bool(hooks or before) and bool({*hooks, *before} - self._ignored)

    def __enter__(self) -> None:
        for parent, name, _, plain in self._places:
            parent._modules[name] = plain
        for linear in self._linears:
            linear.forward = partial(_linear, linear)  # type: ignore[method-assign]

    def __exit__(self, *error: object) -> None:
        for linear in self._linears:
            vars(linear).pop("forward", None)
        for parent, name, component, _ in self._places:
            parent._modules[name] = component


@contextmanager
def reused_logits(model: HookedModel) -> Iterator[None]:
    """Write the logits of every pass over those of the pass before, in inference mode on a CPU.

    Over a large vocabulary, fresh memory costs 15% of the product, and so does the bias of zeros that a bridge
    gives an unembedding without one. Right as long as nobody keeps logits of one pass beyond the next: losses are taken
    at once.
    """
    unembed = _unembed(model)
    if not is_fast() or unembed is None or unembed.weight.device.type != "cpu" or "forward" in vars(unembed):
        yield
        return
    unembed.forward = _Overwriting(unembed)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        vars(unembed).pop("forward")


def _unembed(model: HookedModel) -> nn.Linear | None:
    if not is_bridge(model):
        return None
    found = hf_model_of(model).get_output_embeddings()
    found = found.original_component if found is not None and _is_component(found) else found
    return found if type(found) is nn.Linear else None


class _Overwriting:
    """A linear layer whose outputs share one piece of memory."""

    def __init__(self, linear: nn.Linear) -> None:
        self.weight = linear.weight
        self.bias = linear.bias if linear.bias is not None and linear.bias.any() else None
        self.memory = linear.weight.new_empty(0, linear.out_features)

    def __call__(self, inputs: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        if not torch.is_inference_mode_enabled():
            return nn.functional.linear(inputs, self.weight, self.bias)
        flat = inputs.flatten(0, -2)
        if len(flat) > len(self.memory):
            self.memory = flat.new_empty(len(flat), len(self.weight))
        product = self.memory[: len(flat)]
        if self.bias is None:
            torch.mm(flat, self.weight.T, out=product)
        else:
            torch.addmm(self.bias, flat, self.weight.T, out=product)
        return product.unflatten(0, inputs.shape[:-1])


def _is_component(module: nn.Module) -> bool:
    return "_original_component" in module._modules


def _is_plain(linear: nn.Linear) -> bool:
    weight = linear.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and "forward" not in vars(linear)


def _linear(linear: nn.Linear, inputs: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
    """`W xᵀ` for few rows: up to 2.5 times as fast as `x Wᵀ`, for which CPU libraries are slow at this size. Three rows
    are run as four, which are faster still."""
    rows = inputs.shape[:-1].numel()
    if rows not in _FEW_ROWS:
        return nn.functional.linear(inputs, linear.weight, linear.bias)
    flat = inputs.reshape(rows, -1)
    even = nn.functional.pad(flat, (0, 0, 0, rows % 2))
    # Contiguous on both sides: with the strides of a transposed input the product is slow again.
    product = (linear.weight @ even.contiguous().T)[:, :rows].T.contiguous()
    if linear.bias is not None:
        product += linear.bias
    return product.reshape(*inputs.shape[:-1], -1)
