"""Intervals cover what was planted as often as they say, and p-values are not too small."""

from itertools import islice

import numpy as np
import pytest
from scipy.stats import skew, t, ttest_1samp

from dps_lens.errors import ScoreError
from dps_lens.scores import t_quantile
from dps_lens.stats.intervals import (
    add_one_p,
    crossed_interval,
    interval,
    range_of_next,
    ratio_interval,
    sets_for_p,
    sets_for_range,
    user_means,
)
from dps_lens.stats.skew import caveat, is_skewed, skewness_of, usual_skewness

N = 4000  # replicates: the standard error of a coverage of 95% is 0.34 points
USERS = (12, 19, 26)


def coverage(intervals, truth):
    found = list(islice(intervals, N))
    assert len(found) == N
    assert not any(np.isnan([one["low"], one["high"]]).any() for one in found)
    return np.mean([one["low"] <= truth <= one["high"] for one in found])


def effects_of(rng, n, shape="normal"):
    """User effects of mean 0 and standard deviation 1."""
    return rng.normal(size=n) if shape == "normal" else rng.exponential(size=n) - 1


def replicates(kind, n_users, shape="normal", seed=0):
    """Intervals of a planted 0.3; the ratio is 0.3 of a gain that users differ in."""
    rng = np.random.default_rng([seed, n_users])
    while True:
        users = effects_of(rng, n_users, shape)
        if kind == "interval":
            yield interval(0.3 + users)
        elif kind == "ratio_interval":
            gain = 1 + 0.5 * users
            yield ratio_interval(0.3 * gain + 0.4 * effects_of(rng, n_users, shape), gain)
        else:
            draws = 0.5 * rng.normal(size=(50, 1))
            yield crossed_interval(0.3 + draws + users + rng.normal(size=(50, n_users)))


@pytest.mark.parametrize("n_users", USERS)
@pytest.mark.parametrize("kind", ["interval", "ratio_interval", "crossed_interval"])
def test_intervals_cover_a_planted_effect(kind, n_users):
    assert 0.93 <= coverage(replicates(kind, n_users), 0.3) <= 0.97


@pytest.mark.parametrize("kind", ["interval", "ratio_interval", "crossed_interval"])
def test_intervals_of_skewed_users_are_a_little_short(kind):
    """The bound is looser on purpose: with exponential users Student's t covers 91% at 19, 90% at 12."""
    assert 0.90 <= coverage(replicates(kind, 19, "exponential"), 0.3) <= 0.97


@pytest.mark.parametrize("n_users", [12, 26])
@pytest.mark.parametrize(("draw", "user", "noise"), [(0.3, 0.3, 3), (0, 0, 1)])
def test_crossed_intervals_do_not_count_the_residual_twice(draw, user, noise, n_users):
    """Where it is much of the variance, an interval that counts it twice covers 99%."""
    rng = np.random.default_rng(1)

    def drawn():
        while True:
            effects = draw * rng.normal(size=(50, 1)) + user * rng.normal(size=n_users)
            yield crossed_interval(effects + noise * rng.normal(size=(50, n_users)))

    # Pure noise is the documented conservative end.
    assert 0.93 <= coverage(drawn(), 0) <= (0.98 if draw == user == 0 else 0.97)


def test_crossed_interval_is_students_where_only_users_differ():
    users = np.random.default_rng(0).normal(size=14)
    crossed, plain = crossed_interval(np.tile(users, (9, 1))), interval(users)
    assert crossed == pytest.approx(plain)
    assert crossed_interval(np.tile(users[:, None], (1, 9))) == pytest.approx(plain)
    assert crossed_interval(np.full((5, 4), 0.7)) == pytest.approx({"mean": 0.7, "low": 0.7, "high": 0.7})


def test_intervals_widen_with_the_level_and_need_two_units():
    values = np.random.default_rng(0).normal(size=(8, 8))
    for found in (
        [interval(values[0], level) for level in (0.5, 0.95)],
        [crossed_interval(values, level) for level in (0.5, 0.95)],
        [ratio_interval(values[0], 5 + values[1], level) for level in (0.5, 0.95)],
    ):
        assert found[1]["low"] < found[0]["low"] < found[0]["mean"] < found[0]["high"] < found[1]["high"]
    for alone in (
        interval(values[0, :1]),
        crossed_interval(values[:1]),
        crossed_interval(values[:, :1]),
        ratio_interval(values[0, :1], values[0, :1]),
    ):
        assert np.isnan([alone["low"], alone["high"]]).all()


@pytest.mark.parametrize("seed", range(5))
def test_ratio_interval_holds_the_ratios_that_a_t_test_does_not_reject(seed):
    rng = np.random.default_rng(seed)
    gain = 1 + 0.4 * rng.normal(size=12)
    taken = 0.6 * gain + 0.5 * rng.normal(size=12)
    found = ratio_interval(taken, gain)
    step = 1e-3
    grid = np.arange(-3, 4, step)
    kept = grid[ttest_1samp(taken[:, None] - grid * gain[:, None], 0).pvalue >= 0.05]
    assert np.allclose(np.diff(kept), step), "one interval"
    assert (found["low"], found["high"]) == pytest.approx((kept[0], kept[-1]), abs=1.01 * step)
    assert found["mean"] == pytest.approx(taken.mean() / gain.mean())


def test_ratio_interval_is_nan_exactly_where_the_denominator_spans_zero():
    rng = np.random.default_rng(0)
    spans = []
    for _ in range(200):
        gain = 0.6 + rng.normal(size=12)
        found, of_gain = ratio_interval(rng.normal(size=12), gain), interval(gain)
        spans.append(of_gain["low"] <= 0 <= of_gain["high"])
        assert np.isnan(list(found.values())).all() == spans[-1]
        assert np.isnan(list(found.values())).any() == spans[-1]
    assert 20 < sum(spans) < 180


@pytest.mark.parametrize("n_draws", [19, 50])
@pytest.mark.parametrize("ties", [False, True])
def test_null_p_values_are_not_too_small(n_draws, ties):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(20000, n_draws + 1))
    if ties:
        values = values.round()
    p = np.array([add_one_p(float(row[0]), row[1:]) for row in values])
    for level in (0.05, 0.1, 0.5):
        assert (p <= level).mean() <= 1.1 * level
    assert p.min() >= 1 / (n_draws + 1)
    assert p.max() <= 1


def test_p_value_counts_the_observation_itself():
    null = np.arange(9.0)
    assert add_one_p(9.0, null) == pytest.approx(0.1)
    assert add_one_p(8.0, null) == pytest.approx(0.2)
    assert add_one_p(-1.0, null) == 1.0


@pytest.mark.parametrize("shape", ["normal", "exponential"])
@pytest.mark.parametrize("n_draws", [39, 50, 100])
def test_the_range_of_random_sets_holds_one_more(n_draws, shape):
    rng = np.random.default_rng(2)
    drawn = np.array([effects_of(rng, n_draws + 1, shape) for _ in range(N)])
    held = [low <= row[0] <= high for row in drawn for low, high in [range_of_next(row[1:])]]
    assert abs(np.mean(held) - 0.95) <= 3 * (0.05 * 0.95 / N) ** 0.5


def test_too_few_random_sets_have_no_range():
    assert [sets_for_range(level) for level in (0.5, 0.9, 0.95, 0.99)] == [3, 19, 39, 199]
    assert [sets_for_p(level) for level in (0.5, 0.9, 0.95, 0.99)] == [1, 9, 19, 99]
    values = np.random.default_rng(0).permutation(np.arange(39.0))
    assert range_of_next(values) == pytest.approx((0, 38)), "one of 40 places lies below, one above"
    assert np.isnan(range_of_next(values[:38])).all()
    assert range_of_next(np.arange(79.0)) == pytest.approx((1, 77))


def test_a_quantile_of_t_for_every_interval(unchecked):
    assert t_quantile(11, 0.95) == pytest.approx(t.ppf(0.975, 11))
    for level in (95, 0, 1, -0.5):
        with pytest.raises(ScoreError, match=f"found {level}"):
            interval(np.arange(4.0), level)


def test_skewness_is_named_beyond_chance_and_where_it_harms():
    rng = np.random.default_rng(0)
    values = rng.lognormal(size=12)
    assert skewness_of(values) == pytest.approx(skew(values, bias=False))
    assert np.isnan(skewness_of(np.ones(5)))
    assert np.isnan(skewness_of(values[:2]))
    for n in (6, 12, 40):
        normal = np.abs(skew(rng.normal(size=(n, 20000)), axis=0, bias=False))
        assert usual_skewness(n) == pytest.approx(normal.mean(), rel=0.04)
        assert np.mean([is_skewed(np.array(value), n) for value in normal[:4000]]) == pytest.approx(0.05, abs=0.015)
        assert not is_skewed(normal[:100], n)
        assert is_skewed(skew(rng.exponential(size=(n, 100)), axis=0, bias=False), n)
    assert not is_skewed(np.full(100, 1.0), 100), "0.1 of √n: a tail of 2.5% holds 3.3%"
    assert is_skewed(np.full(100, 1.3), 100)
    assert not is_skewed(np.array([np.nan]), 12)


def test_what_is_said_beside_an_interval():
    assert caveat(np.array(0.3), 12) == ""
    assert "skewed over users (skewness 2.0, usual for 12 symmetric ones: 0.5)" in caveat(np.array(2.0), 12)
    assert caveat(np.array(0.3), 5).startswith("5 users are too few to show skewed effects")
    assert caveat(np.array(np.nan), 1) == "", "one user has no interval"


def test_user_means_weigh_every_user_once():
    import torch

    values = torch.tensor([1.0, 2.0, 6.0, 3.0], dtype=torch.float64)
    assert user_means(values, ["b", "a", "b", "b"]).tolist() == [pytest.approx(10 / 3), 2.0]
