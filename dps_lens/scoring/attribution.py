"""First-order estimates of ablation effects: one forward and one backward for all heads.

Attribution patching (Nanda 2023): the effect of replacing z by z′ is about `Σ (z′ − z) · ∂NLL/∂z`. The
backward pass goes block by block from the residuals of the clean pass, so that the activations of a
single block are held at a time.
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.errors import ScoreError
from dps_lens.intervene import Edit, attention_for
from dps_lens.model.losses import token_losses
from dps_lens.scoring.answers import AnswersRun, ExampleRun
from dps_lens.scoring.objectives import NLL
from dps_lens.scoring.paths import frozen

_FLAT = 1e-4  # of the gradient of the NLL; rounding leaves less


def attribute(clean: ExampleRun) -> Float[Tensor, "layer head"]:
    """Estimate what `clean.ablated` measures for every single head, minus the clean value.

    Raises:
        ScoreError: the ablation does not put a value that is known beforehand in the place of z, or the objective has
            no gradient at the full model, as a divergence from it has none.
    """
    if clean.ablation.site != "hook_z":
        raise ScoreError(
            f"attribution is defined for ablations of hook_z, not for {clean.ablation.name!r}; use method='exact'"
        )
    if isinstance(clean, AnswersRun):
        slopes = clean.slopes().float().tolist()
        return torch.stack([slope * attribute(run) for slope, run in zip(slopes, clean.runs, strict=True)]).sum(0)
    runner, cfg = clean.runner, clean.runner.cfg
    tokens, prompt = clean.tokens, clean.prompt_cache
    everything = torch.ones(1, cfg.n_layers, cfg.n_heads, dtype=torch.bool)
    edit = Edit(everything, clean.ablation, clean.where, clean.values)
    estimate = torch.zeros(cfg.n_layers, cfg.n_heads)
    if edit.where(tokens.shape[1]) is None:
        return estimate
    with (
        attention_for(runner.model, clean.ablation),
        frozen(runner.model),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        last = runner.block(cfg.n_layers - 1, clean.residual(cfg.n_layers - 1), tokens, prompt=prompt)
        last = last.detach().requires_grad_()
        logits = runner.resume({cfg.n_layers: last}, tokens, prompt=prompt, keep=len(clean.targets))
        loss = clean.objective.losses(logits[0], clean.targets, clean.logits).mean()
        own = not isinstance(clean.objective, NLL)
        (gradient,) = torch.autograd.grad(loss, last, retain_graph=own)
        if own:
            (usual,) = torch.autograd.grad(token_losses(logits[0], clean.targets).mean(), last)
            if gradient.norm() < _FLAT * usual.norm():
                raise ScoreError(
                    f"the objective {clean.objective.name!r} is flat at the full model, so that gradients say nothing; "
                    "use method='exact'"
                )
        del logits, last, loss
        for layer in reversed(range(cfg.n_layers)):
            entering = clean.residual(layer).detach().requires_grad_()
            held: list[Tensor] = []
            hook = (f"blocks.{layer}.attn.hook_z", partial(_hold, held))
            with runner.model.hooks(fwd_hooks=[hook]):
                leaving = runner.block(layer, entering, tokens, prompt=prompt)
            gradient, z_gradient = torch.autograd.grad(leaving, [entering, held[0]], gradient.to(leaving.device))
            with torch.no_grad():
                z = held[0].detach()
                change = edit.replaced(layer, z) - z
                estimate[layer] = (change.float() * z_gradient.float()).sum((0, 1, 3)).cpu()
    if not bool(torch.isfinite(estimate).all()):
        raise ScoreError(
            f"example {clean.prompt.example_id!r}: gradients are NaN or infinite; load the model in float32 "
            "or bfloat16, or use method='exact'"
        )
    return estimate


def _hold(held: list[Tensor], z: Tensor, hook: object) -> Tensor:
    held.append(z)
    return z
