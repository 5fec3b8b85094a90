"""Peak memory of attribution at four lengths, a straight line through it, and what that means for 7B.

    python benchmarks/memory.py

Measured (Linux, glibc): the process' peak beyond the loaded model, all positions, while `attribute` runs. The
line's slope is split into the residual stream that is kept for every layer and what one block holds for its
backward pass; the latter is scaled by the widths of a block. The numbers for a larger model are an extrapolation.
"""

import argparse
import ctypes
import gc
from pathlib import Path

import numpy as np
import torch
from sweep import make_prompt

import dps_lens as dps
from dps_lens.model.runners import runner_of
from dps_lens.scoring import CleanRun
from dps_lens.scoring.attribution import attribute

LLAMA_7B = {"n_layers": 32, "d_model": 4096, "d_mlp": 11008, "d_vocab": 32000, "parameters": 6.7e9}
GIB = 2**30
RESPONSE = 64


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_of(model: dps.HookedModel, length: int) -> int:
    """Bytes beyond what was resident before."""
    prompt = make_prompt(model, length - RESPONSE, RESPONSE)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that is kept for later would hide new needs
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    attribute(CleanRun(runner_of(model), prompt, positions="all"))
    return status("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = dps.load_model()
    cfg = model.cfg
    peak_of(model, arguments.lengths[0])  # warms up
    peaks = [peak_of(model, length) for length in arguments.lengths]
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
