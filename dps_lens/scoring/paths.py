"""Paths between a run and its ablation, all heads at once, and what each head contributes along them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dps_lens.errors import ScoreError
from dps_lens.intervene import attention_for
from dps_lens.model import HookedModel
from dps_lens.scoring.answers import ExampleRun

STEPS = 5
"""Nodes of a path integral, where nobody asks for another number; see docs/finders.md."""


class PathScores(NamedTuple):
    """What every head contributes along a path from a run to its ablation.

    Attributes:
        values: `Float[Tensor, "layer head"]`, in units of the objective.
        change: of the objective over the whole path, which the values add up to if enough steps were taken.
    """

    values: Tensor
    change: float


def integrated(clean: ExampleRun, steps: int) -> PathScores:
    """Integrated gradients of every head (Sundararajan et al. 2017, arXiv 1703.01365) from a run to its ablation.

    All heads go the way together: `z(g) = z′ + g·(z − z′)` with one gate g for all, `z′` what the ablation would put
    and z what the head computes in that pass. A head's value is `−∫₀¹ ∂L/∂g dg` by its own gate; they add up to what
    the objective L changes by when all heads are ablated at once (completeness).

    Args:
        clean: with the ablation.
        steps: nodes of a Gauss–Legendre rule, the rows of one batch.

    Raises:
        InterventionError: the ablation edits attention scores.
        ScoreError: gradients are NaN or infinite.
    """
    cfg = clean.runner.cfg
    values = torch.zeros(cfg.n_layers, cfg.n_heads, dtype=torch.float64)
    if clean.idle:
        return PathScores(values.float(), 0.0)
    nodes, weights = (torch.from_numpy(each) for each in np.polynomial.legendre.leggauss(steps))
    nodes, weights = (nodes + 1) / 2, weights / 2
    rows, done = min(clean.batch_size, steps), 0
    while done < steps:
        part = slice(done, done + rows)
        gates = nodes[part, None, None].float().repeat(1, cfg.n_layers, cfg.n_heads).requires_grad_()
        try:
            with gradients_of(clean):
                (gradient,) = torch.autograd.grad((clean.gated(gates) * weights[part]).sum(), gates)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows = rows // 2
            torch.cuda.empty_cache()
            continue
        values -= gradient.double().sum(0)
        done += rows
    if not bool(torch.isfinite(values).all()):
        raise ScoreError(
            f"example {clean.prompt.example_id!r}: gradients are NaN or infinite; load the model in float32 or "
            "bfloat16, or use method='exact'"
        )
    everything = torch.ones(1, cfg.n_layers, cfg.n_heads, dtype=torch.bool)
    return PathScores(values.float(), float(clean.ablated(everything)) - clean.value)


@contextmanager
def gradients_of(clean: ExampleRun) -> Iterator[None]:
    """Where gradients flow through the model and no weight gets one; enter it once around many `clean.gated(…)`."""
    with (
        attention_for(clean.runner.model, clean.ablation),
        frozen(clean.runner.model),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        yield


@contextmanager
def frozen(model: HookedModel) -> Iterator[None]:
    """Parameters without gradients, so that no activation is kept for them."""
    thawed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in thawed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)
