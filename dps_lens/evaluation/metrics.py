"""What an answer is worth: the metrics of LaMP (arXiv 2304.11406) and LongLaMP (arXiv 2407.11016), and any of your own.

An answer scores as in the official scripts; means are of user means where the scripts take all answers, macro-F1 and
RMSE are over all.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from dps_lens.data import Example
from dps_lens.data.tasks import Task
from dps_lens.data.words import foreign_share, script_words
from dps_lens.errors import EvaluationError

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Metric:
    """What answers are measured by.

    Attributes:
        name: of its column.
        function: `(reference, answer) → value`; None where only many answers have one, or a model measures it.
        better: which direction is.
        summary: how rows of answers (`user`, `text`, `reference`, scores) become one number; the mean of user means by
            default.
        slow: left out while settings are chosen.
        ranks: it measures how likely the answers of a pair or a choice are, and not a text that is written.
    """

    name: str
    function: Callable[[str, str], float] | None
    better: Literal["higher", "lower"] = "higher"
    summary: "Callable[[pandas.DataFrame, Task], float] | None" = None
    slow: bool = False
    ranks: bool = False

    @property
    def sign(self) -> int:
        """1 where higher is better, else −1."""
        return 1 if self.better == "higher" else -1

    def of(self, rows: "pandas.DataFrame", task: Task) -> float:
        """One number of all rows."""
        if self.summary is not None:
            return self.summary(rows, task)
        return float(rows.groupby("user", sort=False)[self.name].mean().mean())


MetricLike: TypeAlias = Metric | str

LABELS = {
    "lamp-1": ("[1]", "[2]"),
    "lamp-2": (
        "sci-fi",
        "based on a book",
        "comedy",
        "action",
        "twist ending",
        "dystopia",
        "dark comedy",
        "classic",
        "psychology",
        "fantasy",
        "romance",
        "thought-provoking",
        "social commentary",
        "violence",
        "true story",
    ),
}
"""Answers of the classification tasks; what is none of them counts as wrong."""

_SCORES = (1.0, 5.0)
_LIBRARIES = ("rouge_score", "nltk", "scikit-learn", "numpy")
_FOREIGN = 0.01


def accuracy(reference: str, text: str) -> float:
    """1 for the right answer, letter by letter, as in LaMP's script."""
    return float(text.strip() == reference.strip())


def absolute_error(reference: str, text: str) -> float:
    """Of a number; an answer that is none counts as whichever of 1 and 5 is farther from the truth."""
    truth = float(reference)
    return abs(_number(text, truth) - truth)


def _number(text: str, truth: float) -> float:
    try:
        found = float(text.strip())
    except ValueError:
        found = math.nan
    return found if math.isfinite(found) else max(_SCORES, key=lambda end: abs(end - truth))


def rouge(reference: str, text: str, *, any_script: bool = False) -> dict[str, float]:
    """F-measures of ROUGE-1 and ROUGE-L by `rouge_score`, without stemming.

    The official words are runs of a–z and 0–9; everything else is dropped.

    Args:
        reference: what the user wrote.
        text: the answer.
        any_script: take words of any script instead, and single characters where a script knows no spaces.

    >>> rouge("the cat sat", "the cat")["ROUGE-L"]
    0.8
    >>> rouge("我爱你", "我爱")["ROUGE-L"], rouge("我爱你", "我爱", any_script=True)["ROUGE-L"]
    (0.0, 0.8)
    """
    found = _rouge(any_script).score(reference.strip(), text.strip())
    return {"ROUGE-1": float(found["rouge1"].fmeasure), "ROUGE-L": float(found["rougeL"].fmeasure)}


@cache
def _rouge(any_script: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import Tokenizer

    class ScriptTokenizer(Tokenizer):
        def tokenize(self, text: str) -> list[str]:
            return script_words(text)

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=False, tokenizer=ScriptTokenizer() if any_script else None)


def meteor(reference: str, text: str) -> float:
    """METEOR by nltk, on words as nltk splits a line; the official scripts split sentences first.

    Raises:
        EvaluationError: there is no WordNet on this machine; says how to get it.
    """
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.translate.meteor_score import meteor_score

    wordnet, words = _wordnet(), NLTKWordTokenizer()
    return float(meteor_score([words.tokenize(reference)], words.tokenize(text), wordnet=wordnet))


@cache
def _wordnet() -> Any:
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError:
        raise EvaluationError("METEOR needs WordNet; run: python -m nltk.downloader wordnet") from None
    return wordnet


def has_meteor() -> bool:
    """Whether METEOR can be computed here."""
    try:
        _wordnet()
    except EvaluationError:
        return False
    return True


def macro_f1(references: Sequence[str], texts: Sequence[str], labels: Sequence[str]) -> float:
    """Mean F1 of all labels; an answer that is none of them is wrong, and a label that never occurs has 0.

    Args:
        references: the right answers.
        texts: the answers.
        labels: the task's answers.
    """
    from sklearn.metrics import f1_score

    known = {label: index for index, label in enumerate(labels)}
    truth, found = ([known.get(text.strip(), -1) for text in of] for of in (references, texts))
    return float(f1_score(truth, found, labels=range(len(known)), average="macro", zero_division=0))


def _over_all_f1(rows: "pandas.DataFrame", task: Task) -> float:
    return macro_f1(rows["reference"].tolist(), rows["text"].tolist(), LABELS[task.name])


def _root_mean_square(rows: "pandas.DataFrame", task: Task) -> float:
    return float((rows["MAE"].to_numpy() ** 2).mean() ** 0.5)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", accuracy),
        Metric("macro-F1", None, summary=_over_all_f1),
        Metric("MAE", absolute_error, "lower"),
        Metric("RMSE", None, "lower", summary=_root_mean_square),
        Metric("ROUGE-L", lambda reference, text: rouge(reference, text)["ROUGE-L"]),
        Metric("ROUGE-1", lambda reference, text: rouge(reference, text)["ROUGE-1"]),
        Metric("ROUGE-L (any script)", lambda reference, text: rouge(reference, text, any_script=True)["ROUGE-L"]),
        Metric("ROUGE-1 (any script)", lambda reference, text: rouge(reference, text, any_script=True)["ROUGE-1"]),
        Metric("METEOR", meteor, slow=True),
        Metric("margin", None, ranks=True),
        Metric("preference accuracy", None, ranks=True),
        Metric("chance", None, ranks=True),
        Metric("probability", None, ranks=True),
        Metric("overconfidence", None, "lower", ranks=True),
        Metric("style", None),
        Metric("author", None),
        Metric("NLL", None, "lower"),
        Metric("repeated", None, "lower"),
        Metric("copied", None, "lower"),
        Metric("tokens", None),
        Metric("KL", None, "lower"),
    )
}
"""By name; which direction is better is said here and nowhere else."""

OF_EVERY_TASK = ("style", "author", "NLL", "repeated", "copied", "tokens")
"""Measured of every answer, whatever the task; closed tasks have no style and no author."""


def metric_libraries(*more: str) -> dict[str, str]:
    """Versions of what measures answers, and of what else makes them; for a manifest."""
    found = {}
    for name in (*_LIBRARIES, *more):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def find_metrics(asked: Iterable[MetricLike]) -> tuple[Metric, ...]:
    """Metrics by name, and those of your own.

    Raises:
        EvaluationError: a name is unknown, or stands twice.
    """
    metrics = tuple(one if isinstance(one, Metric) else _named(one) for one in asked)
    names = [metric.name for metric in metrics]
    for metric in metrics:
        if metric.summary is not None and METRICS.get(metric.name) is not metric:
            raise EvaluationError(
                f"evaluate: metric {metric.name!r} has a summary of its own; register it, so that a table that is read "
                "again finds it: dps_lens.evaluation.METRICS[metric.name] = metric"
            )
    if twice := [name for name in names if names.count(name) > 1 or name in OF_EVERY_TASK]:
        raise EvaluationError(f"evaluate: metric {twice[0]!r} stands twice, or is measured anyway")
    return metrics


def _named(name: str) -> Metric:
    if name not in METRICS:
        raise EvaluationError(f"metric {name!r} is unknown; use some of {', '.join(METRICS)}, or a Metric of your own")
    return METRICS[name]


def metrics_of(task: Task, references: Iterable[str] = (), *, ranked: bool = False) -> tuple[Metric, ...]:
    """What is measured on a task on this machine; the first is what settings are chosen by.

    Where examples have rejected answers, `ranked`, that is the margin of `rank_answers`, under each method. Where over
    one letter in a hundred of the references is not a–z, the words of the official ROUGE, and METEOR's, are not those
    of the texts: ROUGE then takes words of any script, and there is no METEOR.
    """
    names: tuple[str, ...]
    if task.name == "lamp-3":
        names = ("MAE", "RMSE")
    elif task.name in LABELS:
        names = ("accuracy", "macro-F1")
    elif task.closed:
        names = ("accuracy",)
    elif foreign_share(references) > _FOREIGN:
        names = ("ROUGE-L (any script)", "ROUGE-1 (any script)")
    else:
        names = ("ROUGE-L", "ROUGE-1", *(("METEOR",) if has_meteor() else ()))
    ranks = ("margin", "preference accuracy", "chance", "overconfidence") if ranked else ()
    return tuple(METRICS[name] for name in (*ranks, *names))


def score_text(metrics: Iterable[Metric], reference: str, text: str, *, slow: bool = True) -> dict[str, float]:
    """What one answer contributes to each metric."""
    wanted = (metric for metric in metrics if slow or not metric.slow)
    return {metric.name: metric.function(reference.strip(), text) for metric in wanted if metric.function is not None}


def check_reference(example: Example) -> None:
    """Refuse an example whose answer is not of its task's form.

    Raises:
        EvaluationError: names the example.
    """
    reference = example.reference.strip()
    if example.task.name == "lamp-3":
        try:
            float(reference)
        except ValueError:
            raise EvaluationError(f"evaluate: example {example.id!r}: its answer {reference!r} is no number") from None
    known = LABELS.get(example.task.name)
    if known and reference not in known:
        raise EvaluationError(
            f"evaluate: example {example.id!r}: its answer {reference!r} is none of {', '.join(known)}"
        )
