"""Direct logit attribution: what a write to the residual stream adds to logits, the final norm's scale held."""

import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.model import HookedModel


class FinalNorm:
    """The final norm around one run's last residual stream, as the linear map that it is while its scale is held.

    Args:
        model: a hooked model.
        final: the run's residual stream behind the last layer.
    """

    @torch.no_grad()
    def __init__(self, model: HookedModel, final: Float[Tensor, "pos d_model"]) -> None:
        norm, final = model.ln_final, final.float()
        # Values of mean 0 and of length 1 a dimension give the norm's own weights, whatever it calls them.
        probe = torch.ones_like(final[:1])
        probe[:, : probe.shape[1] // 2 * 2 : 2] = -1
        probe -= probe.mean()
        probe /= probe.square().mean().sqrt()
        self.weight = _odd(norm, probe) / probe
        shifted = final + final.abs().mean()
        self.centres = bool(torch.allclose(_odd(norm, shifted), _odd(norm, final), rtol=1e-3, atol=1e-3))
        base = final - final.mean(-1, keepdim=True) if self.centres else final
        self.scale = (base * self.weight).norm(dim=-1, keepdim=True) / _odd(norm, final).norm(dim=-1, keepdim=True)

    def __call__(self, write: Float[Tensor, "*row pos d_model"]) -> Float[Tensor, "*row pos d_model"]:
        """What enters the unembedding of a write."""
        write = write - write.mean(-1, keepdim=True) if self.centres else write
        return write * self.weight / self.scale


def _odd(norm: object, x: Tensor) -> Tensor:
    """Without the norm's bias."""
    up, down = (norm(sign * x[None])[0] for sign in (1, -1))  # type: ignore[operator]
    return (up - down).float() / 2
