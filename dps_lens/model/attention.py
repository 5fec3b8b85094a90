"""Which attention runs: the native kernels of Hugging Face, or the hooked one of TransformerLens.

A `TransformerBridge` recomputes attention step by step so that `hook_attn_scores` and
`hook_pattern` can fire. That costs O(pos²) memory and, at 2,048 tokens, about 2.7 times the time of
the native kernels. Whatever needs only `hook_z` runs inside `native_attention`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from dps_lens.model.fast.switch import is_fast
from dps_lens.model.protocol import HookedModel, hf_model_of, is_bridge
from dps_lens.model.use import in_use


def runs_native(model: HookedModel) -> bool:
    """True inside `native_attention`, where attention scores and patterns do not fire."""
    return is_bridge(model) and "forward" in vars(model.blocks[0].attn)


@contextmanager
def native_attention(model: HookedModel) -> Iterator[None]:
    """Run the model's own attention kernel (sdpa), with `hook_z` still live.

    Inside, `hook_attn_scores`, `hook_pattern`, `attn.hook_in` and `attn.hook_out` do not fire. Models
    that cap attention logits keep the eager kernel, because sdpa would drop the cap. A
    `HookedTransformer` has no native kernel and runs as it is, as does every model while the fast paths are off.

    Right because the wrapped module computes what the bridge recomputes, and its own `forward` calls the bridged
    output projection, which is where `hook_z` hangs.

    Raises:
        ModelBusyError: another thread is using the model.
    """
    with ExitStack() as undo:
        undo.enter_context(in_use(model))
        if not is_bridge(model) or runs_native(model) or not is_fast():
            yield
            return
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
