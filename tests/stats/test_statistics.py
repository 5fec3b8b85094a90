"""Significance, reliability, held-out effects and noise, on data with known answers."""

import numpy as np
import pytest
import torch

import dps_lens as dps
from dps_lens.errors import ScoreError
from dps_lens.plots import stability_curve
from dps_lens.scores import HeadScores, NoiseFloor
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
    got = dps.significant_heads(scores, n_flips=20000).p.flatten().numpy()
    assert np.abs(got - exact).max() < 0.02


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


def test_few_users_support_no_claim():
    with pytest.raises(ScoreError, match="4 users; at least 5"):
        dps.significant_heads(planted([], users=4))


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
    scores = dps.score_heads(llama.hooked, probe[:2], **options)
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
    scores = dps.score_heads(low, probe[:2], **options)
    assert scores.noise_floor is None
    floor = dps.measure_noise(scores, low, llama.hooked, probe, n_examples=2)
    exact = dps.score_heads(llama.hooked, probe[:2], **options)
    difference = (scores.values - exact.values).double()
    assert floor.sd == pytest.approx(float(difference.std()))
    assert floor.bias == pytest.approx(float(difference.mean()))
    assert 0 < floor.sd < 0.1
    scores.save(tmp_path)
    assert HeadScores.load(tmp_path).noise_floor == floor
