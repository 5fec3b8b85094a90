"""The attention kernels of Hugging Face, in the place of the attention that TransformerLens recomputes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from dps_lens.model.protocol import HookedModel, hf_model_of, is_bridge


def runs_native(model: HookedModel) -> bool:
    """True inside `native_attention`, where attention scores and patterns do not fire."""
    return is_bridge(model) and "forward" in vars(model.blocks[0].attn)


@contextmanager
def native_kernels(model: HookedModel) -> Iterator[None]:
    """Run the model's own attention inside, with `hook_z` still live; see `native_attention`.

    Right because the wrapped module computes what the bridge recomputes, and its own `forward` calls the bridged
    output projection, which is where `hook_z` hangs.
    """
    if not is_bridge(model) or runs_native(model):
        yield
        return
    with ExitStack() as undo:
        for block in model.blocks:
            attn = block.attn
            inner = attn.original_component
            # Most wrapped modules already call the bridged projection, which fires hook_z;
            # a fused GPT-2 projection is still the raw one.
            for name, child in list(inner.named_children()):
                if child is attn.o.original_component:
                    setattr(inner, name, attn.o)
                    undo.callback(setattr, inner, name, child)
            # The bridge forwards plain attribute assignment to the wrapped module.
            object.__setattr__(attn, "forward", partial(_call, inner))
            undo.callback(object.__delattr__, attn, "forward")
        for config in attention_configs(model):
            if getattr(config, "attn_logit_softcapping", None) is None:
                undo.callback(setattr, config, "_attn_implementation", config._attn_implementation)
                config._attn_implementation = "sdpa"
        yield


def _call(module: Any, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


def attention_configs(model: HookedModel) -> list[Any]:
    """The distinct config objects that the attention modules and the mask builder read."""
    hf_model = hf_model_of(model)
    if not getattr(hf_model, "_supports_sdpa", False):
        return []
    found = [hf_model.config, *(getattr(b.attn.original_component, "config", None) for b in model.blocks)]
    return list({id(config): config for config in found if hasattr(config, "_attn_implementation")}.values())
