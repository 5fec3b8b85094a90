"""First-order estimates of ablation effects: one forward and one backward for all heads.

Attribution patching (Nanda 2023): the effect of replacing z by z′ is about `Σ (z′ − z) · ∂NLL/∂z`. The
backward pass goes block by block from the residuals of the clean pass, so that the activations of a
single block are held at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.errors import ScoreError
from dps_lens.intervene import Edit, Where, attention_for
from dps_lens.model import HookedModel
from dps_lens.scoring.branches import Branches, token_losses


def attribute(
    branches: Branches, values: Tensor | None = None, where: Where | None = None
) -> Float[Tensor, "layer head"]:
    """Estimate what `branches.ablated` measures for every single head, minus the clean NLL.

    Args:
        branches: of a prompt; its ablation is `zero`, `mean` or `patch`.
        values: as in `ablate`.
        where: as in `Branches.ablated`.

    Raises:
        ScoreError: `uniform` does not replace z by a value that is known beforehand.
    """
    if branches.ablation == "uniform":
        raise ScoreError("attribution is defined for 'zero', 'mean' and 'patch', not for 'uniform'; use method='exact'")
    runner, cfg = branches.runner, branches.runner.cfg
    tokens, prompt = branches.tokens, branches.prompt_cache
    everything = torch.ones(1, cfg.n_layers, cfg.n_heads, dtype=torch.bool)
    edit = Edit(everything, branches.ablation, where or branches.where, values)
    found = torch.zeros(cfg.n_layers, cfg.n_heads)
    if edit.where(branches.tokens.shape[1]) is None:
        return found
    with (
        attention_for(runner.model, branches.ablation),
        _frozen(runner.model),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        last = runner.block(
            cfg.n_layers - 1, branches.residual(cfg.n_layers - 1), branches.tokens, prompt=branches.prompt_cache
        )
        last = last.detach().requires_grad_()
        logits = runner.resume(
            {cfg.n_layers: last}, branches.tokens, prompt=branches.prompt_cache, keep=len(branches.targets)
        )
        (gradient,) = torch.autograd.grad(token_losses(logits[0], branches.targets).mean(), last)
        del logits, last
        for layer in reversed(range(cfg.n_layers)):
            entering = branches.residual(layer).detach().requires_grad_()
            held: list[Tensor] = []
            hook = (f"blocks.{layer}.attn.hook_z", partial(_hold, held))
            with runner.model.hooks(fwd_hooks=[hook]):
                leaving = runner.block(layer, entering, tokens, prompt=prompt)
            gradient, z_gradient = torch.autograd.grad(leaving, [entering, held[0]], gradient.to(leaving.device))
            with torch.no_grad():
                z = held[0].detach()
                change = edit.replaced(layer, z) - z
                found[layer] = (change.float() * z_gradient.float()).sum((0, 1, 3)).cpu()
    return found


def _hold(held: list[Tensor], z: Tensor, hook: Any) -> Tensor:
    held.append(z)
    return z


@contextmanager
def _frozen(model: HookedModel) -> Iterator[None]:
    """Parameters without gradients, so that no activation is kept for them."""
    thawed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in thawed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)
