"""How often intervals hold what was planted, and how often tests and verdicts are wrong, in simulated users.

    python benchmarks/coverage.py --out build/coverage.jsonl

Effects of users (and of random sets) are normal, exponential (skewness 2) or lognormal (skewness 6), with mean 0 and
standard deviation 1. A cell that the file holds is not simulated again. The standard error of a rate of 5% is 1.5
points in 200 runs, 0.9 in 600 and 0.3 in 4,000.
"""

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from zlib import crc32

import numpy as np
import pandas as pd
import torch
from scipy.stats import wilcoxon
from torch import Tensor

from dps_lens.heads import HeadSet
from dps_lens.scores import HeadScores
from dps_lens.stats import bootstrap_t_ci, overlap, significant_heads
from dps_lens.stats.intervals import crossed_interval, interval, jackknife, range_of_next, ratio_interval
from dps_lens.stats.null import ceiling_of
from dps_lens.stats.significance import Correction
from dps_lens.stats.skew import is_skewed
from dps_lens.validation import SetEffects

USERS = (5, 12, 20, 50)
SHAPES = ("normal", "exponential", "lognormal")
Rates: TypeAlias = dict[str, float]
Cell: TypeAlias = Callable[[np.random.Generator, int, str], Rates]


def effects(rng: np.random.Generator, shape: str, size: tuple[int, ...]) -> np.ndarray:
    """Mean 0, standard deviation 1."""
    if shape == "normal":
        return rng.normal(size=size)
    if shape == "exponential":
        return rng.exponential(size=size) - 1
    return (rng.lognormal(size=size) - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e)


def scores_of(values: np.ndarray) -> HeadScores:
    """One example a user; heads in one layer."""
    names = [f"u{index}" for index in range(len(values))]
    return HeadScores(torch.from_numpy(values)[:, None], example_ids=names, user_ids=names)


def held(low: Any, high: Any, truth: float = 0.0) -> float:
    return float(np.mean((np.asarray(low) <= truth) & (truth <= np.asarray(high))))


def many(n: int, once: Callable[[], Rates]) -> Rates:
    """Mean over runs; a run that gives no interval does not count for it."""
    return {name: float(value) for name, value in pd.DataFrame([once() for _ in range(n)]).mean().items()}


def of_means(rng: np.random.Generator, n: int, shape: str) -> Rates:
    """Every column is a run."""
    scores = scores_of(effects(rng, shape, (n, 4000)))
    skewness = scores.skewness().numpy().ravel()
    flagged = np.array([is_skewed(np.array([value]), n) for value in skewness])
    units = scores.samples().numpy()[:, 0]
    return {
        "t: mean over users": held(*scores.ci()),
        "bootstrap t: mean over users": held(*bootstrap_t_ci(scores, n_resamples=2000)),
        "called skewed, one measure": float(flagged.mean()),
        "Wilcoxon's signed ranks reject a mean of 0": float((wilcoxon(units[:, :1000]).pvalue <= 0.05).mean()),
    }


def of_ratios(rng: np.random.Generator, n: int, shape: str) -> Rates:
    def once() -> Rates:
        gain = 1 + 0.5 * effects(rng, shape, (n,))
        found = ratio_interval(0.3 * gain + 0.3 * effects(rng, shape, (n,)), gain)
        return {
            "Fieller: percent of the gain": np.nan if np.isnan(found["low"]) else held(found["low"], found["high"], 0.3)
        }

    return many(4000, once)


def of_differences(rng: np.random.Generator, n: int, shape: str) -> Rates:
    def once() -> Rates:
        found = {}
        for n_sets in (20, 50):
            sets, users = 0.5 * effects(rng, shape, (n_sets, 1)), effects(rng, shape, (n,))
            one = crossed_interval(sets + users + effects(rng, shape, (n_sets, n)))
            found[f"crossed: difference to {n_sets} random sets"] = held(one["low"], one["high"])
        return found

    return many(2000, once)


def of_pooled(rng: np.random.Generator, n: int, shape: str) -> Rates:
    def rmse(rows: pd.DataFrame) -> float:
        return float((rows["error"] ** 2).mean() ** 0.5)

    def once() -> Rates:
        errors = 0.6 * effects(rng, shape, (n, 1)) + 0.8 * rng.normal(size=(n, 4))
        found = jackknife(rmse, pd.DataFrame({"user": np.repeat(np.arange(n), 4), "error": errors.ravel()}))
        return {"jackknife: RMSE over all answers": held(found["low"], found["high"], 1.0)}

    return many(200, once)


def of_ranges(rng: np.random.Generator, n: int, shape: str) -> Rates:
    def once() -> Rates:
        found = {}
        for n_sets in (39, 50):
            drawn = (effects(rng, shape, (n_sets + 1, 1)) + 0.5 * effects(rng, shape, (n_sets + 1, n))).mean(1)
            found[f"range of the next random set, {n_sets} sets"] = held(*range_of_next(drawn[1:]), drawn[0])
        return found

    return many(4000, once)


def of_heads(rng: np.random.Generator, n: int, shape: str, *, mean: float = 0.0) -> Rates:
    """A hundred heads, of which the first has the mean. Six users stand for five, of whom nothing is claimed."""

    def once() -> Rates:
        n_users = max(n, 6)
        shared, own = effects(rng, shape, (n_users, 1)), effects(rng, shape, (n_users, 100))
        effect = mean * 1.25**0.5 * (np.arange(100) == 0)  # in standard deviations
        scores, found = scores_of(effect + 0.5 * shared + own), {}
        corrections: tuple[Correction, ...] = ("max_t", "bh", "bootstrap_t")
        for correction in corrections:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                one = significant_heads(scores, correction=correction, n_flips=1000)
            if mean:
                name, called = f"the one of 100 heads with a mean of {mean:g} sd", one.significant[0, 0]
            else:
                name, called = "any of 100 heads of mean 0", one.significant.any()
            found[f"{correction}: {name} called"] = float(called)
        return found if mean else {**found, "called skewed, 100 heads": float(one.skewed)}

    return many(200, once)


def set_effects(
    taken: np.ndarray, cost: np.ndarray, gain: np.ndarray, n_examples: int = 1, spread: bool = False
) -> SetEffects:
    """Effects of one set and its random sets (the rows below the first), as `[set, user, example]`."""
    n_sets, n_users = taken.shape[:2]
    names = tuple(f"u{index}" for index in range(n_users))

    def both(values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)

    def drawn(values: np.ndarray) -> np.ndarray:
        if not spread:
            return values[1:].mean(2)
        return np.stack([values[1 + draw, :, draw % n_examples] for draw in range(n_sets - 1)])

    own = taken + cost
    manifest = {"spread": spread, "model": {"n_heads": 4}, "sets": {"heads": {name: ["L0H0"] for name in names}}}
    owners = tuple(name for name in names for _ in range(n_examples))
    full = np.repeat(gain, n_examples)
    return SetEffects(
        ("heads",),
        (1,),
        owners,
        tuple(map(str, range(len(owners)))),
        {"own": both(np.full(len(full), 3.0)), "no_profile": both(3 + full)},
        {"own": both(own[0].ravel())[:, None, None], "no_profile": both(cost[0].ravel())[:, None, None]},
        {"own": both(drawn(own))[:, :, None, None], "no_profile": both(drawn(cost))[:, :, None, None]},
        manifest,
    )


def said(found: SetEffects) -> dict[str, bool]:
    verdict = found.verdict()
    return {
        "more": "More of the gain over no profile" in verdict,
        "less": "Less of the gain over no profile" in verdict,
        "costs more": "without a profile more than" in verdict,
    }


def of_verdicts(
    rng: np.random.Generator, n: int, shape: str, *, n_sets: int, sd: float, more: float = 0.0, spread: bool = False
) -> Rates:
    """The chosen set is one more random set, whose effects have the standard deviation `sd` — plus `more`."""
    n_examples = 4 if spread else 1

    def measured() -> np.ndarray:
        users = 0.3 * effects(rng, shape, (1, n, 1)) + 0.2 * effects(rng, shape, (1, n, n_examples))
        sets = sd * effects(rng, shape, (n_sets + 1, 1, 1)) + 0.2 * effects(rng, shape, (n_sets + 1, n, 1))
        return 0.3 + users + sets + 0.1 * effects(rng, shape, (n_sets + 1, n, n_examples))

    def once() -> Rates:
        taken, cost = measured(), measured()
        taken[0] += more
        found = said(set_effects(taken, cost, 3 + 0.4 * rng.normal(size=n), n_examples, spread))
        about = f"sd of sets {sd:g}, {n_sets} sets{', spread over examples' if spread else ''}"
        if more:
            return {f"verdict, {about}, {more:g} more: right": found["more"]}
        alone = crossed_interval((taken[0] - taken[1:]).mean(2))
        found["its interval alone"] = not alone["low"] <= 0 <= alone["high"]
        return {f"verdict, {about}: {name}": claimed for name, claimed in found.items()}

    return many(600, once)


def of_overlaps(rng: np.random.Generator, n: int, shape: str) -> Rates:
    """Pairs of random sets of the same layers: each of 10 layers of 9 heads gives one head."""
    size = (10, 9)

    def random_set() -> HeadSet:
        return HeadSet([(layer, int(rng.integers(size[1]))) for layer in range(size[0])], shape=size)

    def pairs() -> pd.DataFrame:
        sets = {f"s{index}": random_set() for index in range(n)}
        return overlap(sets, n_null=500, seed=int(rng.integers(2**31))).to_frame()

    frame = pd.concat([pairs() for _ in range(30)])
    return {
        "overlap of random sets: p ≤ 0.05": float((frame["p"] <= 0.05).mean()),
        "overlap of random sets: mid_p ≤ 0.05": float((frame["mid_p"] <= 0.05).mean()),
        "overlap of random sets: within null_low … null_high": held(
            frame["null_low"] - frame["jaccard"], frame["null_high"] - frame["jaccard"]
        ),
    }


def of_ceilings(rng: np.random.Generator, n: int, shape: str) -> Rates:
    """All users share one map of 60 heads; each has 8 examples."""

    def once() -> Rates:
        values = 0.5 * rng.normal(size=60) + effects(rng, shape, (n, 8, 60))
        names = [f"u{index}" for index in range(n) for _ in range(8)]
        scores = HeadScores(
            torch.from_numpy(values.reshape(n * 8, 1, 60)),
            example_ids=[str(index) for index in range(len(names))],
            user_ids=names,
        )
        ceiling, _ = ceiling_of(scores, 10, 0, 20, int(rng.integers(2**31)))
        assert ceiling is not None
        return {"user_specific, though users share one map": interval(ceiling["difference"].to_numpy())["low"] > 0}

    return many(200, once)


def cells() -> Iterator[tuple[str, Cell, tuple[str, ...], tuple[int, ...]]]:
    """Name, simulation, shapes and numbers of users."""
    yield "means", of_means, SHAPES, USERS
    yield "ratios", of_ratios, SHAPES, USERS
    yield "differences", of_differences, SHAPES, USERS
    yield "pooled", of_pooled, SHAPES, USERS
    yield "ranges", of_ranges, SHAPES, USERS
    yield "heads", of_heads, SHAPES, USERS
    two = ("normal", "lognormal")
    for n_sets, sd in ((20, 0.0), (20, 0.3), (20, 1.0), (50, 0.3)):
        yield f"verdicts, {n_sets} sets, sd {sd}", partial(of_verdicts, n_sets=n_sets, sd=sd), two, USERS
    yield "verdicts, spread", partial(of_verdicts, n_sets=50, sd=0.3, spread=True), two, USERS
    yield "heads found", partial(of_heads, mean=2.0), two, USERS
    yield "power", partial(of_verdicts, n_sets=20, sd=0.3, more=1.0), two, USERS
    yield "overlaps", of_overlaps, ("normal",), (12,)
    yield "ceilings", of_ceilings, two, USERS


def simulated(out: Path, seed: int) -> pd.DataFrame:
    """Rates by what, shape and users; kept in `out`, a line a cell."""
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    done = {(line["cell"], line["shape"], line["users"], line["seed"]): line["rates"] for line in lines}
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, cell, shapes, users in cells():
        for shape in shapes:
            for n in users:
                key = (name, shape, n, seed)
                if key not in done:
                    rng = np.random.default_rng([seed, crc32(f"{name}|{shape}|{n}".encode())])
                    done[key] = cell(rng, n, shape)
                    line = {"cell": name, "shape": shape, "users": n, "seed": seed, "rates": done[key]}
                    with out.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                rows += [{"what": what, "shape": shape, "users": n, "rate": rate} for what, rate in done[key].items()]
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/coverage.jsonl"), help="kept cells")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found = simulated(arguments.out, arguments.seed)
    table = found.pivot_table(index=["what", "shape"], columns="users", values="rate", sort=False)
    print("| what | effects | " + " | ".join(f"{n} users" for n in table) + " |")
    print("|---|---" + "|---" * len(table.columns) + "|")
    for (what, shape), rates in table.iterrows():
        shown = ["" if np.isnan(rate) else f"{rate:.3f}" for rate in rates]
        print(f"| {what} | {shape} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main()
