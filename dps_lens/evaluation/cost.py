"""What an answer costs: floating-point operations, counted, and time."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from dps_lens.data import Prompt
from dps_lens.evaluation.methods import Row, write
from dps_lens.model import HookedModel
from dps_lens.steering.rules import Rule

COSTS = ("seconds a token", "FLOPs a token")
_ROUNDS = 3


def forward_flops(cfg: Any, n_new: int, n_before: int, n_logits: int) -> float:
    """FLOPs of a pass over `n_new` tokens after `n_before` cached ones: matrix products and attention, two a
    multiply-add."""
    kv_heads = cfg.n_key_value_heads or cfg.n_heads
    projections = cfg.d_model * cfg.d_head * (2 * cfg.n_heads + 2 * kv_heads)
    mlp = cfg.d_model * cfg.d_mlp * (3 if cfg.gated_mlp else 2)
    seen = sum(range(n_before + 1, n_before + n_new + 1))
    blocks = cfg.n_layers * (2 * n_new * (projections + mlp) + 4 * seen * cfg.n_heads * cfg.d_head)
    return float(blocks + 2 * n_logits * cfg.d_model * cfg.d_vocab)


def answer_flops(cfg: Any, rule: Rule, strength: float, prompt: int, without: int, n_new: int) -> float:
    """FLOPs of an answer of `n_new` tokens.

    Args:
        cfg: of the model.
        rule: its branches each run every step; those of heads share the prompt's pass.
        strength: γ and α; 0 needs no second branch, and neither does γ = −1.
        prompt: tokens of the prompt.
        without: tokens of the prompt without its profile.
        n_new: tokens written.
    """
    rows = 2 if rule.heads and strength not in (0, -1) else 1
    cost = forward_flops(cfg, prompt - 1, 0, 0) + rows * forward_flops(cfg, n_new, prompt - 1, n_new)
    if rule.prompt and strength:
        cost += forward_flops(cfg, without - 1, 0, 0) + forward_flops(cfg, n_new, without - 1, n_new)
    # DoLa reads off every second layer of the lower half.
    read = cfg.n_layers // 4 if rule.early else 0
    return cost + 2.0 * read * n_new * cfg.d_model * cfg.d_vocab


def measure_costs(
    model: HookedModel, prompts: Mapping[str, Prompt], rows: Sequence[Row], n_new: int
) -> dict[str, Float64[Tensor, " row"]]:
    """Seconds and FLOPs of a token, prompt included.

    Each row writes alone, answers of full length; the best of three interleaved rounds counts.

    Args:
        model: a hooked model.
        prompts: of one example, by what they show.
        rows: methods with settings.
        n_new: tokens of an answer.
    """
    seconds, flops = torch.full((_ROUNDS, len(rows)), torch.inf, dtype=torch.float64), []
    for of_round in seconds:
        for index, row in enumerate(rows):
            begun = time.perf_counter()
            write(model, prompts, [row], n_new, stop_at_eos=False)
            of_round[index] = (time.perf_counter() - begun) / n_new
    for row in rows:
        shown, without = (len(prompts[name].prompt_tokens) for name in (row.method.shows, "none"))
        flops.append(answer_flops(model.cfg, row.method.rule, row.setting.strength, shown, without, n_new) / n_new)
    return dict(zip(COSTS, (seconds.amin(0), torch.tensor(flops, dtype=torch.float64)), strict=True))
