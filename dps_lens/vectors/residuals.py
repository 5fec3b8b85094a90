"""The residual stream that leaves every layer."""

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dps_lens.model import HookedModel, native_attention, runner_of


def last_residuals(model: HookedModel, tokens: Int[Tensor, " pos"]) -> Float[Tensor, "layer d_model"]:
    """The residual stream that leaves every layer, at the last token, as float32 on the CPU."""
    return logits_and_residuals(model, tokens, 1)[1][:, 0]


def logits_and_residuals(
    model: HookedModel, tokens: Int[Tensor, " pos"], last: int
) -> tuple[Float[Tensor, "last d_vocab"], Float[Tensor, "layer last d_model"]]:
    """Logits of the last positions, and the residual stream that leaves every layer there, as float32 on the CPU."""
    states: dict[int, Tensor] = {}

    def keep(residual: Tensor, hook: object, layer: int) -> None:
        states[layer] = residual[0, -last:].detach().float().cpu()

    runner, n_layers = runner_of(model), model.cfg.n_layers
    hooks = [(f"blocks.{layer}.hook_resid_post", partial(keep, layer=layer)) for layer in range(n_layers)]
    with native_attention(model), model.hooks(fwd_hooks=hooks):
        logits = runner.logits(tokens[None].to(runner.device), keep=last)[0]
    return logits, torch.stack([states[layer] for layer in range(n_layers)])
