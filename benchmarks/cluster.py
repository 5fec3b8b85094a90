"""What an engine costs a unit, beside the model's work.

    python benchmarks/cluster.py

The same units of exact PCS are made without an engine and by one Ray worker of one thread, in turns, on a machine with
a second core for the calling process. `between units` is what the worker itself waited, `in all` the difference of wall
time a unit. The first units of either side warm up. Units of no work at all show what Ray alone takes.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import dps_lens as dps
from dps_lens.runs import RunFolder
from dps_lens.work import Work, make_units


@dataclass
class Nothing(Work):
    """Units of no work that return as much as a unit of scores."""

    model: dps.HookedModel
    n_layers: int
    n_heads: int

    def make(self, key: str, given: object = None) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(self.n_layers, self.n_heads) for name in ("own", "no_profile")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--users", default="probe")
    parser.add_argument("--max-users", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--empty", type=int, default=500, help="units of no work")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, users = dps.load_model(arguments.model), dps.load_users(arguments.users, max_users=arguments.max_users)
    quiet = dps.RunConfig(progress=False)
    times: dict[str, list[float]] = {"here": [], "ray": []}
    idle = []
    with tempfile.TemporaryDirectory() as folder, dps.RayEngine(workers=1) as engine:
        for number in range(arguments.rounds + 1):
            for name, where in (("here", None), ("ray", engine)):
                out = Path(folder) / f"{name} {number}"
                begun = time.perf_counter()
                scores = dps.score_heads(model, users, max_examples=2, engine=where, out=out, run_config=quiet)
                if number:
                    times[name].append((time.perf_counter() - begun) / len(scores.example_ids))
            if number:
                idle.append(engine.summary.idle)
        work = Nothing(model, model.cfg.n_layers, model.cfg.n_heads)
        keys = [str(number) for number in range(arguments.empty)]
        begun = time.perf_counter()
        make_units(work, keys, folder=RunFolder(Path(folder) / "empty", {}), engine=engine, progress=False)
        empty = (time.perf_counter() - begun) / len(keys)
    here, ray = (statistics.median(times[name]) for name in ("here", "ray"))
    print(f"a unit here         {1000 * here:9.1f} ms")
    print(f"a unit on a worker  {1000 * ray:9.1f} ms   ratio {ray / here:.3f}")
    print(f"between units       {1000 * statistics.median(idle):9.1f} ms")
    print(f"a unit of no work   {1000 * empty:9.1f} ms, file included")


if __name__ == "__main__":
    main()
