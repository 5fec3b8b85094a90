"""Which attention runs: the native kernels of Hugging Face, or the hooked one of TransformerLens.

A `TransformerBridge` recomputes attention step by step so that `hook_attn_scores` and
`hook_pattern` can fire. That costs O(pos²) memory and, at 2,048 tokens, about 2.7 times the time of
the native kernels. Whatever needs only `hook_z` runs inside `native_attention`.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from dps_lens.model.fast.switch import is_fast
from dps_lens.model.kernels import native_kernels
from dps_lens.model.protocol import HookedModel


@contextmanager
def native_attention(model: HookedModel) -> Iterator[None]:
    """Run the model's own attention kernel (sdpa), with `hook_z` still live.

    Inside, `hook_attn_scores`, `hook_pattern`, `attn.hook_in` and `attn.hook_out` do not fire. Models
    that cap attention logits keep the eager kernel, because sdpa would drop the cap. A
    `HookedTransformer` has no native kernel and runs as it is, as does every model while the fast paths are off.
    """
    with native_kernels(model) if is_fast() else nullcontext():
        yield
