"""The words that settings are chosen from, and defaults, said once for the library, the command line and its help."""

from typing import Literal, TypeAlias, get_args

Positions: TypeAlias = Literal["all", "response", "profile"]
"""Where heads are edited: everywhere, from the last prompt token on, or at the profile's tokens."""

Against: TypeAlias = Literal["no_profile", "other_user"]
"""What the own profile is compared with."""

Direction: TypeAlias = Literal["noising", "denoising"]
"""Of a patch: the counterfactual run's z into the profile run, or the reverse."""

ScoreAgainst: TypeAlias = Literal["other_user", "no_profile", "both", "other_user-no_profile", "no_profile-other_user"]
"""What heads are scored against: one of the two, their mean, or what one shows beyond the other."""

ScoreMethod: TypeAlias = Literal["integrated", "exact", "attribution", "screened"]
FindMethod: TypeAlias = Literal["rank", "greedy", "conditional", "gates"]
Counterfactual: TypeAlias = Literal["other_user", "no_profile", "both"]
"""The runs that z is patched from, and into, where sets of heads are looked for."""
Quantity: TypeAlias = Literal["necessity", "sufficiency", "task_cost", "neutral_cost"]
"""What a set does: takes from the own run, brings to the counterfactual one, costs without a profile, on other text."""

MeasuredOn: TypeAlias = Literal["evaluation", "discovery"]
"""The users' texts that are held out, or those that choose."""
VectorAgainst: TypeAlias = Literal["other_user", "no_profile", "generic"]
"""What head vectors are the difference to; the last one is a generic answer in place of the user's."""
Recipe: TypeAlias = Literal["difference", "probe", "persona"]
"""How a head vector is made of the two kinds of z."""

ProfileIn: TypeAlias = Literal["message", "system", "turn"]
"""Where a prompt shows the profile: before the task, in the system turn, or in an earlier message of the user's."""

Discovery: TypeAlias = Literal["history", "labelled"]
Select: TypeAlias = Literal["global", "user"]
"""Heads by other users, or by each user's own examples."""

POSITIONS: tuple[Positions, ...] = get_args(Positions)
AGAINST: tuple[Against, ...] = get_args(Against)
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
SCORE_AGAINST: tuple[ScoreAgainst, ...] = get_args(ScoreAgainst)
METHODS: tuple[ScoreMethod, ...] = get_args(ScoreMethod)
VECTOR_AGAINST: tuple[VectorAgainst, ...] = get_args(VectorAgainst)
RECIPES: tuple[Recipe, ...] = get_args(Recipe)
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
COUNTERFACTUALS: tuple[Counterfactual, ...] = get_args(Counterfactual)

CONDITIONS = ("own", *AGAINST, "neutral")
"""What a prompt shows; neutral text has nothing to do with users."""

PATCHED = ("noising_other", "denoising_other")
"""Heads patched between two runs: another user's z into the own run, or the reverse."""

MAX_TASK_COST, MAX_NEUTRAL_COST = 0.2, 0.05
"""Bounds of `find_heads`, nats per token, where nobody asks for others: those that finders were compared with
(docs/finders.md)."""
