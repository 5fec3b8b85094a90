"""How long the stages of 'demo' will take."""

import time
from itertools import pairwise
from pathlib import Path

import typer

import dps_lens as dps
from dps_lens.cli.stages import Stages
from dps_lens.data import build_prompt
from dps_lens.model import runner_of
from dps_lens.scoring import CleanRun, single_heads
from dps_lens.scoring.paths import integrated

_TIMED = 8
"""Tokens that are written to time one."""


def print_estimate(stages: Stages) -> None:
    """Time a sample of what is run, sets of heads equally from every layer, and say how long the rest will take."""
    seconds = sum(_left(folder, wanted) * each for folder, (wanted, each) in _costs(stages).items())
    cfg = stages.model.cfg
    about = f"{len(stages.users)} users, {cfg.n_layers} layers × {cfg.n_heads} heads"
    typer.echo(f"{about}: about {max(seconds / 60, 0.1):.1f} minutes", err=True)


def _left(folder: Path, wanted: int) -> int:
    """Units that are not there yet; of heads that are found, whose fits are units too, all or none."""
    if folder.name == "found":
        return 0 if (folder / f"{dps.FoundHeads.stem}.json").is_file() else wanted
    return max(0, wanted - len([*(folder / "units").glob("*.safetensors")]))


def _costs(stages: Stages) -> dict[Path, tuple[int, float]]:
    """Units of each folder, and seconds of each."""
    size, cfg, config = stages.size, stages.model.cfg, dps.ScoreConfig()
    n_layers, n_heads = cfg.n_layers, cfg.n_heads
    prompt = build_prompt(stages.model, stages.users[0].discovery_examples()[-1])
    sample = single_heads(n_layers, n_heads)[::n_heads]
    for _ in range(2):  # the first round warms up
        times = [time.monotonic()]
        run = CleanRun(runner_of(stages.model), prompt)
        times.append(time.monotonic())
        run.ablated(sample)
        times.append(time.monotonic())
        integrated(run, config.ig_steps)
        times.append(time.monotonic())
        dps.generate(stages.model, prompt, rule="greedy", max_new_tokens=_TIMED)
        times.append(time.monotonic())
    clean, sweep, path, text = (after - before for before, after in pairwise(times))
    per_set, token = 2 * sweep / n_layers, (text - clean) / _TIMED  # a set may start at the first layer
    n_exact = config.exact_layers * n_heads + config.confirm * n_layers * n_heads
    paths = 1 + size.donors
    # Fits to all, without each of five folds, and to resamples: each of "rank" measures some sets where there is no
    # profile; those of "gates" share passes, some fifteen paths for six of them.
    fits = 6 + size.n_bootstraps
    fitting = fits * (2.5 * path if size.method == "gates" else 3 * per_set)
    length = stages.users[0].task.max_new_tokens
    texts = (len(size.gammas) * len(stages.ks) + 1) * clean + 2 * length * token * len(size.gammas)
    folder, n = stages.folder, len(stages.users)
    discovery = size.examples * n
    return {
        folder: (discovery, (2 + size.donors) * clean + paths * path),
        folder / "found": (discovery, (3 + size.donors) * clean + (paths + 2) * path + fitting),
        # Own, none, another user's and neutral; two of them are also patched.
        folder / "ablation": (size.held_out * n, 4 * clean + 6 * per_set * (size.n_random + 1)),
        folder / "pcs": (size.maps * discovery, 2 * clean + n_exact * sweep / n_layers),
        **{folder / name: (discovery, (2 + size.donors) * (clean + 2 * path)) for name in stages.pairs},
        folder / "page" / "grid": (min(n, size.shown_users), texts),
    }
