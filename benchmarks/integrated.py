"""What integrated scores cost beside exact ones, and how long those of a dozen users take.

    python benchmarks/integrated.py

Ratios of processor time, one example of each of a few users, all sides interleaved; then the wall time of 12 probe
users with 2 examples each, towards one other user, towards two, and towards one and no profile.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Mapping
from typing import Any

import dps_lens as dps
from dps_lens.literals import ScoreAgainst

QUIET = dps.RunConfig(progress=False)
SIDES: dict[str, Mapping[str, Any]] = {
    "zero, own - no profile, exact": {"ablation": "zero", "against": "no_profile", "method": "exact"},
    "patch, one donor, exact": {"method": "exact", "score_config": dps.ScoreConfig(n_donors=1)},
    "patch, one donor, integrated": {"score_config": dps.ScoreConfig(n_donors=1)},
    "patch, two donors, integrated": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    model, users = dps.load_model(), dps.load_users("probe")
    times: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(arguments.repeats):
        for name, options in SIDES.items():
            begun = time.process_time()
            dps.score_heads(model, users[: arguments.users], max_examples=1, run_config=QUIET, **options)
            times[name].append(time.process_time() - begun)
    base = times["patch, one donor, integrated"]
    for name, each in times.items():
        ratio = statistics.median(a / b for a, b in zip(each, base, strict=True))
        print(f"{name:32} {ratio:6.2f}   {statistics.median(each) / arguments.users:6.1f} s an example")
    towards: list[tuple[ScoreAgainst, int]] = [("other_user", 1), ("other_user", 2), ("both", 1)]
    for against, donors in towards:
        begun = time.monotonic()
        config = dps.ScoreConfig(n_donors=donors)
        dps.score_heads(model, users[:12], max_examples=2, against=against, score_config=config, run_config=QUIET)
        print(f"12 users x 2 examples, {against}, {donors} donor(s): {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
