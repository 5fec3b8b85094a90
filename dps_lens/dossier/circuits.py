"""What the weights of a head say: its output circuit, and which later heads read where it writes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.heads import Head
from dps_lens.model import HookedModel


class OutputCircuit(NamedTuple):
    """Of `W_V W_O`.

    Attributes:
        copying: share of the positive eigenvalues of `W_E W_V W_O W_U`, `Σ Re λ / Σ |λ|`, from −1 to 1: near 1 a head
            raises the logit of what it looks at (Elhage et al. 2021). Norms and MLPs are left out.
        spectrum: singular values.
        dimensions: how many directions it writes to, `(Σ s²)² / Σ s⁴`.
    """

    copying: float
    spectrum: Float[Tensor, " d_head"]
    dimensions: float


class Reader(NamedTuple):
    """A later head whose input overlaps with what a head writes: `‖Uᵀ V‖² / d_head` of orthonormal bases of both, the
    normalised projection kernel; by chance d_head / d_model. The norm between the two is left out. Of keys and values
    that heads share, the first of these heads."""

    head: Head
    into: str
    overlap: float


@torch.inference_mode()
def output_circuits(model: HookedModel, heads: Sequence[Head]) -> list[OutputCircuit]:
    """The output circuit of each head."""
    w_u, w_e = (weight.detach().double() for weight in (model.W_U, model.W_E))
    found = []
    for head in heads:
        w_v, w_o = _input(model, head, "V"), _output(model, head)
        values = torch.linalg.eigvals((w_o @ w_u) @ (w_e @ w_v))
        spectrum = torch.linalg.svdvals(torch.linalg.qr(w_v).R @ w_o)
        square = spectrum**2
        copying = float(values.real.sum() / values.abs().sum().clamp(min=1e-30))
        dimensions = float(square.sum() ** 2 / (square**2).sum().clamp(min=1e-30))
        found.append(OutputCircuit(copying, spectrum.float(), dimensions))
    return found


@torch.inference_mode()
def readers(model: HookedModel, head: Head, n: int = 5) -> list[Reader]:
    """The later heads' inputs that overlap most with what a head writes, largest first."""
    written, cfg = _basis(_output(model, head).T), model.cfg
    found = []
    for layer in range(head.layer + 1, cfg.n_layers):
        for into in ("Q", "K", "V"):
            shared = 1 if into == "Q" else cfg.n_heads // (cfg.n_key_value_heads or cfg.n_heads)
            for index in range(0, cfg.n_heads, shared):
                read = _basis(_input(model, Head(layer, index), into))
                overlap = float((written.T @ read).square().sum()) / cfg.d_head
                found.append(Reader(Head(layer, index), into.lower(), overlap))
    return sorted(found, key=lambda reader: -reader.overlap)[:n]


def _inputs(model: HookedModel, layer: int, into: str) -> Tensor:
    weights: Tensor = getattr(model.blocks[layer].attn, f"W_{into}").detach().double()
    return weights


def _input(model: HookedModel, head: Head, into: str) -> Float[Tensor, "d_model d_head"]:
    """Of keys and values that heads share, those of the head's group."""
    weights = _inputs(model, head.layer, into)
    return weights[head.head * weights.shape[0] // model.cfg.n_heads]


def _output(model: HookedModel, head: Head) -> Float[Tensor, "d_head d_model"]:
    return model.blocks[head.layer].attn.W_O.detach().double()[head.head]


def _basis(columns: Float[Tensor, "d_model d_head"]) -> Float[Tensor, "d_model rank"]:
    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    return u[:, s > 1e-10 * s.max().clamp(min=1e-300)]
