"""What the paper's tables will take on this device, from one sweep and one answer that are timed."""

import time
from collections.abc import Callable
from functools import partial

import pandas as pd
import torch

import dps_lens as dps
from dps_lens.data.conditions import prompts_in
from dps_lens.errors import DataError
from dps_lens.model import runner_of
from dps_lens.scoring import CleanRun, single_heads
from experiments.lib.choices import LABELLED, Paper, Task
from experiments.lib.harness import Lab


def budget(config: Paper, lab: Lab) -> pd.DataFrame:
    """What each task will take, from one sweep and one answer that are timed here; nothing where only workers hold the
    model."""
    rows = []
    if lab.model.W_U.device.type == "meta":
        return pd.DataFrame(columns=["task", "hours"])
    for name in config.tasks:
        task = Task(name, config, lab, None)
        users = task.users
        if not users:
            raise DataError(f"paper: no user of {name} has both older and held-out examples; raise max_users")
        cfg, prompt = lab.model.cfg, config.prompt.config()
        (own,) = prompts_in(lab.model, users[0].examples[-1], "own", users, config=prompt)
        runner, n_heads = runner_of(lab.model), cfg.n_layers * cfg.n_heads
        run = CleanRun(runner, own)
        clean = _seconds(partial(CleanRun, runner, own))
        one_a_layer = single_heads(cfg.n_layers, cfg.n_heads)[:: cfg.n_heads]
        head = _seconds(partial(run.ablated, one_a_layer)) / cfg.n_layers
        few = dps.DecodeConfig(stop_at_eos=False)
        write_ = partial(dps.generate, lab.model, own, heads=dps.HeadSet([(0, 0)]), decode_config=few)
        first = _seconds(partial(write_, max_new_tokens=1))
        token = (_seconds(partial(write_, max_new_tokens=9)) - first) / 8
        examples = sum(min(len(user.examples), config.answered or len(user.examples)) for user in users)
        length, n_methods = config.new_tokens or users[0].task.max_new_tokens, len(task.names)
        # Slices with the profile; heads with and without, on tested and on older examples; finding, about as long.
        sweeps = 1 + 2 if name in LABELLED else 1 + 2 + 2 + 2
        scoring = len(users) * config.score_examples * sweeps * (clean + n_heads * head)
        answering = examples * n_methods * (first + length * token)
        # A set begins at its lowest layer: it takes about twice as long as a head does on average.
        removing = len(users) * 4 * (clean + 2 * head * 3 * (1 + config.n_random))
        rows.append(
            {
                "task": name,
                "users": len(users),
                "answers": examples,
                "a head, ms": head * 1e3,
                "token, ms": token * 1e3,
                "hours": (scoring + answering + removing) / 3600,
                "disk, MB": (len(users) * sweeps * 4 * n_heads + examples * n_methods * 8 * length) / 1e6,
            }
        )
    return pd.DataFrame(rows)


def _seconds(run: Callable[[], object]) -> float:
    """Of a second call, the first warms up."""

    def ended() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    run()
    begun = ended()
    run()
    return ended() - begun


def memory(lab: Lab) -> str:
    """What the timed sweep held."""
    weights = sum(one.numel() * one.element_size() for one in lab.model.parameters()) / 2**30
    if not torch.cuda.is_available():
        return f"{weights:.1f} GiB of weights"
    return f"{weights:.1f} GiB of weights, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most on the GPU"
