"""Finders by name."""

from dps_lens.errors import ScoreError
from dps_lens.finding.conditional import Conditional
from dps_lens.finding.finder import Finder
from dps_lens.finding.gates import Gates
from dps_lens.finding.greedy import Greedy
from dps_lens.finding.rank import Rank
from dps_lens.literals import FindMethod

FINDERS: dict[str, type[Finder]] = {one.name: one for one in (Rank, Greedy, Conditional, Gates)}


def find_finder(asked: Finder | FindMethod) -> Finder:
    """A finder by name, or the object itself.

    Raises:
        ScoreError: the name is unknown.
    """
    if isinstance(asked, Finder):
        return asked
    if asked not in FINDERS:
        raise ScoreError(f"find_heads: method {asked!r} is unknown; use one of {', '.join(FINDERS)}, or a Finder")
    return FINDERS[asked]()
