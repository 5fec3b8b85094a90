"""The logits that a model of transformers gave itself, for a processor that others may stand before."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import finalize, ref

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dps_lens.errors import SteeringError

_NUMBERS = 2**24
_ROUNDING = 1e-5
_MASKED: ContextVar[bool] = ContextVar("masked", default=False)


@contextmanager
def masked_pass() -> Iterator[None]:
    """Passes inside are not the model's own, for any processor."""
    token = _MASKED.set(True)
    try:
        yield
    finally:
        _MASKED.reset(token)


class Passes:
    """Remembers the logits of the model's last pass; lives as long as its owner does."""

    def __init__(self, hf_model: Any) -> None:
        self._ids: Tensor | None = None
        self._logits: Tensor | None = None
        self._mask: Any = None
        own = ref(self)

        def note(module: object, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            passes = own()
            if passes is not None:
                passes._note(args, kwargs, output)

        handle = hf_model.register_forward_hook(note, with_kwargs=True)
        finalize(self, handle.remove)

    def _note(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ids, logits = kwargs.get("input_ids", args[0] if args else None), getattr(output, "logits", None)
        if _MASKED.get() or ids is None or logits is None:
            return
        rows, positions, d_vocab = logits.shape
        # More than the last position is asked for in assisted decoding alone.
        kept = min(positions, max(1, _NUMBERS // (rows * d_vocab)))
        # A view of few positions would keep the logits of a whole prompt alive.
        self._logits = logits[:, -kept:].detach().clone() if kept < positions else logits.detach()
        self._ids, self._mask = ids[:, -kept:], kwargs.get("attention_mask")

    def forget(self) -> None:
        """Take the next scores at their word, up to the model's next pass."""
        self._ids = self._logits = self._mask = None

    def logits(self, ids: Int[Tensor, "row pos"], scores: Float[Tensor, "row d_vocab"]) -> Float[Tensor, "row d_vocab"]:
        """What the model itself gave after `ids`; `scores` where it was not seen to run on them.

        Raises:
            SteeringError: `scores` are other than that, beyond a constant a row and tokens that were ruled out.
        """
        passed = [logits.to(scores.device).float() for logits in self._after(ids)]
        if not passed:
            return scores.float()
        # A pass over candidates of assisted decoding may hold the last token more than once.
        for logits in passed:
            # Both NaN: the caller says so.
            if _same_distribution(scores.float(), logits) or bool(logits.isnan().any()):
                return logits
        raise SteeringError(
            "logits_processor: a processor before this one changed the scores of tokens that it did not rule out "
            "(repetition_penalty, guidance_scale, sequence_bias, … of generate or of model.original_model."
            "generation_config); set it to None, or put its LogitsProcessor behind this one in logits_processor=[…]"
        )

    def check_mask(self, ids: Int[Tensor, "row pos"], mask: Int[Tensor, "row pos"]) -> None:
        """Refuse to steer a model that saw other tokens than the masked branch.

        Raises:
            SteeringError: the model ran on `ids` with another attention mask.
        """
        seen = self._mask
        if not self._after(ids) or not isinstance(seen, Tensor) or seen.ndim != 2 or seen.shape[1] < mask.shape[1]:
            return
        if not torch.equal(seen[:, : mask.shape[1]].to(mask).bool(), mask.bool()):
            raise SteeringError(
                "logits_processor: generate ran with another attention_mask than the processor has; without one it "
                "takes every padding token for padding, also inside a prompt: give both the same, or generate "
                "attention_mask=torch.ones_like(ids)"
            )

    def _after(self, ids: Int[Tensor, "row pos"]) -> list[Float[Tensor, "row d_vocab"]]:
        """Logits of the last pass where the last of `ids` went in."""
        if self._ids is None or self._logits is None or len(self._logits) != len(ids):
            return []
        kept = self._logits.shape[1]
        last = ids[:, -1:].to(self._ids.device)
        places = (self._ids[:, -kept:] == last).all(0).nonzero().flatten().tolist()
        return [self._logits[:, place] for place in places]


def _same_distribution(scores: Float[Tensor, "row d_vocab"], logits: Float[Tensor, "row d_vocab"]) -> bool:
    """Whether both differ by one constant a row where `scores` rule nothing out."""
    left = ~scores.isneginf()
    change = torch.where(left, scores - logits, 0)
    if not bool(torch.isfinite(change).all()):
        return False
    mean = change.sum(-1, keepdim=True) / left.sum(-1, keepdim=True).clamp(min=1)
    spread = torch.where(left, (change - mean).abs(), 0).amax()
    return bool(spread <= _ROUNDING * logits.abs().amax().clamp(min=1))
