"""How well a text is this user's: the metrics of LaMP and LongLaMP, style, fluency, and the benchmark table."""

from dps_lens.evaluation.bench import evaluate
from dps_lens.evaluation.metrics import macro_f1, meteor, metrics_of, rouge, score_example
from dps_lens.evaluation.result import Evaluation
from dps_lens.evaluation.style import StyleMeasure

__all__ = ["Evaluation", "StyleMeasure", "evaluate", "macro_f1", "meteor", "metrics_of", "rouge", "score_example"]
