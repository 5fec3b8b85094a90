"""Exact PCS against one forward per head: time, floor and memory.

    python benchmarks/sweep.py --prompt 448 --response 64 --positions response

Both sides run in one process, interleaved, on one thread, and CPU time is counted. Heads are
sampled equally from every layer. The loop is `run_with_hooks` once a head over the whole sequence.
The floor is what the FLOPs alone allow: matmuls and attention of the loop over those that an exact
sweep cannot avoid (layers above the head, positions that change, logits of the response).
"""

import argparse
import resource
import time
from typing import Any

import torch
from torch import Tensor

import dps_lens as dps
from dps_lens.data import Prompt
from dps_lens.literals import POSITIONS, Positions
from dps_lens.model.losses import token_losses
from dps_lens.model.runners import runner_of
from dps_lens.scoring import CleanRun


def make_prompt(model: dps.HookedModel, n_prompt: int, n_response: int) -> Prompt:
    """Random tokens with spans; the time does not depend on what they say."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, model.cfg.d_vocab - 10, (n_prompt + n_response,), generator=generator)
    spans = {"profile": (8, n_prompt // 2), "task": (n_prompt // 2, n_prompt), "response": (n_prompt, len(tokens))}
    return Prompt(tokens, spans, "", "own", "benchmark", "benchmark", ())


@torch.inference_mode()
def loop_nll(model: dps.HookedModel, prompt: Prompt, layer: int, head: int, positions: Positions) -> Tensor:
    """The obvious way: a hook, a whole forward."""
    start, stop = prompt.spans["response"]

    def zero(z: Tensor, hook: object) -> Tensor:
        z[:, start - 1 if positions == "response" else 0 :, head] = 0
        return z

    hooks = [(f"blocks.{layer}.attn.hook_z", zero)]
    logits = model.run_with_hooks(prompt.tokens[None], fwd_hooks=hooks, return_type="logits")
    return token_losses(logits[0, start - 1 : stop - 1], prompt.tokens[start:stop]).cpu().double().mean()


def flops(cfg: Any, n_prompt: int, n_response: int, positions: Positions) -> tuple[float, float]:
    """FLOPs a head of the loop and of an exact sweep, averaged over layers."""
    kv_heads = cfg.n_key_value_heads or cfg.n_heads
    projections = cfg.d_model * cfg.d_head * (2 * cfg.n_heads + 2 * kv_heads)
    mlp = cfg.d_model * cfg.d_mlp * (3 if cfg.gated_mlp else 2)
    n_all = n_prompt + n_response

    def block(n_new: int, n_before: int) -> float:
        seen = sum(range(n_before + 1, n_before + n_new + 1))
        return 2 * n_new * (projections + mlp) + 4 * seen * cfg.n_heads * cfg.d_head

    unembed = 2 * cfg.d_model * cfg.d_vocab
    loop = cfg.n_layers * block(n_all, 0) + n_all * unembed
    n_new, n_before = (n_response, n_prompt - 1) if positions == "response" else (n_all - 1, 0)
    above = sum(cfg.n_layers - 1 - layer for layer in range(cfg.n_layers)) / cfg.n_layers
    exact = above * block(n_new, n_before) + 2 * n_new * mlp + n_response * unembed
    return loop, exact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompt", type=int, default=448)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--positions", choices=[one for one in POSITIONS if one != "profile"], default="response")
    parser.add_argument("--heads-per-layer", type=int, default=1, help="sampled for the loop; the sweep runs as many")
    parser.add_argument("--layers", type=int, default=0, help="sample so many layers, evenly; 0 is all")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = dps.load_model(arguments.model)
    cfg, runner = model.cfg, runner_of(model)
    prompt = make_prompt(model, arguments.prompt, arguments.response)
    step = cfg.n_layers / (arguments.layers or cfg.n_layers)
    layers = [int(step * (index + 0.5)) for index in range(arguments.layers or cfg.n_layers)]
    heads = [(layer, head) for layer in layers for head in range(arguments.heads_per_layer)]
    masks = torch.zeros(len(heads), cfg.n_layers, cfg.n_heads, dtype=torch.bool)
    for row, (layer, head) in enumerate(heads):
        masks[row, layer, head] = True
    loop_time = sweep_time = clean_time = 0.0
    worst = 0.0
    for repeat in range(arguments.repeats + 1):
        begun = time.process_time()
        branches = CleanRun(runner, prompt, positions=arguments.positions, batch_size=arguments.batch_size or "auto")
        middle = time.process_time()
        swept = branches.ablated(masks)
        ended = time.process_time()
        looped, chunk = [], heads if repeat else heads[:2]
        for layer, head in chunk:
            looped.append(loop_nll(model, prompt, layer, head, arguments.positions))
        if repeat:  # the first round warms up
            clean_time += middle - begun
            sweep_time += ended - middle
            loop_time += time.process_time() - ended
            worst = max(worst, float((swept - torch.stack(looped)).abs().max()))
    per_head = sweep_time / len(heads) + clean_time / (cfg.n_layers * cfg.n_heads)
    loop_flops, exact_flops = flops(cfg, arguments.prompt, arguments.response, arguments.positions)
    ratio = loop_time / len(heads) / per_head
    print(f"{arguments.prompt} + {arguments.response} tokens, positions {arguments.positions}, {len(heads)} heads")
    print(f"loop    {loop_time / len(heads) / arguments.repeats:8.3f} s a head")
    print(f"sweep   {per_head / arguments.repeats:8.3f} s a head, the clean pass shared by all heads included")
    print(
        f"ratio   {ratio:8.2f}   floor {loop_flops / exact_flops:.2f}   reached {ratio * exact_flops / loop_flops:.0%}"
    )
    print(f"largest difference {worst:.1e} nats per token")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
