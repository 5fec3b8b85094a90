"""Metrics on hand-checked cases, against rouge_score and nltk, and against their formulas written out."""

import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from dps_lens.data.tasks import TASKS
from dps_lens.errors import EvaluationError
from dps_lens.evaluation import Evaluation, metrics
from dps_lens.evaluation.metrics import LABELS, METRICS, find_metrics, macro_f1, meteor, metrics_of, rouge, score_text
from dps_lens.evaluation.style import StyleMeasure, written_by
from dps_lens.stats.intervals import interval, jackknife


def scored(task, reference, text):
    return score_text(metrics_of(TASKS[task]), reference, text)


def test_rouge_by_hand_and_by_its_library():
    reference, text = "The running cats sat on the mat.", "the runs cat sat mat"
    # Five words of seven and five: the, sat, mat match; no stemmer joins cats and cat.
    found = rouge(reference, text)
    assert found["ROUGE-1"] == pytest.approx(2 * (3 / 5) * (3 / 7) / (3 / 5 + 3 / 7))
    assert found["ROUGE-L"] == pytest.approx(found["ROUGE-1"])
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    for reference, text in (("a b c d", "d c b a"), ("one two", ""), ("Jobs rise 3%", "jobs rise by 3 %")):
        by_library = scorer.score(reference, text)
        found = rouge(reference, text)
        assert found["ROUGE-1"] == by_library["rouge1"].fmeasure
        assert found["ROUGE-L"] == by_library["rougeL"].fmeasure


@pytest.mark.parametrize(
    ("reference", "text", "error"),
    [("4", "3", 1.0), ("4", " 4.5\n", 0.5), ("2", "great", 3.0), ("4", "", 3.0), ("3", "nan", 2.0), ("1", "inf", 4.0)],
)
def test_an_answer_that_is_no_number_counts_as_the_farther_end(reference, text, error):
    assert scored("lamp-3", reference, text) == {"MAE": error}


def test_accuracy_is_of_equal_answers():
    assert scored("lamp-2", "comedy", " comedy \n") == {"accuracy": 1.0}
    assert scored("lamp-2", "comedy", "Comedy") == {"accuracy": 0.0}
    assert scored("lamp-2", "comedy", "a comedy") == {"accuracy": 0.0}
    assert scored("lamp-1", "[2]", "[2]") == {"accuracy": 1.0}


def test_metrics_are_found_by_name_and_refused_by_theirs():
    own = metrics.Metric("length", lambda reference, text: float(len(text)))
    assert find_metrics(["ROUGE-L", own]) == (METRICS["ROUGE-L"], own)
    with pytest.raises(EvaluationError, match="metric 'chrF' is unknown; use some of accuracy"):
        find_metrics(["chrF"])
    with pytest.raises(EvaluationError, match="'ROUGE-L' stands twice"):
        find_metrics(["ROUGE-L", "ROUGE-L"])
    with pytest.raises(EvaluationError, match="'style' stands twice, or is measured anyway"):
        find_metrics(["style"])


def test_macro_f1_by_hand():
    labels = ("x", "y", "z")
    # x: 2 right, 1 of them missed; y: 1 of 2 answers right; z never occurs; one answer is no label.
    references, texts = ["x", "x", "y", "y"], ["x", "y", "y ", "nothing"]
    f1_x, f1_y = 2 * 1 * 0.5 / 1.5, 2 * 0.5 * 0.5 / 1.0
    assert macro_f1(references, texts, labels) == pytest.approx((f1_x + f1_y + 0) / 3)
    assert macro_f1(["x"], ["x"], ("x",)) == 1.0


def test_macro_f1_and_rmse_are_taken_over_all_answers():
    rows = pd.DataFrame({"user": ["a", "a", "b"], "MAE": [1.0, 1.0, 3.0]})
    assert METRICS["RMSE"].of(rows, TASKS["lamp-3"]) == pytest.approx(math.sqrt((1 + 1 + 9) / 3))
    assert METRICS["MAE"].of(rows, TASKS["lamp-3"]) == pytest.approx((1 + 3) / 2), "of users, each counting once"
    rows = pd.DataFrame({"user": ["a", "b"], "reference": ["[1]", "[2]"], "text": ["[1]", "[1]"]})
    assert METRICS["macro-F1"].of(rows, TASKS["lamp-1"]) == pytest.approx((2 / 3 + 0) / 2)
    assert len(LABELS["lamp-2"]) == 15


def test_leaving_out_users_gives_the_t_interval_of_a_mean():
    rng = np.random.default_rng(0)
    values = rng.normal(size=9)
    rows = pd.DataFrame({"user": [f"u{index}" for index in range(9)], "x": values})
    found = jackknife(lambda of: float(of.groupby("user")["x"].mean().mean()), rows)
    assert found == pytest.approx(interval(values))
    alone = jackknife(lambda of: float(of["x"].mean()), rows[:1])
    assert math.isnan(alone["low"])


def test_meteor_needs_wordnet(monkeypatch):
    from nltk.translate.meteor_score import single_meteor_score

    if not metrics.has_meteor():
        with pytest.raises(EvaluationError, match="nltk.downloader wordnet"):
            meteor("a cat", "a cat")
        assert "METEOR" not in [metric.name for metric in metrics_of(TASKS["lamp-4"])]
        assert "METEOR" not in scored("lamp-4", "a cat", "a cat")

    class NoWordnet:
        """Synonyms of nothing: exact words and stems alone match."""

        def synsets(self, word):
            return []

    monkeypatch.setattr(metrics, "_wordnet", NoWordnet)
    words = (["the", "cat", "sat", "."], ["a", "cat", "was", "sitting", "."])
    assert meteor("the cat sat.", "a cat was sitting.") == single_meteor_score(*words, wordnet=NoWordnet())
    assert [metric.name for metric in metrics_of(TASKS["lamp-4"])] == ["ROUGE-L", "ROUGE-1", "METEOR"]


def test_a_table_made_with_wordnet_is_read_without():
    rows = pd.DataFrame([{"user": "u", "example": "e", "method": "rag", "METEOR": 0.5, "ROUGE-L": 0.1}])
    table = Evaluation(rows, pd.DataFrame(), pd.DataFrame(), TASKS["lamp-4"], {"metrics": ["ROUGE-L", "METEOR"]})
    assert table.metrics == ("ROUGE-L", "METEOR")


def grams(text):
    """2- to 4-grams of characters within words, each word between two spaces."""
    found = Counter()
    for word in text.split():
        padded = f" {word} "
        for n in range(2, 5):
            # A word shorter than n counts once as it is.
            for begin in range(max(len(padded) - n, 0) + 1):
                found[padded[begin : begin + n]] += 1
            if len(padded) <= n:
                break
    return found


def test_style_follows_its_formula(probe):
    users = list(probe[:3])
    own = [written_by(user) for user in users]
    texts = [grams(text) for texts in own for text in texts]
    seen = Counter(gram for text in texts for gram in text)

    def weights(text):
        raw = {
            g: (1 + math.log(n)) * (math.log((1 + len(texts)) / (1 + seen[g])) + 1)
            for g, n in text.items()
            if g in seen
        }
        norm = math.sqrt(sum(value**2 for value in raw.values()))
        return {gram: value / norm for gram, value in raw.items()}

    def cosine(text, others):
        centre = Counter()
        for other in others:
            for gram, value in weights(grams(other)).items():
                centre[gram] += value / len(others)
        norm = math.sqrt(sum(value**2 for value in centre.values()))
        return sum(value * centre[gram] for gram, value in weights(grams(text)).items()) / norm

    measure, text = StyleMeasure(users), "A quiet morning, and the LAMP went out!"
    for index, user in enumerate(users):
        others = [cosine(text, texts) for other, texts in enumerate(own) if other != index]
        assert measure(user.id, text) == pytest.approx(cosine(text, own[index]) - sum(others) / len(others), abs=1e-9)


def test_users_are_nearer_to_their_own_texts(probe):
    measure = StyleMeasure(probe)
    differences = [measure(user.id, e.reference) for user in probe for e in user.examples]
    assert np.mean(differences) > 0.01
    assert math.isnan(StyleMeasure(probe[:1])(probe[0].id, "text"))


def test_texts_are_taken_for_those_of_who_wrote_them(probe):
    """By a logistic regression of scikit-learn on the vectorizer's weights, and better than by chance."""
    measure = StyleMeasure(probe)
    texts = [(user.id, text) for user in probe for text in written_by(user)]
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), lowercase=False, sublinear_tf=True)
    pipeline = make_pipeline(vectorizer, LogisticRegression(C=100.0, class_weight="balanced", tol=1e-8))
    own, others = [], []
    for user in probe:
        pipeline.fit([text for _, text in texts], [owner == user.id for owner, _ in texts])
        for example in user.examples:
            (found,) = pipeline.predict_proba([example.reference])[:, 1]
            assert measure.author(user.id, example.reference) == pytest.approx(found, abs=0.01)
            own.append(found)
        others += [measure.author(user.id, example.reference) for other in probe if other is not user
                   for example in other.examples]  # fmt: skip
    assert np.mean(own) > 1.5 * np.mean(others)
    assert math.isnan(StyleMeasure(probe[:1]).author(probe[0].id, "text"))


def test_style_is_measured_on_texts_that_no_example_asks_for(probe):
    for user in probe:
        assert not {e.reference for e in user.examples} & {*written_by(user)}


@pytest.mark.parametrize(
    ("reference", "text", "one", "longest"),
    [
        ("今天天气很好", "今天很好", 0.8, 0.8),  # 4 of 4 characters, 4 of 6
        ("今天天气很好", "很好今天", 0.8, 0.4),  # two of them in order
        ("Мама мыла раму.", "мама раму", 0.8, 0.8),
        ("Été à Paris", "été", 0.5, 0.5),
        ("the cat sat", "The CAT", 0.8, 0.8),
        ("…", "!", 0.0, 0.0),
    ],
)
def test_rouge_of_any_script(reference, text, one, longest):
    found = rouge(reference, text, any_script=True)
    assert (found["ROUGE-1"], found["ROUGE-L"]) == pytest.approx((one, longest))


def test_texts_that_are_not_latin_are_measured_in_words_of_their_script():
    task, names = TASKS["lamp-4"], ["ROUGE-L (any script)", "ROUGE-1 (any script)"]
    assert [metric.name for metric in metrics_of(task, ["今天天气很好", "rain"])] == names
    assert score_text(metrics_of(task, ["Мама"]), "Мама мыла раму.", "мама раму") == dict.fromkeys(
        names, pytest.approx(0.8)
    )
    assert metrics_of(task, ["Beyoncé sings again " * 3 + "and nobody minds the rain at all, as they say"])[0].name == (
        "ROUGE-L (any script)"
    )
    assert metrics_of(task, ["Beyoncé"] + ["rain in town and no umbrella"] * 20) == metrics_of(task)
    assert metrics_of(TASKS["lamp-3"], ["五"]) == metrics_of(TASKS["lamp-3"])
