"""Estimates of what a sweep takes on a GPU: memory from bytes, time from FLOPs and a measured utilisation.

    python benchmarks/sizing.py

The utilisation is that of `benchmarks/sweep.py` on this machine: FLOPs of the exact sweep a second over those of a
large product. The table assumes that a GPU reaches the same share of a stated rate; nothing in it was run on a GPU.
"""

import argparse
import time
from types import SimpleNamespace

import torch
from sweep import flops, make_prompt

import dps_lens as dps
from dps_lens.literals import Positions
from dps_lens.model.runners import runner_of
from dps_lens.scoring import CleanRun, single_heads

SHAPES = {
    "1B": {"n_layers": 16, "d_model": 2048, "n_heads": 32, "d_head": 64, "d_mlp": 8192, "tied": True},
    "8B": {"n_layers": 32, "d_model": 4096, "n_heads": 32, "d_head": 128, "d_mlp": 14336, "tied": False},
    "70B": {"n_layers": 80, "d_model": 8192, "n_heads": 64, "d_head": 128, "d_mlp": 28672, "tied": False},
}
COMMON = {"n_key_value_heads": 8, "d_vocab": 128256, "gated_mlp": True}
RESPONSE = 64
BYTES = 2


def product_rate() -> float:
    """FLOPs a second of a large float32 product on one thread."""
    one, other = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(5):
        begun = time.process_time()
        one @ other
        best = min(best, time.process_time() - begun)
    return 2 * 1024**3 / best


@torch.inference_mode()
def utilisation(positions: Positions) -> float:
    """Share of the rate of a large product that an exact sweep reaches."""
    model = dps.load_model()
    cfg, prompt = model.cfg, make_prompt(model, 448, RESPONSE)
    heads = single_heads(cfg.n_layers, cfg.n_heads)[:: 7 if positions == "response" else 31]
    branches = CleanRun(runner_of(model), prompt, positions=positions)
    branches.ablated(heads[:2])
    begun = time.process_time()
    branches.ablated(heads)
    seconds = (time.process_time() - begun) / len(heads)
    return flops(cfg, 448, RESPONSE, positions)[1] / seconds / product_rate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=400.0, help="rate of a large bfloat16 product on the GPU")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shares = {positions: utilisation(positions) for positions in ("response", "all")}
    print(f"utilisation: {shares['response']:.2f} (response), {shares['all']:.2f} (all)\n")
    columns = ("model", "tokens", "weights", "cache of a prompt", "residuals", "a head", "a head, all", "an example")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name, shape in SHAPES.items():
        cfg = SimpleNamespace(**COMMON, **shape)
        kv_width, head_width = cfg.n_key_value_heads * cfg.d_head, cfg.n_heads * cfg.d_head
        layer = cfg.d_model * (2 * head_width + 2 * kv_width + 3 * cfg.d_mlp)
        weights = BYTES * (cfg.n_layers * layer + (1 if cfg.tied else 2) * cfg.d_vocab * cfg.d_model)
        for tokens in (2048, 8192):
            cache = BYTES * 2 * cfg.n_layers * kv_width * tokens
            residuals = BYTES * cfg.n_layers * RESPONSE * cfg.d_model
            per_second = {positions: share * arguments.tflops * 1e12 for positions, share in shares.items()}
            prefill, head = flops(cfg, tokens - RESPONSE, RESPONSE, "response")
            example = 2 * (prefill + cfg.n_layers * cfg.n_heads * head) / per_second["response"]
            every = flops(cfg, tokens - RESPONSE, RESPONSE, "all")[1] / per_second["all"]
            print(
                f"| {name} | {tokens:,} | {weights / 2**30:.1f} GiB | {cache / 2**30:.2f} GiB | "
                f"{residuals / 2**20:.0f} MiB | {1000 * head / per_second['response']:.1f} ms | "
                f"{1000 * every:.0f} ms | {example:.1f} s |"
            )


if __name__ == "__main__":
    main()
