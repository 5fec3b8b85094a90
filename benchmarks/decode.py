"""What steering costs a token, against plain greedy decoding of the same model by `transformers`.

    python benchmarks/decode.py

All sides run in one process, interleaved, on one thread, and CPU time is counted. A token costs what a run of
`1 + N` tokens takes beyond a run of one; that run is the prefill. Plain decoding is a bare loop of cached forward
passes and argmax. On a GPU the model is random, of the shape of an 8B Llama in bfloat16, wall time is counted, and
the floor is the time to read the weights once a step, at the bandwidth that a copy reaches on this device.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

import dps_lens as dps
from dps_lens.data import Prompt
from dps_lens.model import hf_model_of, wrap_model
from dps_lens.steering.rules import find_rule

K = 10
SHAPE_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


@torch.inference_mode()
def plain(model: Any, ids: Tensor, n_tokens: int) -> Tensor:
    """Greedy decoding with a cache and nothing else."""
    cache, column, written = DynamicCache(), ids, []
    for _ in range(n_tokens):
        logits = model(column, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        column = logits[:, -1].argmax(-1, keepdim=True)
        written.append(column)
    return torch.cat(written, dim=1)


def prompts_of(cfg: Any, n_users: int, length: int) -> list[Prompt]:
    """Random tokens with spans; the time does not depend on what they say."""
    ids = torch.randint(10, cfg.d_vocab - 10, (n_users, length), generator=torch.Generator().manual_seed(length))
    spans = {"profile": (8, length // 2), "task": (length // 2, length), "response": (length, length)}
    return [Prompt(row, spans, "", "own", f"user {index}", "benchmark", ()) for index, row in enumerate(ids)]


def load(device: str, name: str) -> tuple[dps.HookedModel, Any]:
    """A hooked model and the same weights as `transformers` runs them."""
    hooked = dps.load_model(name, device="cpu")
    source = hf_model_of(hooked).config._name_or_path
    if device == "cpu":
        return hooked, AutoModelForCausalLM.from_pretrained(source).eval()
    with torch.device(device):
        bare: Any = LlamaForCausalLM(LlamaConfig(**SHAPE_8B)).eval()
    bare = bare.to(torch.bfloat16)
    return wrap_model(copy.deepcopy(bare), hooked.tokenizer, source, device=device, dtype=bare.dtype), bare


def sides(
    model: dps.HookedModel, bare: Any, users: Sequence[int], n_prompt: int, compiled: bool = False
) -> dict[str, tuple[int, Callable[[int], object]]]:
    """What is compared: name → (users in the batch, a function of the number of tokens)."""
    generator = torch.Generator().manual_seed(0)

    def heads() -> dps.HeadSet:
        chosen = torch.randperm(model.cfg.n_layers * model.cfg.n_heads, generator=generator)[:K]
        return dps.HeadSet([divmod(int(index), model.cfg.n_heads) for index in chosen])

    def shaped(one: dps.HeadSet) -> dps.HeadSet:
        return dps.HeadSet(one, shape=(model.cfg.n_layers, model.cfg.n_heads))

    def steer(n_users: int, *, compiled: bool = False, **options: Any) -> Callable[[int], object]:
        prompts = prompts_of(model.cfg, n_users, n_prompt)
        rule = find_rule(options.get("rule", "dps"))
        without = prompts_of(model.cfg, n_users, n_prompt // 2) if rule.needs_negative else None
        sets = [heads() for _ in range(n_users)]
        vectors = [dps.HeadVector(torch.randn(K, model.cfg.d_head), shaped(one)) for one in sets]
        return lambda n: dps.generate(
            model,
            prompts,
            heads=sets,
            vectors=vectors if rule.needs_vectors else None,
            max_new_tokens=n,
            negative_prompts=without,
            decode_config=dps.DecodeConfig(stop_at_eos=False, compile=compiled),
            **options,
        )

    ids = prompts_of(model.cfg, 1, n_prompt)[0].tokens[None].to(bare.device)
    found: dict[str, tuple[int, Callable[[int], object]]] = {
        "transformers, greedy": (1, lambda n: plain(bare, ids, n)),
        "dps γ = 0": (1, steer(1, gamma=0.0)),
    }
    for count in users:
        found[f"dps, {count} user{'s' * (count > 1)}"] = (count, steer(count))
    for count in (users[0], users[-1]):
        found[f"head_vector, {count} user{'s' * (count > 1)}"] = (count, steer(count, rule="head_vector"))
    found["dps-patch, 1 user"] = (1, steer(1, rule="dps-patch"))
    found["cad, 1 user"] = (1, steer(1, rule="cad"))
    found["dola, 1 user"] = (1, steer(1, rule="dola"))
    found["amplify, 1 user"] = (1, steer(1, rule="amplify"))
    if compiled:
        found["dps, 1 user, compiled"] = (1, steer(1, compiled=True))
        found["dps-patch, 1 user, compiled"] = (1, steer(1, compiled=True, rule="dps-patch"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--prompt", type=int, default=448)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--users", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also steps that torch compiles, which takes minutes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, bare = load(arguments.device, arguments.model)
    clock = time.process_time if arguments.device == "cpu" else cuda_clock
    compared = sides(model, bare, arguments.users, arguments.prompt, arguments.compile)
    times: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "token": []} for name in compared}
    for repeat in range(arguments.repeats + 1):
        for name, (_, run) in compared.items():
            begun = clock()
            run(1)
            middle = clock()
            run(1 + arguments.tokens)
            ended = clock()
            if repeat:  # the first round warms up
                times[name]["prefill"].append(middle - begun)
                times[name]["token"].append((ended - middle - (middle - begun)) / arguments.tokens)
    base = times["transformers, greedy"]
    print(f"prompt {arguments.prompt}, {arguments.tokens} tokens, {arguments.device}; medians of {arguments.repeats}")
    print(f"{'':24} {'ms a token':>10} {'ratio':>6} {'a user':>7} {'prefill s':>10} {'ratio':>6}")
    for name, (count, _) in compared.items():
        token, prefill = statistics.median(times[name]["token"]), statistics.median(times[name]["prefill"])
        # Each repeat is compared with its own neighbour, so that a slower machine cancels.
        ratio = statistics.median(a / b for a, b in zip(times[name]["token"], base["token"], strict=True))
        first = statistics.median(a / b for a, b in zip(times[name]["prefill"], base["prefill"], strict=True))
        print(f"{name:24} {token * 1e3:10.1f} {ratio:6.2f} {ratio / count:7.2f} {prefill:10.2f} {first:6.2f}")
    if arguments.device == "cuda":
        print(f"floor: reading the weights takes {read_time(bare) * 1e3:.1f} ms")


def cuda_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def read_time(bare: Any) -> float:
    """Seconds to read every weight that a step uses once, at the bandwidth of a copy."""
    source = torch.empty(2**30, dtype=torch.uint8, device=bare.device)
    target = torch.empty_like(source)
    target.copy_(source)
    begun = cuda_clock()
    for _ in range(10):
        target.copy_(source)
    bandwidth = 10 * 2 * source.numel() / (cuda_clock() - begun)
    embedding = bare.get_input_embeddings().weight
    used = sum(p.numel() * p.element_size() for p in bare.parameters()) - embedding.numel() * embedding.element_size()
    return used / bandwidth


if __name__ == "__main__":
    main()
