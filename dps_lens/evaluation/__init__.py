"""How well a text is this user's: metrics, likelihood under steering, and the benchmark table."""

from dps_lens.evaluation.ablated_texts import AblatedTexts, ablated_generation
from dps_lens.evaluation.bench import EvaluateConfig
from dps_lens.evaluation.endpoint import Endpoint
from dps_lens.evaluation.grid import SteeredText, SteeringGrid, steering_grid
from dps_lens.evaluation.judge import Verdicts, judge
from dps_lens.evaluation.likelihood import steering_sweep
from dps_lens.evaluation.metrics import METRICS, Metric
from dps_lens.evaluation.result import Evaluation
from dps_lens.evaluation.run import evaluate
from dps_lens.evaluation.sweep import SteeringSweep

__all__ = [
    "METRICS",
    "AblatedTexts",
    "Endpoint",
    "EvaluateConfig",
    "Evaluation",
    "Metric",
    "SteeredText",
    "SteeringGrid",
    "SteeringSweep",
    "Verdicts",
    "ablated_generation",
    "evaluate",
    "judge",
    "steering_grid",
    "steering_sweep",
]
