"""What the experiments share: configs, decisions, and statistics of maps of users."""

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from scipy.stats import sem, t

from dps_lens.errors import DataError
from experiments.lib.halves import agreement, halves, held_out_share, jackknife, leaving_quarters, share, top, without
from experiments.lib.harness import Config, decide, located, markdown


def test_unknown_fields_and_missing_files_are_refused(monkeypatch, tmp_path):
    with pytest.raises(ValidationError, match="extra"):
        Config(nothing=1)
    monkeypatch.setenv("DPS_LENS_DATA", str(tmp_path))
    with pytest.raises(DataError, match="DPS_LENS_DATA"):
        located("govblog/lamp4_questions.json")
    (tmp_path / "posts.jsonl").write_text("{}")
    assert located("posts.jsonl") == str(tmp_path / "posts.jsonl")
    assert located("probe") == "probe"


def test_an_interval_decides():
    assert decide(0.1, 0.2) == "supported"
    assert decide(-0.2, 0.0) == "not supported"
    assert decide(-0.1, 0.1) == "undecided"


def test_a_table_puts_bounds_behind_their_value():
    frame = pd.DataFrame([{"name": "a", "mean": -0.5, "low": -1.0, "high": 0.0, "p": 0.001}])
    assert markdown(frame).splitlines()[0] == "| name | mean | p |"
    assert markdown(frame).splitlines()[2] == "| a | −0.500 (−1.000 to 0.000) | 0.0010 |"


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=12)
    found = jackknife(lambda kept: float(values[kept].mean()), 12)
    assert found["high"] - found["mean"] == pytest.approx(t.ppf(0.975, 11) * sem(values))


def test_leaving_out_quarters_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).uniform(0.3, 0.7, size=40)
    found = leaving_quarters(lambda kept: float(values[kept].mean()), 40, 4000, 0)
    assert found["high"] - found["mean"] == pytest.approx(t.ppf(0.975, 39) * sem(values), rel=0.05)
    assert found["mean"] == pytest.approx(values.mean())


def test_halves_are_disjoint_and_swapped():
    splits = halves(7, 3, 0)
    assert len(splits) == 6
    for (one, two), (again, other) in zip(splits[::2], splits[1::2], strict=True):
        assert sorted(one + two) == list(range(7))
        assert (again, other) == (two, one)
    assert all(3 not in one + two for one, two in without(splits, [0, 1, 2, 4, 5, 6]))


def test_a_planted_head_is_found_in_the_other_half_and_noise_is_not():
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(12, 100))
    planted = noise.copy()
    planted[:, [3, 40]] += 8
    splits = halves(12, 20, 0)
    assert held_out_share(planted, 2, splits) > 0.3
    assert abs(held_out_share(noise, 2, splits)) < 0.1
    assert agreement(planted[:6], planted[6:], 2)["jaccard"] == 1.0
    assert agreement(planted, planted, 5) == {"spearman": pytest.approx(1.0), "jaccard": 1.0}


def test_a_share_counts_what_is_positive():
    means = np.array([3.0, -1.0, 1.0])
    assert top(means, 2).tolist() == [0, 2]
    assert share(means, np.array([0, 1])) == 0.5
    assert share(-means.clip(0), np.array([0])) == 0.0
