"""What an answer costs: floating-point operations, counted by torch, and time."""

import time
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float64
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dps_lens.data import Prompt
from dps_lens.evaluation.methods import Writer, write
from dps_lens.model import HookedModel

COSTS = ("seconds a token", "FLOPs a token")
_ROUNDS = 3


def counting() -> FlopCounterMode:
    """torch's counter of matrix products and attention, two FLOPs a multiply-add; causal attention counts in full."""

    def attention(q: Sequence[int], k: Sequence[int], v: Sequence[int], *rest: object, **options: object) -> int:
        return sdpa_flop_count(q, k, v)

    # The fused kernel of CPUs is the one that torch leaves out.
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={fused: attention})


def measure_costs(
    model: HookedModel, prompts: Mapping[str, Prompt], writers: Sequence[Writer], n_new: int
) -> dict[str, Float64[Tensor, " writer"]]:
    """Seconds and FLOPs of a token, prompt included.

    Each writer writes alone, answers of full length; the best of three interleaved rounds counts. FLOPs are counted in
    one more answer.

    Args:
        model: a hooked model.
        prompts: of one example, by what they show.
        writers: methods with settings.
        n_new: tokens of an answer.
    """
    seconds, flops = torch.full((_ROUNDS, len(writers)), torch.inf, dtype=torch.float64), []
    for of_round in seconds:
        for index, writer in enumerate(writers):
            begun = time.perf_counter()
            write(model, prompts, [writer], n_new, stop_at_eos=False)
            of_round[index] = (time.perf_counter() - begun) / n_new
    for writer in writers:
        with counting() as counter:
            write(model, prompts, [writer], n_new, stop_at_eos=False)
        flops.append(counter.get_total_flops() / n_new)
    return dict(zip(COSTS, (seconds.amin(0), torch.tensor(flops, dtype=torch.float64)), strict=True))
