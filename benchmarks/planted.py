"""What each score and each finder makes of models whose carriers of the profile are known.

    python benchmarks/planted.py

The models are those of `tests/plants.py`: small GPT-2s with hand-set weights and eight users. The first table tells
what editing sets of heads does to the newest title of each user; the second which heads each method puts first, on two
earlier titles of each user.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import torch

import dps_lens as dps
from dps_lens.data.conditions import neutral_prompt, prompts_in
from dps_lens.families.retrieval import shipped_paragraphs
from dps_lens.heads import Head
from dps_lens.literals import FindMethod
from dps_lens.model import runner_of
from dps_lens.scoring.clean_run import CleanRun

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import plants

DENOISING = dps.Patch(direction="denoising")
SCORES: list[tuple[str, Mapping[str, Any]]] = [
    ("zero, one head at a time (the paper's PCS)", {"ablation": "zero", "against": None, "method": "exact"}),
    ("zero, own − no profile", {"ablation": "zero", "against": "no_profile", "method": "exact"}),
    ("zero, own − other user", {"ablation": "zero", "against": "other_user", "method": "exact"}),
    ("zero, integrated", {"ablation": "zero", "against": None, "method": "integrated"}),
    ("patch, one head at a time", {"ablation": "patch", "against": "other_user", "method": "exact"}),
    ("patch, attribution", {"ablation": "patch", "against": "other_user", "method": "attribution"}),
    ("patch, no profile, integrated", {"ablation": "patch", "against": "no_profile", "method": "integrated"}),
    ("denoising, integrated", {"ablation": DENOISING, "against": "other_user", "method": "integrated"}),
    ("denoising, no profile, integrated", {"ablation": DENOISING, "against": "no_profile", "method": "integrated"}),
    ("patch, integrated (the default)", {"ablation": "patch", "against": "other_user", "method": "integrated"}),
]
FINDERS: tuple[FindMethod, ...] = get_args(FindMethod)


def sets_of(name: str, carriers: Iterable[Head]) -> dict[str, list[Head]]:
    """The sets of heads whose effects are shown."""
    together = sorted(carriers)
    sets = {", ".join(map(str, together)): together}
    sets |= {str(head): [head] for head in together}
    return sets | ({f"{plants.HARMFUL} (no carrier)": [plants.HARMFUL]} if name == "harmful" else {})


def effects(case: plants.Planted, sets: Mapping[str, Sequence[Head]]) -> list[list[str]]:
    """Rows of the first table: nats per token, means over users."""
    runner, cfg = runner_of(case.model), case.model.cfg
    masks = torch.zeros(len(sets), cfg.n_layers, cfg.n_heads, dtype=torch.bool)
    for row, heads in enumerate(sets.values()):
        for head in heads:
            masks[row, head.layer, head.head] = True
    measured: dict[str, list[torch.Tensor]] = {name: [] for name in ("patched", "own", "other_user", "task", "neutral")}
    gains, texts = [], shipped_paragraphs()
    for place, user in enumerate(case.users):
        example = user.examples[0]
        own, other, none = (
            CleanRun(runner, prompts_in(case.model, example, condition, case.users)[0], keep_z=True)
            for condition in ("own", "other_user", "no_profile")
        )
        neutral = CleanRun(runner, neutral_prompt(case.model, texts[place % len(texts)]))
        gains.append(other.value - own.value)
        measured["patched"].append(own.with_values(dps.Patch(z=other.z)).ablated(masks) - own.value)
        for name, run in (("own", own), ("other_user", other), ("task", none), ("neutral", neutral)):
            measured[name].append(run.ablated(masks) - run.value)
    mean = {name: torch.stack(values).mean(0) for name, values in measured.items()}
    columns = (mean["patched"], mean["own"] - mean["other_user"], mean["task"], mean["neutral"])
    return [
        [shown, in_nats(fmean(gains)), *(in_nats(float(column[row])) for column in columns)]
        for row, shown in enumerate(sets)
    ]


def in_nats(value: float) -> str:
    # Adding 0 takes the sign off a zero.
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def scored(case: plants.Planted, settings: Mapping[str, Any]) -> str:
    """How many carriers stand first, how far the last of them is above the best other head, and who else is there."""
    n = len(case.carriers)
    scores = dps.score_heads(
        case.model, case.users, max_examples=2, **settings, run_config=dps.RunConfig(progress=False)
    )
    first = scores.top(n).heads
    wrong = [str(head) for head in first if head not in case.carriers]
    return f"{n - len(wrong)} of {n}" + (f"; {', '.join(wrong)}" if wrong else "")


def found(case: plants.Planted, method: FindMethod) -> str:
    """How many carriers the set holds, who else does, and how many resamples of users hold exactly the carriers."""
    n = len(case.carriers)
    result = dps.find_heads(
        case.model,
        case.users,
        n,
        method=method,
        max_task_cost=None,
        max_neutral_cost=None,
        max_examples=2,
        run_config=dps.RunConfig(progress=False),
    )
    wrong = [str(head) for head in result.heads if head not in case.carriers]
    exact = sum({*heads} == case.carriers for heads in result.resampled)
    right = sum(head in case.carriers for head in result.heads)
    return f"{right} of {n}" + (f"; {', '.join(wrong)}" if wrong else "") + f" ({exact}/{len(result.resampled)})"


def show(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|---" * len(header) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        cases = {name: plants.load(name, Path(folder) / name) for name in plants.NAMES}
        rows = [
            [f"`{name}`", *row] for name, case in cases.items() for row in effects(case, sets_of(name, case.carriers))
        ]
        show(["model", "heads", "gain", "patched", "zeroed", "task cost", "neutral cost"], rows)
        print()
        methods: list[tuple[str, Callable[[plants.Planted], str]]] = [
            (label, partial(scored, settings=settings)) for label, settings in SCORES
        ]
        methods += [(f"`find_heads`, {name}", partial(found, method=name)) for name in FINDERS]
        shown = ([label, *(method(case) for case in cases.values())] for label, method in methods)
        show(["method", *(f"`{name}`" for name in cases)], shown)


if __name__ == "__main__":
    main()
