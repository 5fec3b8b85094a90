"""What scoring a pair costs beside scoring its two answers by their NLL, one after the other.

    python benchmarks/pairs.py

Ratio of processor time, sides interleaved, prompts included: `score_heads(objective="pair")` against two runs of
`score_heads`, of the users' own texts and of the rejected ones; integrated scores against one other user's profiles, as
by default, and exact ones of zero ablation.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import dps_lens as dps

QUIET = dps.RunConfig(progress=False)
METHODS: dict[str, dict[str, Any]] = {
    "integrated": {},
    "exact": {"ablation": "zero", "against": "no_profile", "method": "exact"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", default="integrated,exact")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    model = dps.load_model()
    own = dps.make_pairs(dps.load_users("probe"))[: arguments.users]
    rejected = [swapped(user) for user in own]
    for name in arguments.methods.split(","):
        settings = {"max_examples": 1, "score_config": dps.ScoreConfig(discovery="labelled"), "run_config": QUIET}
        settings |= METHODS[name]
        ratios, seconds = [], []
        for _ in range(arguments.repeats):
            pair, values = timed(model, [own], objective="pair", **settings)
            apart, each = timed(model, [own, rejected], **settings)
            ratios.append(pair / apart)
            seconds.append(pair / arguments.users)
            difference = float((values[0] - (each[0] - each[1])).abs().max())
        print(
            f"{name}: a pair costs {statistics.median(ratios):.2f} of its answers apart, "
            f"{statistics.median(seconds):.1f} s an example; largest difference {difference:.1e} nats per token"
        )


def swapped(user: dps.User) -> dps.User:
    """The same user, asked for what is rejected."""
    examples = (
        replace(one, reference=one.rejected[0], rejected=(one.reference, *one.rejected[1:])) for one in user.examples
    )
    return replace(user, examples=tuple(examples))


def timed(model: dps.HookedModel, groups: Sequence[Sequence[dps.User]], **settings: Any) -> tuple[float, list[Any]]:
    """Processor seconds, and the scores of every group."""
    begun = time.process_time()
    values = [dps.score_heads(model, users, **settings).values for users in groups]
    return time.process_time() - begun, values


if __name__ == "__main__":
    main()
