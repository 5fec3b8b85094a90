"""Peak memory of scoring one example, beside that of one forward pass; and of attribution at four lengths.

    python benchmarks/memory.py

Beside a forward pass of transformers with the prompt's keys and values: exact scores of heads and integrated scores at
response positions, one row and eight a batch. Then attribution: a straight line through four lengths, and what that
means for 7B. Measured (Linux, glibc): the process' peak beyond the loaded model; attribution at all positions. The
line's slope is split into the residual stream that is kept for every layer and what one block holds for its backward
pass; the latter is scaled by the widths of a block. The numbers for a larger model are an extrapolation.
"""

import argparse
import ctypes
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sweep import make_prompt
from transformers import AutoModelForCausalLM

import dps_lens as dps
from dps_lens.model import hf_model_of, runner_of
from dps_lens.scoring import CleanRun, single_heads
from dps_lens.scoring.attribution import attribute
from dps_lens.scoring.paths import integrated

LLAMA_7B = {"n_layers": 32, "d_model": 4096, "d_mlp": 11008, "d_vocab": 32000, "parameters": 6.7e9}
GIB = 2**30
RESPONSE = 64


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_of(call: Callable[[], object]) -> int:
    """Bytes beyond what was resident before."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that is kept for later would hide new needs
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def attributed(model: dps.HookedModel, length: int) -> int:
    prompt = make_prompt(model, length - RESPONSE, RESPONSE)
    return peak_of(lambda: attribute(CleanRun(runner_of(model), prompt, positions="all")))


def beside_a_forward(model: dps.HookedModel, length: int) -> None:
    """Scores of one example at response positions."""
    prompt, runner = make_prompt(model, length - RESPONSE, RESPONSE), runner_of(model)
    plain = AutoModelForCausalLM.from_config(hf_model_of(model).config, attn_implementation="sdpa").eval()
    heads = single_heads(model.cfg.n_layers, model.cfg.n_heads)[::7]

    @torch.no_grad()
    def forward() -> None:
        plain(prompt.tokens[None], use_cache=True, logits_to_keep=RESPONSE)

    calls: dict[str, Callable[[], object]] = {"a forward pass": forward}
    for rows in (1, 8):
        clean = partial(CleanRun, runner, prompt, batch_size=rows)
        calls[f"exact, {rows} a batch"] = partial(_exact, clean, heads)
        calls[f"integrated, {rows} a batch"] = partial(_integrated, clean)
    for call in calls.values():
        call()
    peaks = {name: peak_of(call) for name, call in calls.items()}
    for name, peak in peaks.items():
        print(f"{length} tokens, {name:20} {peak / GIB:6.2f} GiB  {peak / peaks['a forward pass']:5.2f} of a forward")


def _exact(clean: Callable[[], CleanRun], heads: torch.Tensor) -> None:
    clean().ablated(heads)


def _integrated(clean: Callable[[], CleanRun]) -> None:
    integrated(clean(), 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = dps.load_model()
    cfg = model.cfg
    beside_a_forward(model, arguments.lengths[-1])
    attributed(model, arguments.lengths[0])  # warms up
    peaks = [attributed(model, length) for length in arguments.lengths]
    slope, base = np.polyfit(arguments.lengths, peaks, 1)
    for length, peak in zip(arguments.lengths, peaks, strict=True):
        print(f"{length:6d} tokens  {peak / GIB:6.2f} GiB   line {(base + slope * length) / GIB:6.2f} GiB")
    kept = 4 * cfg.n_layers * cfg.d_model
    block = (slope - kept) / (4 * (cfg.d_model + cfg.d_mlp))
    print(
        f"a token: {kept / 1024:.0f} KiB of residual streams, {block:.1f} floats a unit of d_model + d_mlp in a block"
    )
    big = LLAMA_7B
    logits = 4 * 4 * RESPONSE * big["d_vocab"]
    width = 2  # bfloat16
    activations = width * 2048 * (big["n_layers"] * big["d_model"] + block * (big["d_model"] + big["d_mlp"]))
    total = width * big["parameters"] + activations + logits
    print(
        f"extrapolated, not measured: 7B in bfloat16 at 2,048 tokens: weights {width * big['parameters'] / GIB:.1f} + "
        f"attribution {(activations + logits) / GIB:.1f} = {total / GIB:.1f} GiB"
    )


if __name__ == "__main__":
    main()
