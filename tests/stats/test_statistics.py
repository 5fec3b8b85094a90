"""Significance, reliability, held-out effects and noise, on data with known answers."""

import numpy as np
import pytest
import torch
from pcs import score_pcs
from scipy.stats import skew

import dps_lens as dps
from dps_lens import plots
from dps_lens.errors import ScoreError
from dps_lens.plots import stability_curve
from dps_lens.scores import HeadScores, NoiseFloor
from dps_lens.stats import bootstrap_t_ci
from dps_lens.stats.reliability import _chance


def planted(effect, *, users=12, examples=2, layers=6, heads=5, noise=1.0, seed=0):
    """Scores with user-level noise, plus `effect` at the first heads."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.zeros(layers, heads)
    base.view(-1)[: len(effect)] = torch.tensor(effect)
    by_user = base + noise * torch.randn(users, 1, layers, heads, generator=generator)
    values = (by_user + 0.3 * noise * torch.randn(users, examples, layers, heads, generator=generator)).flatten(0, 1)
    owners = [f"u{user}" for user in range(users) for _ in range(examples)]
    return HeadScores(values, example_ids=[str(index) for index in range(len(owners))], user_ids=owners, manifest={})


@pytest.mark.parametrize("correction", ["max_t", "bh"])
def test_planted_heads_are_found_and_others_are_not(correction):
    found = dps.significant_heads(planted([3.0, -3.0, 3.0]), correction=correction, n_flips=2000)
    names = set(found.to_frame().query("significant")["name"])
    assert {"L0H0", "L0H1", "L0H2"} <= names
    assert len(names) <= 4


def test_max_t_controls_the_family_wise_error():
    rejected = sum(
        bool(dps.significant_heads(planted([], seed=seed, examples=1), n_flips=199, seed=seed).significant.any())
        for seed in range(200)
    )
    assert rejected / 200 <= 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5


def test_max_t_p_values_equal_a_loop_over_all_flips():
    import itertools

    scores = planted([1.0], users=6, layers=2, heads=2)
    clusters = scores.samples().numpy().reshape(6, -1)

    def largest(x):
        return np.abs(x.mean(0) / (x.std(0, ddof=1) / 6**0.5))

    observed = largest(clusters)
    null = [largest(clusters * np.array(flip)[:, None]).max() for flip in itertools.product((1, -1), repeat=6)]
    exact = [(np.array(null) >= value - 1e-12).mean() for value in observed]
    found = dps.significant_heads(scores)
    assert found.p.flatten().numpy() == pytest.approx(np.array(exact)), "all flips are taken"
    assert found.manifest["smallest_p"] == 2 / 2**6
    assert "no p below 0.031" in found.summary()
    drawn = dps.significant_heads(scores, n_flips=31).p.flatten().numpy()
    assert drawn.min() >= 1 / 32
    assert np.abs(drawn - exact).max() < 0.3
    assert not np.allclose(drawn, exact), "a pattern short of all, flips are drawn"


def test_bh_agrees_with_the_step_up_rule():
    from scipy.stats import ttest_1samp

    scores = planted([2.0, 1.5], users=9)
    p = ttest_1samp(scores.samples().numpy().reshape(9, -1), 0).pvalue
    order = np.argsort(p)
    limit = max([rank for rank, index in enumerate(order, 1) if p[index] <= 0.05 * rank / len(p)], default=0)
    expected = set(order[:limit])
    got = dps.significant_heads(scores, correction="bh").significant.flatten().nonzero().flatten().tolist()
    assert set(got) == expected


def test_heads_within_the_noise_floor_are_never_significant():
    scores = planted([3.0, 0.5], noise=0.1)
    assert dps.significant_heads(scores).significant[0, 1]
    scores.manifest["noise_floor"] = NoiseFloor(sd=1.5, bias=0.1, n_examples=4)._asdict()
    found = dps.significant_heads(scores)
    assert found.significant[0, 0]
    assert not found.significant[0, 1]
    assert scores.noise_floor.of_mean(24) == pytest.approx(0.1 + 3 / 24**0.5)


def test_few_users_support_no_claim(unchecked):
    with pytest.raises(ScoreError, match="5 users have 32 patterns of signs.*at least 6 users"):
        dps.significant_heads(planted([], users=5))
    with pytest.raises(ScoreError, match=r"6 users and n_flips=10000 lies below 0.031.*alpha=0.01"):
        dps.significant_heads(planted([], users=6), alpha=0.01)
    with pytest.raises(ScoreError, match=r"n_flips=9 lies below 0.1"):
        dps.significant_heads(planted([], users=8), n_flips=9)
    assert dps.significant_heads(planted([], users=6), alpha=0.01, correction="bh").manifest["smallest_p"] is None
    with pytest.raises(ScoreError, match=r"'t' is unknown; use one of 'max_t', 'bh', 'bootstrap_t'"):
        dps.significant_heads(planted([]), correction="t")


def lognormal(users, *, heads=48, seed=0):
    """Heads of mean 0 that a few users lift."""
    values = np.random.default_rng(seed).lognormal(size=(users, 6, heads // 6)) - np.exp(0.5)
    names = [str(user) for user in range(users)]
    return HeadScores(torch.from_numpy(values), example_ids=names, user_ids=names)


@pytest.mark.filterwarnings("ignore:significant_heads")
@pytest.mark.parametrize("users", [6, 12, 20, 40])
def test_bootstrap_t_calls_no_skewed_heads_where_sign_flips_do(users):
    calls = {"max_t": 0, "bootstrap_t": 0}
    for correction in calls:
        for seed in range(60):
            found = dps.significant_heads(lognormal(users, seed=seed), correction=correction, n_flips=500)
            calls[correction] += bool(found.significant.any())
            assert found.skewed
            assert bool(found.caveat) == (correction == "max_t")
    assert calls["bootstrap_t"] <= 7, "60 runs at 5%: 3, and 99% of the time at most 7"
    assert calls["max_t"] > (40 if users > 6 else 10)


def test_skewed_effects_are_named_where_heads_are_called():
    scores = lognormal(20)
    with pytest.warns(UserWarning, match=r"skewed over users \(mean \|skewness\| .*correction='bootstrap_t' does not"):
        found = dps.significant_heads(scores)
    assert found.caveat in found.summary()
    assert "effects are skewed over users, dots too many" in plots.heatmap(scores, significance=found).layout.title.text
    frame = found.to_frame().set_index("name")
    assert frame.loc["L2H3", "skewness"] == pytest.approx(skew(scores.values[:, 2, 3], bias=False))
    plain = dps.significant_heads(planted([3.0], users=20))
    assert plain.caveat == ""
    assert "skewed" not in plain.summary()


def test_bootstrap_t_equals_a_loop_over_resamples():
    values = np.random.default_rng(1).exponential(size=(9, 2, 2)) + 0.2
    names = [str(user) for user in range(9)]
    scores = HeadScores(torch.from_numpy(values), example_ids=names, user_ids=names)
    flat, rng, drawn = values.reshape(9, -1), np.random.default_rng(5), []
    error = flat.std(0, ddof=1) / 3
    for _ in range(4000):
        again = flat[rng.integers(9, size=9)]
        drawn.append((again.mean(0) - flat.mean(0)) / (again.std(0, ddof=1) / 3))
    drawn = np.array(drawn)
    low, high = bootstrap_t_ci(scores)
    above, below = np.quantile(drawn, [0.975, 0.025], axis=0)
    assert ((flat.mean(0) - low.flatten().numpy()) / error) == pytest.approx(above, rel=0.15)
    assert ((flat.mean(0) - high.flatten().numpy()) / error) == pytest.approx(below, rel=0.15)
    observed = flat.mean(0) / error
    p = 2 * np.minimum((drawn.max(1)[:, None] >= observed).mean(0), (drawn.min(1)[:, None] <= observed).mean(0))
    got = dps.significant_heads(scores, correction="bootstrap_t").p.flatten().numpy()
    assert got == pytest.approx(np.minimum(p, 1), abs=0.015)
    assert p.min() < 0.5


def test_bootstrap_t_of_few_units_is_unbounded_or_nothing(unchecked):
    scores = lognormal(3)
    low, high = bootstrap_t_ci(scores)
    assert torch.isinf(low).all()
    assert torch.isinf(high).all()
    assert torch.isnan(bootstrap_t_ci(scores, user="0")[0]).all()
    flat = HeadScores(torch.full((3, 1, 1), 0.7), example_ids=list("abc"), user_ids=list("abc"))
    assert [float(end) for end in bootstrap_t_ci(flat)] == pytest.approx([0.7, 0.7])
    with pytest.raises(ScoreError, match="level 95 must lie between 0 and 1"):
        bootstrap_t_ci(scores, 95)
    with pytest.raises(ScoreError, match="n_resamples 10 be 1000 or more"):
        bootstrap_t_ci(scores, n_resamples=10)


def test_equal_users_do_not_give_a_p_of_nothing():
    flat = HeadScores(torch.full((8, 2, 2), 0.7), example_ids=list("abcdefgh"), user_ids=list("abcdefgh"))
    assert dps.significant_heads(flat).p.flatten().tolist() == [2 / 2**8] * 4
    assert dps.significant_heads(flat).caveat == ""


def test_undefined_scores_support_no_claim():
    scores = planted([])
    scores.values[3, 1, 1] = torch.nan
    with pytest.raises(ScoreError, match="significant_heads: these scores are not defined"):
        dps.significant_heads(scores)


def test_split_half_separates_signal_from_noise():
    strong = dps.split_half(planted(list(np.linspace(5, 1, 10)), noise=0.2), k=5).set_index("measure")["mean"]
    nothing = dps.split_half(planted([]), k=5).set_index("measure")["mean"]
    assert strong["jaccard"] > 0.8
    assert strong["spearman"] > 0.5
    assert abs(nothing["spearman"]) < 0.15
    assert nothing["jaccard"] == pytest.approx(_chance(5, 30), abs=0.08)
    r = 0.6
    assert 2 * r / (1 + r) == pytest.approx(0.75)
    with pytest.raises(ScoreError, match="at least two"):
        dps.split_half(planted([], users=1))
    with pytest.raises(ScoreError, match="top 99 of 30"):
        dps.split_half(planted([]), k=99)


def test_chance_overlap_agrees_with_random_sets():
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(4000):
        one, two = (set(rng.choice(30, 6, replace=False)) for _ in range(2))
        drawn.append(len(one & two) / len(one | two))
    assert _chance(6, 30) == pytest.approx(np.mean(drawn), abs=0.01)


def test_stability_grows_with_the_number_of_users():
    frame = dps.stability(planted(list(np.linspace(3, 1, 10)), noise=1.5), k=5, sizes=[1, 2, 4, 6])
    assert list(frame["units"]) == [1, 2, 4, 6]
    assert list(frame["jaccard"]) == sorted(frame["jaccard"])
    assert frame["chance"].nunique() == 1
    again = dps.stability(planted(list(np.linspace(3, 1, 10)), noise=1.5), k=5, sizes=[1, 2, 4, 6])
    assert frame.equals(again)
    figure = stability_curve(frame)
    assert list(figure.data[1].y) == list(frame["jaccard"])
    assert list(figure.data[1].x) == [1, 2, 4, 6]
    assert figure.layout.shapes[0].y0 == frame["chance"][0]
    with pytest.raises(ScoreError, match="need 14 units"):
        dps.stability(planted([]), sizes=[7])


def test_held_out_effects_are_measured_on_evaluation_examples(llama, probe, short):
    from oracles import ablated_nll, nll

    options = {"max_examples": 1, "prompt_config": short}
    scores = score_pcs(llama.hooked, probe[:2], **options)
    frame = dps.held_out_effects(llama.hooked, probe[:2], scores, k=3)
    assert list(frame["name"]) == [str(head) for head in scores.top(3)]
    best = scores.top(1)[0]
    by_user = []
    for user in probe[:2]:
        effects = []
        for example in user.examples:
            own, none = (dps.build_prompt(llama.hooked, example, profile, config=short) for profile in ("own", "none"))
            taken = [ablated_nll(llama.plain, p, *best, 8, "response", 0.0) - nll(llama.plain, p) for p in (own, none)]
            effects.append(taken[0] - taken[1])
        by_user.append(np.mean(effects))
    assert frame["held_out"][0] == pytest.approx(np.mean(by_user), abs=1e-4)
    assert frame["discovery"][0] == pytest.approx(float(scores.mean()[best]))
    leaking = HeadScores(
        scores.values, example_ids=[probe[0].examples[0].id, "x"], user_ids=scores.user_ids, manifest=scores.manifest
    )
    with pytest.raises(ScoreError, match="the heads were chosen on 1"):
        dps.held_out_effects(llama.hooked, probe[:2], leaking)


def test_noise_of_bfloat16_is_measured(tiny_folders, llama, probe, short, tmp_path):
    low = dps.load_model(str(tiny_folders["llama"]), dtype="bfloat16")
    options = {"max_examples": 1, "prompt_config": short}
    scores = score_pcs(low, probe[:2], **options)
    assert scores.noise_floor is None
    floor = dps.measure_noise(scores, low, llama.hooked, probe, n_examples=2)
    exact = score_pcs(llama.hooked, probe[:2], **options)
    difference = (scores.values - exact.values).double()
    assert floor.sd == pytest.approx(float(difference.std()))
    assert floor.bias == pytest.approx(float(difference.mean()))
    assert 0 < floor.sd < 0.1
    scores.save(tmp_path)
    assert HeadScores.load(tmp_path).noise_floor == floor
    # Against another user one user is no sample.
    patched = dps.score_heads(low, probe[:2], method="exact", **options)
    assert dps.measure_noise(patched, low, llama.hooked, probe, n_examples=1).n_examples == 2
