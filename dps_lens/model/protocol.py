"""What dps_lens asks of a hooked model."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from typing import Protocol

    from torch import Tensor, nn

    class ModelConfig(Protocol):
        """The part of a TransformerLens config that is read."""

        model_name: str
        n_layers: int
        n_heads: int
        n_key_value_heads: int | None
        n_ctx: int
        d_model: int
        d_head: int
        d_vocab: int

    class HookedModel(Protocol):
        """A `TransformerBridge` (transformer-lens 4) or a `HookedTransformer` (transformer-lens 3.9)."""

        cfg: Any  # a ModelConfig; the libraries' own classes declare their fields otherwise
        tokenizer: Any
        blocks: Any
        ln_final: Any
        W_E: Any
        W_U: Any

        @property
        def hook_dict(self) -> dict[str, Any]: ...
        def hooks(self, fwd_hooks: list[Any] = ...) -> Any: ...
        def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any: ...
        def parameters(self) -> Iterator[nn.Parameter]: ...
        def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
        def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...
        def modules(self) -> Iterator[nn.Module]: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...

else:
    # Run-time type checks in the tests would walk the hook points of a model at every call.
    ModelConfig: TypeAlias = Any
    HookedModel: TypeAlias = Any


def is_bridge(model: HookedModel) -> bool:
    """True for a `TransformerBridge`, False for a `HookedTransformer`."""
    return hasattr(model, "original_model")


def hf_model_of(model: HookedModel) -> Any:
    """The Hugging Face model that a `TransformerBridge` works on."""
    return model.original_model  # type: ignore[attr-defined]
