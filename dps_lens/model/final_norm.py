"""The final norm as the linear map that it is while its scale is held: what a write adds to logits (direct logit
attribution)."""

import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.model.protocol import HookedModel


class FinalNorm:
    """The final norm around one run's last residual stream, as the linear map that it is while its scale is held.

    Args:
        model: a hooked model.
        final: the run's residual stream behind the last layer.
    """

    @torch.no_grad()
    def __init__(self, model: HookedModel, final: Float[Tensor, "pos d_model"]) -> None:
        final = final.float()
        # Values of mean 0 and of length 1 a dimension give the norm's own weights, whatever it calls them.
        probe = torch.ones_like(final[:1])
        probe[:, : probe.shape[1] // 2 * 2 : 2] = -1
        probe -= probe.mean()
        probe /= probe.square().mean().sqrt()
        plain, shifted, own = (without_bias(model, x) for x in (probe, probe + 1, final))
        self.weight = plain / probe
        self.centres = bool((shifted - plain).norm() < 0.1 * plain.norm())
        base = final - final.mean(-1, keepdim=True) if self.centres else final
        self.scale = (base * self.weight).norm(dim=-1, keepdim=True) / own.norm(dim=-1, keepdim=True)

    def __call__(self, write: Float[Tensor, "*row pos d_model"]) -> Float[Tensor, "*row pos d_model"]:
        """What enters the unembedding of a write."""
        write = write.to(self.weight)
        write = write - write.mean(-1, keepdim=True) if self.centres else write
        return write * self.weight / self.scale


def without_bias(model: HookedModel, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
    """The final norm of rows, without its bias."""
    x = x.to(next(model.parameters()).dtype)[None]
    return (model.ln_final(x) - model.ln_final(-x))[0].float() / 2
