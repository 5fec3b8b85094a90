"""How well a text is this user's: the metrics of LaMP and LongLaMP, style, fluency, and the benchmark table."""

from dps_lens.evaluation.endpoint import Endpoint
from dps_lens.evaluation.grid import SteeredText, SteeringGrid, steering_grid
from dps_lens.evaluation.judge import Verdicts, judge
from dps_lens.evaluation.metrics import macro_f1, meteor, metrics_of, rouge, score_example
from dps_lens.evaluation.result import Evaluation
from dps_lens.evaluation.run import evaluate
from dps_lens.evaluation.style import StyleMeasure

__all__ = [
    "Endpoint",
    "Evaluation",
    "SteeredText",
    "SteeringGrid",
    "StyleMeasure",
    "Verdicts",
    "evaluate",
    "judge",
    "macro_f1",
    "meteor",
    "metrics_of",
    "rouge",
    "score_example",
    "steering_grid",
]
