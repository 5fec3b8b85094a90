"""Whether two models of transformers compute the same, tried on a few tokens."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_TOKENS = 12


@torch.inference_mode()
def logits_of(model: Any) -> Float[Tensor, "1 pos d_vocab"]:
    """Logits of a model of transformers for a short made-up text."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    # Multimodal models take some tokens for places of pictures; few have them this low.
    tokens = torch.arange(3, 3 + _TOKENS, device=model.get_input_embeddings().weight.device)[None] % vocabulary
    return model(input_ids=tokens, use_cache=False).logits


def deviation(found: Tensor, expected: Tensor) -> float | None:
    """The largest difference of logits, as a share of the largest; None where it is rounding."""
    error = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
    return None if error <= (1e-3 if expected.dtype == torch.float32 else 5e-2) else error
