"""The metrics of LaMP (arXiv 2304.11406) and LongLaMP (arXiv 2407.11016).

Closed tasks have accuracy and macro-F1, LaMP-3 the errors of a number, the others ROUGE and METEOR. An answer scores as
in the official scripts; means are of user means where the scripts take all answers, macro-F1 and RMSE are over all.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from dps_lens.data import Example
from dps_lens.data.tasks import Task
from dps_lens.errors import EvaluationError

if TYPE_CHECKING:
    import pandas

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

OVER_ALL = ("RMSE", "macro-F1")
"""Metrics of many answers; one answer has none."""

_SCORES = (1.0, 5.0)


def rouge(reference: str, text: str) -> dict[str, float]:
    """F-measures of ROUGE-1 and ROUGE-L by `rouge_score`, without stemming.

    >>> rouge("the cat sat", "the cat")["ROUGE-L"]
    0.8
    """
    found = _rouge().score(reference.strip(), text.strip())
    return {"ROUGE-1": float(found["rouge1"].fmeasure), "ROUGE-L": float(found["rougeL"].fmeasure)}


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=False)


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


def metrics_of(task: Task) -> tuple[str, ...]:
    """What is measured on a task on this machine; the first is what settings are chosen by."""
    return tuple(name for name in all_metrics(task) if name != "METEOR" or has_meteor())


def all_metrics(task: Task) -> tuple[str, ...]:
    """What can be measured on a task, METEOR included."""
    if task.name == "lamp-3":
        return ("MAE", "RMSE")
    if task.name in LABELS:
        return ("accuracy", "macro-F1")
    return ("ROUGE-L", "ROUGE-1", "METEOR")


def lower_is_better(metric: str) -> bool:
    """Errors, against scores."""
    return metric in ("MAE", "RMSE")


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


def score_example(example: Example, text: str, *, synonyms: bool = True) -> dict[str, float]:
    """What one answer contributes to the metrics of its task; METEOR, which is slow, if `synonyms`.

    RMSE and macro-F1 exist for many answers only (`summary_of`). An answer of LaMP-3 that is no number counts as
    whichever of 1 and 5 is farther from the truth.
    """
    reference = example.reference.strip()
    if example.task.name == "lamp-3":
        truth = float(reference)
        return {"MAE": abs(_number(text, truth) - truth)}
    if "accuracy" in metrics_of(example.task):
        return {"accuracy": float(text.strip() == reference)}
    found = rouge(reference, text)
    return found | ({"METEOR": meteor(reference, text)} if synonyms and has_meteor() else {})


def _number(text: str, truth: float) -> float:
    try:
        found = float(text.strip())
    except ValueError:
        found = math.nan
    return found if math.isfinite(found) else max(_SCORES, key=lambda end: abs(end - truth))


def summary_of(metric: str, task: Task) -> "Callable[[pandas.DataFrame], float]":
    """How rows of examples (`user`, `text`, `reference`, scores) become one number: the mean of user means.

    RMSE and macro-F1 are taken over all rows, as in the official scripts.
    """
    if metric == "RMSE":
        return lambda rows: float((rows["MAE"].to_numpy() ** 2).mean() ** 0.5)
    if metric == "macro-F1":
        return lambda rows: macro_f1(rows["reference"].tolist(), rows["text"].tolist(), LABELS[task.name])
    return lambda rows: float(rows.groupby("user", sort=False)[metric].mean().mean())


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


def jackknife(
    statistic: "Callable[[pandas.DataFrame], float]", rows: "pandas.DataFrame", level: float = 0.95
) -> dict[str, float]:
    """A statistic of all rows with a Student's t interval from leaving out one user at a time.

    For the mean of user means this is the t interval of `intervals.interval`.
    """
    from scipy.stats import t as student

    mean, users = statistic(rows) if len(rows) else math.nan, list(dict.fromkeys(rows["user"]))
    n = len(users)
    if n < 2:
        return {"mean": mean, "low": math.nan, "high": math.nan}
    without = np.array([statistic(rows[rows["user"] != user]) for user in users])
    pseudo = n * mean - (n - 1) * without
    half = float(student.ppf(0.5 + level / 2, n - 1) * pseudo.std(ddof=1) / n**0.5)
    return {"mean": mean, "low": mean - half, "high": mean + half}
