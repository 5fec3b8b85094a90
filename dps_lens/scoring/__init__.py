"""Scores of heads: clean runs, what ablations change, and how that becomes a score."""

from dps_lens.scoring.answers import AnswersRun, ExampleRun, answers_of, example_run, nll_run
from dps_lens.scoring.clean_run import CleanRun, single_heads
from dps_lens.scoring.objectives import (
    NLL,
    AnswersObjective,
    Choice,
    Objective,
    ObjectiveLike,
    Pair,
    find_objective,
    objective_of,
)
from dps_lens.scoring.pcs import score_heads
from dps_lens.scoring.sweep import ScoreConfig

__all__ = [
    "NLL",
    "AnswersObjective",
    "AnswersRun",
    "Choice",
    "CleanRun",
    "ExampleRun",
    "Objective",
    "ObjectiveLike",
    "Pair",
    "ScoreConfig",
    "answers_of",
    "example_run",
    "find_objective",
    "nll_run",
    "objective_of",
    "score_heads",
    "single_heads",
]
