"""What a patched path costs beside one hooked pass an edge, and how long a graph and a dossier take.

    python benchmarks/paths.py

Ratio of processor time an edge, sides interleaved: `patch_paths`, and the direct path patching of transformer-lens,
which runs the model once for every edge; on the edges from one head into the queries of the heads behind it. Then the
wall time of a dossier on 12 probe users, and of a graph of 20 by 20 heads, into queries, or what `--into` asks for.
"""

import argparse
import statistics
import time
import warnings
from typing import Any, cast

import torch
from transformer_lens.patching import get_act_patch_direct_path

import dps_lens as dps
from dps_lens.data.conditions import prompts_in
from dps_lens.heads import Head, HeadSet
from dps_lens.model import runner_of
from dps_lens.paths.direct import INTO, DirectPaths
from dps_lens.scoring import CleanRun

QUIET = dps.RunConfig(progress=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="layers of receivers in the comparison")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--users", type=int, default=12)
    parser.add_argument("--into", default="q", help="q, k, v, resid, or several, such as q,k,v")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    model, users = dps.load_model(), dps.load_users("probe")[: arguments.users]
    example = users[0].examples[-1]
    own = prompts_in(model, example, "own", users)[0]
    other = prompts_in(model, example, "other_user", users)[0]
    sender = Head(model.cfg.n_layers - 1 - arguments.layers, 0)
    receivers = [
        Head(layer, head) for layer in range(sender.layer + 1, model.cfg.n_layers) for head in range(model.cfg.n_heads)
    ]
    times: dict[str, list[float]] = {"patch_paths": [], "transformer-lens": []}
    for _ in range(arguments.repeats):
        begun = time.process_time()
        ours = edges(model, own, other, sender, receivers)
        times["patch_paths"].append(time.process_time() - begun)
        begun = time.process_time()
        theirs = hooked(model, own, other, sender)
        times["transformer-lens"].append(time.process_time() - begun)
    theirs = torch.stack([theirs[head] for head in receivers])
    print(f"largest difference of a loss: {float((ours - theirs.cpu()).abs().max()):.1e} nats per token")
    ratio = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
    for name, each in times.items():
        print(f"{name:18} {1000 * statistics.median(each) / len(receivers):7.1f} ms an edge, {len(receivers)} edges")
    print(f"one hooked pass an edge takes {ratio:.1f} times as long")
    scores = dps.score_heads(model, users, max_examples=1, run_config=QUIET)
    heads = HeadSet(scores.top(20))
    begun = time.monotonic()
    dps.describe_head(model, users, heads[0], run_config=QUIET)
    print(f"a dossier, {len(users)} users: {time.monotonic() - begun:.0f} s")
    into = [part for part in INTO if part in arguments.into.split(",")]
    begun = time.monotonic()
    effects = dps.patch_paths(model, users, heads, heads, into=into, run_config=QUIET)
    took = time.monotonic() - begun
    print(f"20 by 20 heads into {arguments.into}, {len(users)} users, {len(effects.edges())} edges: {took:.0f} s")


def edges(
    model: dps.HookedModel, own: dps.Prompt, other: dps.Prompt, sender: Head, receivers: list[Head]
) -> torch.Tensor:
    """Losses of an example with each path patched, clean runs included."""
    run, z = CleanRun(runner_of(model), own, keep_z=True), CleanRun(runner_of(model), other, keep_z=True).z
    assert z is not None
    paths = DirectPaths(run)
    written = paths.writes([sender], z)
    layers = dict.fromkeys(head.layer for head in receivers)
    received = {layer: paths.received(layer, written, ["q"])["q"][0] for layer in layers}
    return run.replaced_losses(receivers, torch.stack([received[head.layer][:, head.head] for head in receivers])).mean(
        -1
    )


def hooked(model: Any, own: dps.Prompt, other: dps.Prompt, sender: Head) -> torch.Tensor:
    """The same by transformer-lens, one pass an edge."""
    name, tokens = f"blocks.{sender.layer}.attn.hook_z", own.tokens[None]
    start, stop = own.spans["response"]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=name)
        _, there = model.run_with_cache(other.tokens[None], names_filter=name)
        patched = {name: cache[name].clone()}
        first, last = other.spans["response"]
        patched[name][:, start - 1 : stop - 1] = there[name][:, first - 1 : last - 1]

        def loss(logits: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(logits[0, start - 1 : stop - 1], tokens[0, start:stop])

        return get_act_patch_direct_path(
            model, tokens, cast(Any, patched), cache, loss, sender.layer, sender.head, component="q", verbose=False
        )


if __name__ == "__main__":
    main()
