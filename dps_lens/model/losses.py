"""The one way from logits to losses."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_CACHED_ROWS = 16


def token_losses(logits: Float[Tensor, "pos d_vocab"], targets: Int[Tensor, " pos"]) -> Float[Tensor, " pos"]:
    """−log p of each response token, in float32.

    The one reducer of every path: `logsumexp − gold`. A float32 `log_softmax` over a large vocabulary is
    biased by about 1e-5 a token against it.
    """
    logits = logits.float()
    # In parts whose temporaries stay in the processor's cache.
    total = torch.cat([part.logsumexp(-1) for part in logits.split(_CACHED_ROWS)])
    return total - logits.gather(-1, targets.to(logits.device)[:, None])[:, 0]
