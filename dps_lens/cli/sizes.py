"""How much 'demo' measures."""

from typing import Literal, NamedTuple

from dps_lens.cli.report import SHOWN


class Size(NamedTuple):
    """How much is measured."""

    examples: int
    held_out: int
    donors: int
    n_random: int
    gammas: tuple[float, ...]
    shown_users: int
    method: Literal["rank", "gates"]
    n_bootstraps: int
    neutral_words: int | None
    maps: bool


# 19 random sets are the fewest of which a claim at 95% can be made.
QUICK = Size(
    examples=1,
    held_out=1,
    donors=1,
    n_random=19,
    gammas=(1.0, 2.0),
    shown_users=3,
    method="rank",
    n_bootstraps=0,
    neutral_words=24,
    maps=False,
)
FULL = Size(
    examples=2,
    held_out=2,
    donors=2,
    n_random=20,
    gammas=(0.5, 1.0, 2.0),
    shown_users=SHOWN,
    method="gates",
    n_bootstraps=9,
    neutral_words=None,
    maps=True,
)
