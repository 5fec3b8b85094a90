"""Everything that one GPU is asked about: right numbers, decoding and sweeps of a 7–8B shape, and what hardware allows.

    make gpu

Each section is a process of its own with its own limit of time; one that fails or takes too long is named in the table
and stops no other. The model has random weights, made on the device in bfloat16, of the shape of an 8B Llama: speed
does not depend on what a model knows. Wall time; a token costs what a run of `1 + N` tokens takes beyond a run of one.
Floors: the weights' bytes over the bandwidth that a copy reaches here, and the floating-point operations of a sweep
over the rate that a product of large matrices reaches here. Writes one JSON file and prints one table. With
`--device cpu --shape tiny` it shows on any machine that it runs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from decode import SHAPE_8B, plain, prompts_of
from sweep import flops, make_prompt
from transformers import LlamaConfig, LlamaForCausalLM

import dps_lens as dps
from dps_lens.model import runner_of, wrap_model
from dps_lens.scoring import CleanRun
from dps_lens.scoring.clean_run import single_heads
from dps_lens.scoring.paths import STEPS, integrated
from dps_lens.version import __version__

SHAPES: dict[str, dict[str, Any]] = {
    "8b": SHAPE_8B,
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
    },
}
LIMITS = {"tests": 120, "floors": 40, "decoding": 110, "compiled decoding": 150, "sweeps": 60}
"""Seconds of each section; 8 minutes in all."""

Row = dict[str, Any]
Rows = Iterator[Row]


class Machine:
    """The device and a random model on it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device, self.repeats, self.tokens = arguments.device, arguments.repeats, arguments.tokens
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.shape, self.tokenizer = SHAPES[arguments.shape], arguments.tokenizer
        self.prompt = arguments.prompt
        self.users: list[int] = arguments.users

    def bare(self) -> Any:
        """As transformers runs it."""
        torch.set_default_dtype(self.dtype)
        with torch.device(self.device):
            made: Any = LlamaForCausalLM(LlamaConfig(**self.shape, max_position_embeddings=8192)).eval()
        torch.set_default_dtype(torch.float32)
        return made

    def hooked(self, bare: Any) -> dps.HookedModel:
        """The same, hooked, in place."""
        named = dps.load_model(self.tokenizer, device="cpu")
        return wrap_model(bare, named.tokenizer, "random", device=self.device, dtype=self.dtype)

    def clock(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, run: Callable[[], object], *, repeats: int = 0) -> float:
        """Median wall time, after a first run that warms up."""
        run()
        times = []
        for _ in range(repeats or self.repeats):
            begun = self.clock()
            run()
            times.append(self.clock() - begun)
        return statistics.median(times)

    def a_token(self, run: Callable[[int], object]) -> float:
        """Seconds of a token beyond the first."""
        return (self.seconds(lambda: run(1 + self.tokens)) - self.seconds(lambda: run(1))) / self.tokens

    def peak(self) -> Rows:
        """Gibibytes that the device held at most."""
        if self.device == "cuda":
            yield {"name": "peak memory", "value": torch.cuda.max_memory_allocated() / 2**30, "unit": "GiB"}


def floors(machine: Machine) -> Rows:
    """Bandwidth of a copy, and the rate of a large product."""
    size = 2**30 if machine.device == "cuda" else 2**26
    source = torch.empty(size, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    copied = 2 * size / machine.seconds(lambda: target.copy_(source), repeats=10)
    n = 8192 if machine.device == "cuda" else 512
    left, right = (torch.randn(n, n, device=machine.device, dtype=machine.dtype) for _ in range(2))
    rate = 2 * n**3 / machine.seconds(lambda: left @ right, repeats=10)
    yield {"name": "bandwidth of a copy", "value": copied / 1e9, "unit": "GB/s"}
    yield {"name": "rate of a product of matrices", "value": rate / 1e12, "unit": "TFLOP/s"}


def decoding(machine: Machine, *, compiled: bool = False) -> Rows:
    """Plain greedy decoding by transformers, and DPS for one user and many; eager or compiled."""
    bare = machine.bare()
    used = sum(p.numel() * p.element_size() for p in bare.parameters())
    embedding = bare.get_input_embeddings().weight
    yield {"name": "bytes that a step reads", "value": (used - embedding.nbytes) / 1e9, "unit": "GB"}
    generator = torch.Generator().manual_seed(0)
    n_heads, n_layers = machine.shape["num_attention_heads"], machine.shape["num_hidden_layers"]
    ids = torch.randint(10, machine.shape["vocab_size"] - 10, (1, machine.prompt), generator=generator)
    base = machine.a_token(lambda n: plain(bare, ids.to(machine.device), n))
    yield {"name": "transformers, greedy", "value": base * 1e3, "unit": "ms a token"}
    model = machine.hooked(bare)
    for count in machine.users:
        prompts = prompts_of(model.cfg, count, machine.prompt)
        sets = []
        for _ in range(count):
            chosen = torch.randperm(n_layers * n_heads, generator=generator)[:10]
            sets.append(dps.HeadSet([divmod(int(index), n_heads) for index in chosen]))

        def steer(n: int, compiled: bool = compiled, prompts: Any = prompts, sets: Any = sets) -> dps.Generation:
            config = dps.DecodeConfig(stop_at_eos=False, compile=compiled)
            return dps.generate(model, prompts, heads=sets, gamma=1.0, max_new_tokens=n, decode_config=config)

        begun = machine.clock()
        steer(1)
        written = steer(1 + machine.tokens).tokens
        first = machine.clock() - begun
        token = machine.a_token(steer)
        name = f"dps, {count} user{'s' * (count > 1)}" + (", compiled" if compiled else "")
        row = {"name": name, "value": token * 1e3, "unit": "ms a token", "ratio": token / base}
        row |= {"a user": token / base / count, "first calls, s": first}
        if compiled:
            eager = steer(1 + machine.tokens, False).tokens
            same = [float((one == other).float().mean()) for one, other in zip(written, eager, strict=True)]
            # In 16 bits, ties within rounding may fall otherwise.
            row["tokens as uncompiled"] = sum(same) / len(same)
        yield row
    yield from machine.peak()


def sweeps(machine: Machine) -> Rows:
    """Exact PCS of all heads of one example, and integrated scores, at response positions."""
    model = machine.hooked(machine.bare())
    cfg, runner = model.cfg, runner_of(model)
    prompt = make_prompt(model, machine.prompt, 64)
    masks = single_heads(cfg.n_layers, cfg.n_heads)
    batches = []

    def exact() -> None:
        clean = CleanRun(runner, prompt)
        clean.ablated(masks)
        batches.append(clean.batch_size)

    found = [
        ("exact PCS, all heads", machine.seconds(exact)),
        ("integrated scores", machine.seconds(lambda: integrated(CleanRun(runner, prompt), STEPS))),
    ]
    needed = flops(cfg, machine.prompt, 64, "response")[1] * len(masks)
    for name, seconds in found:
        row = {"name": name, "value": seconds, "unit": "s an example"}
        yield row | ({"TFLOP": needed / 1e12, "rows a batch": batches[-1]} if name.startswith("exact") else {})
    yield from machine.peak()


SECTIONS: dict[str, Callable[[Machine], Rows]] = {
    "floors": floors,
    "decoding": decoding,
    "compiled decoding": lambda machine: decoding(machine, compiled=True),
    "sweeps": sweeps,
}


def tests(limit: float) -> dict[str, Any]:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "tests/test_cuda.py", "-q", "-o", "addopts=--import-mode=importlib"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    said = ended.stdout.strip() or ended.stderr
    if ended.returncode:
        return {"error": said[-2000:]}
    return {"rows": [{"name": "tests/test_cuda.py", "value": None, "unit": said.splitlines()[-1]}]}


def section(name: str, given: Sequence[str], limit: float) -> dict[str, Any]:
    """One section in a process of its own; the rows that it came to, and what went wrong."""
    begun, said = time.monotonic(), ""
    found: dict[str, Any] = {}
    try:
        if name == "tests":
            found = tests(limit)
        else:
            command = [sys.executable, __file__, *given, "--section", name]
            ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
            said, found = ended.stdout, {"error": ended.stderr[-2000:]} if ended.returncode else {}
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        found = {"error": f"took longer than {limit:.0f} s"}
    rows = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return {"rows": rows, **found, "seconds": time.monotonic() - begun}


def with_floors(report: dict[str, Any]) -> None:
    """What the hardware allows, beside what was reached."""
    rows: dict[str, dict[str, dict[str, Any]]] = {
        name: {row["name"]: row for row in one.get("rows", ())} for name, one in report["sections"].items()
    }
    if "bandwidth of a copy" not in rows.get("floors", {}):
        return
    bandwidth, rate = (row["value"] for row in rows["floors"].values())
    for name in ("decoding", "compiled decoding"):
        of_section = rows.get(name, {})
        for row in of_section.values():
            if row["unit"] == "ms a token":
                row["of the floor"] = row["value"] / (of_section["bytes that a step reads"]["value"] / bandwidth * 1e3)
    exact = rows.get("sweeps", {}).get("exact PCS, all heads")
    if exact:
        exact["of the floor"] = exact["value"] / (exact["TFLOP"] / rate)


def table(report: dict[str, Any]) -> str:
    """All rows, as Markdown."""
    lines = [
        f"{report['device']}, {report['shape']}, {report['dtype']}, {report['prompt']} + {report['tokens']} tokens",
        "",
    ]
    lines += ["| | value | of plain | a user | of the floor |", "|---|---|---|---|---|"]
    for name, one in report["sections"].items():
        if "error" in one:
            lines.append(f"| {name} | failed: {' '.join(one['error'].split())[-120:]} | | | |")
        for row in one.get("rows", ()):
            value = f"{row['value']:.3g} " if row["value"] is not None else ""
            more = (f"{row[key]:.2f}" if key in row else "" for key in ("ratio", "a user", "of the floor"))
            lines.append(f"| {row['name']} | {value}{row['unit']} | {' | '.join(more)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--tokenizer", default="smollm2-135m", help="a model, or a folder, whose tokenizer is used")
    parser.add_argument("--prompt", type=int, default=448, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8, 32], help="users in one batch")
    parser.add_argument("--repeats", type=int, default=2, help="of every timing")
    parser.add_argument("--only", nargs="+", choices=list(LIMITS), default=list(LIMITS), help="some sections")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="where the numbers go")
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    machine = Machine(arguments)
    if arguments.section:
        for row in SECTIONS[arguments.section](machine):
            print(json.dumps(row), flush=True)
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --shape tiny shows that the script runs")
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    report: dict[str, Any] = {"device": name, "shape": arguments.shape, "dtype": str(machine.dtype)}
    report |= {"prompt": arguments.prompt, "tokens": arguments.tokens, "users": arguments.users}
    report |= {"dps_lens": __version__, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "sections": {}}
    given = [word for word in sys.argv[1:] if word != "--section"]
    for one in arguments.only:
        print(f"{one} (at most {LIMITS[one]} s) …", file=sys.stderr, flush=True)
        report["sections"][one] = section(one, given, LIMITS[one])
        with_floors(report)
        arguments.out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(table(report))
    if any("error" in one for one in report["sections"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
