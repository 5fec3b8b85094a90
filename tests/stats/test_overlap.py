"""Overlap of head sets: null, p-values, exclusion and ceiling against brute force and planted answers."""

import random
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import hypergeom, kstest

from dps_lens.errors import HeadError, ScoreError
from dps_lens.heads import Head, HeadSet
from dps_lens.plots.overlap import overlap as plot
from dps_lens.scores import HeadScores
from dps_lens.stats.null import compare_sets, null_shared, top_agreement
from dps_lens.stats.overlap import overlap

SHAPE = (6, 5)


def scores_of(maps, *, examples=1, noise=0.0, seed=0, **manifest):
    """Scores of one user a map, with `examples` (one number, or one a user) noisy copies of it."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.as_tensor(maps, dtype=torch.float32)
    counts = [examples] * len(maps) if isinstance(examples, int) else examples
    values = torch.cat([m.expand(n, *m.shape) for m, n in zip(maps, counts, strict=True)])
    values = values + noise * torch.randn(values.shape, generator=generator)
    owners = [f"u{user}" for user, n in enumerate(counts) for _ in range(n)]
    return HeadScores(values, example_ids=[str(i) for i in range(len(owners))], user_ids=owners, manifest=manifest)


def noise_maps(n, *, seed=0, shape=SHAPE):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def planted(n, *, own, seed=0, effect=2.0, k=4):
    """One map a user: `effect` at `k` heads, each user's own or the same for all."""
    maps = torch.zeros(n, 40)
    rng = np.random.default_rng(seed)
    shared = rng.choice(40, k, replace=False)
    for user in range(n):
        maps[user, rng.choice(40, k, replace=False) if own else shared] = effect
    return maps.view(n, 8, 5)


def mask(heads, shape=SHAPE):
    found = torch.zeros(shape, dtype=torch.bool)
    for head in heads:
        found[head] = True
    return found


def matched(draw, heads, allowed):
    """A random set with as many heads in each layer as `heads`, out of `allowed`; slow and plain."""
    found = set()
    for layer in range(SHAPE[0]):
        n = sum(head[0] == layer for head in heads)
        found |= set(draw.sample(sorted(head for head in allowed if head[0] == layer), n))
    return found


ALL = [Head(layer, head) for layer in range(SHAPE[0]) for head in range(SHAPE[1])]
A = HeadSet.parse("L0H0,L0H1,L0H2,L2H1,L2H4,L4H0,L5H3")
B = HeadSet.parse("L0H1,L0H4,L1H2,L2H1,L2H2,L2H3,L5H3,L5H0")


@pytest.mark.parametrize("dropped", [[], [Head(0, 4), Head(2, 2), Head(3, 3), Head(5, 4)]])
def test_null_agrees_with_random_layer_matched_sets(dropped):
    n = 8000
    fast = null_shared(mask(A), mask(B), mask(dropped), n, np.random.default_rng(0))
    draw = random.Random(1)
    allowed = [head for head in ALL if head not in dropped]
    slow = np.array([len(matched(draw, A, allowed) & set(B)) for _ in range(n)])
    exact = np.array([1.0])
    for layer in range(SHAPE[0]):
        good = sum(head.layer == layer and head not in dropped for head in B)
        free = sum(head.layer == layer for head in allowed)
        drawn = sum(head.layer == layer for head in A)
        exact = np.convolve(exact, hypergeom.pmf(np.arange(min(good, drawn) + 1), free, good, drawn))
    for sample in (fast, slow):
        counts = np.bincount(sample, minlength=len(exact)) / n
        assert np.abs(counts - exact).max() < 4 * 0.5 / n**0.5
    assert abs(fast.mean() - slow.mean()) < 4 * (2 * exact_variance(exact) / n) ** 0.5


def exact_variance(pmf):
    values = np.arange(len(pmf))
    return (pmf * values**2).sum() - (pmf * values).sum() ** 2


def test_null_with_both_sets_random_is_the_same():
    draw = random.Random(2)
    both = [len(matched(draw, A, ALL) & matched(draw, B, ALL)) for _ in range(5000)]
    one = null_shared(mask(A), mask(B), mask([]), 5000, np.random.default_rng(0))
    assert np.mean(both) == pytest.approx(one.mean(), abs=0.06)
    assert list(np.quantile(both, [0.025, 0.975])) == list(np.quantile(one, [0.025, 0.975]))


def test_measures_of_a_pair_by_hand():
    found = overlap({"a": A, "b": B}, shape=SHAPE, n_null=8000)
    shared = len(set(A) & set(B))
    union = len(set(A) | set(B))
    assert found.jaccard[0, 1] == found.jaccard[1, 0] == shared / union == A.jaccard(B)
    draw = random.Random(3)
    null = np.array([len(matched(draw, A, ALL) & set(B)) for _ in range(8000)])
    jaccards = null / (len(A) + len(B) - null)
    assert float(found.null_mean[0, 1]) == pytest.approx(jaccards.mean(), abs=0.005)
    assert float(found.null_low[0, 1]) == pytest.approx(np.quantile(jaccards, 0.025))
    assert float(found.null_high[0, 1]) == pytest.approx(np.quantile(jaccards, 0.975))
    assert float(found.p[0, 1]) == pytest.approx((null >= shared).mean(), abs=0.02)
    low, high = (null > shared).mean(), (null >= shared).mean()
    assert low - 0.02 < float(found.mid_p[0, 1]) < high + 0.02
    assert found.jaccard.diag().tolist() == [1, 1]
    assert found.p.diag().isnan().all()
    assert found.spearman.isnan().all()
    assert sorted(found.order) == [0, 1]
    assert found.ceiling is found.specificity is found.user_specific is None


def test_p_is_super_uniform_and_mid_p_uniform_under_thenull_shared():
    draw, rng = random.Random(4), np.random.default_rng(4)
    fixed, nothing = mask(B), mask([])
    found = np.array([compare_sets(mask(matched(draw, A, ALL)), fixed, nothing, 99, rng)[4:] for _ in range(4000)])
    p, mid_p = found.T
    for level in (0.01, 0.05, 0.1, 0.25, 0.5):
        assert (p <= level).mean() <= level + 3 * (level * (1 - level) / len(p)) ** 0.5
    assert (p <= 0.05).mean() <= 0.055
    assert kstest(mid_p, "uniform").pvalue > 0.01
    assert np.abs(np.histogram(mid_p, 10, (0, 1))[0] / len(mid_p) - 0.1).max() < 4 * (0.09 / len(mid_p)) ** 0.5


def test_the_same_seed_gives_the_same_answer():
    scores = scores_of(noise_maps(3), examples=4, noise=1.0)
    one, two, other = (overlap(scores, k=4, n_null=50, n_splits=3, seed=seed) for seed in (0, 0, 1))
    assert one.to_frame().equals(two.to_frame())
    assert one.ceiling.equals(two.ceiling)
    assert not one.to_frame().equals(other.to_frame())


def test_entries_are_scores_or_sets():
    one, two = (scores_of(noise_maps(3, seed=seed), family=f"f{seed}") for seed in (0, 1))
    found = overlap({"one": one, "set": A, "two": two}, k=5)
    assert found.sets["one"].heads == one.top(5).heads
    assert found.sets["set"] is A
    assert float(found.jaccard[0, 2]) == one.top(5).jaccard(two.top(5))
    ranks = [scores.mean().flatten().argsort().argsort().double() for scores in (one, two)]
    assert float(found.spearman[0, 2]) == pytest.approx(float(torch.corrcoef(torch.stack(ranks))[0, 1]))
    assert found.spearman[1].isnan().all()
    assert found.manifest["unit"] == "sets"
    assert found.ceiling is None
    frame = found.to_frame()
    assert list(zip(frame["a"], frame["b"], strict=True)) == [("one", "set"), ("one", "two"), ("set", "two")]
    assert frame["jaccard"].tolist() == [float(found.jaccard[pair]) for pair in ((0, 1), (0, 2), (1, 2))]


def test_scores_stand_for_their_users():
    scores = scores_of(noise_maps(3), examples=[2, 3, 1], noise=0.5)
    found = overlap(scores, k=5)
    assert found.names == ("u0", "u1", "u2")
    assert all(found.sets[user].heads == scores.top(5, user=user).heads for user in scores.users)
    assert found.manifest["unit"] == "users"
    assert float(found.spearman[0, 1]) != 1
    flat = overlap({"flat": scores_of(torch.zeros(1, *SHAPE)), "other": scores})
    assert flat.spearman[0, 1].isnan()


def test_exclusion_agrees_with_brute_force():
    family = {f"f{i}": scores_of(m[None]) for i, m in enumerate(noise_maps(3, seed=2) + 0.8 * noise_maps(1, seed=9))}
    found = overlap(family, k=7, exclude=0.1, n_null=4000)
    assert not torch.equal(found.jaccard, found.jaccard.T)
    draw = random.Random(5)
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    for a, b in pairs:
        rank_a, rank_b = (
            sorted(ALL, key=lambda head, m=family[f"f{i}"].values[0]: (-float(m[head]), head)) for i in (a, b)
        )
        dropped = set(rank_b[:3])
        kept = [head for head in rank_a if head not in dropped][:7]
        target = set(rank_b[:7])
        assert float(found.jaccard[a, b]) == len(set(kept) & target) / len(set(kept) | target)
        allowed = [head for head in ALL if head not in dropped]
        null = np.array([len(matched(draw, kept, allowed) & target) for _ in range(4000)])
        assert float(found.null_mean[a, b]) == pytest.approx((null / (14 - null)).mean(), abs=0.012)
        assert float(found.p[a, b]) == pytest.approx((null >= len(set(kept) & target)).mean(), abs=0.045)
    frame = found.to_frame()
    assert len(frame) == 6
    assert [float(found.jaccard[pair]) for pair in pairs] == frame["jaccard"].tolist()


@pytest.mark.parametrize("share", [None, 0.1])
def test_agreement_of_halves_equals_head_sets(share):
    one, two = noise_maps(3).double(), (noise_maps(3) + noise_maps(3, seed=1)).double()
    got = top_agreement(one.flatten(1).numpy(), two.flatten(1).numpy(), 6, 0 if share is None else 3)
    for a, b in ((a, b) for a in range(3) for b in range(3)):
        first, second = scores_of(one[a][None]), scores_of(two[b][None])
        exclude = second.top_share(share) if share else None
        assert got[a, b] == first.top(6, exclude=exclude).jaccard(second.top(6))


def test_ceiling_equals_all_splits_at_equal_counts():
    scores = scores_of(noise_maps(3), examples=[2, 3, 1], noise=1.0)
    found = overlap(scores, k=5, n_splits=2000)
    assert found.manifest["half"] == 1
    assert list(found.ceiling["user"]) == ["u0", "u1"]
    tops = {row: set(np.argsort(-scores.values[row].flatten().numpy())[:5]) for row in range(5)}

    def mean(pairs):
        return np.mean([len(tops[a] & tops[b]) / len(tops[a] | tops[b]) for a, b in pairs])

    within = [mean([(0, 1)]), mean(combinations((2, 3, 4), 2))]
    between = mean((a, b) for a in (0, 1) for b in (2, 3, 4))
    assert list(found.ceiling["within"]) == pytest.approx(within, abs=0.02)
    assert list(found.ceiling["between"]) == pytest.approx([between, between], abs=0.02)
    assert list(found.ceiling["difference"]) == pytest.approx(np.subtract(within, between), abs=0.03)
    assert list(found.specificity["measure"]) == ["within", "between", "difference"]
    assert found.user_specific is None
    assert overlap(scores_of(noise_maps(3), examples=[1, 4, 1]), k=5).ceiling is None


@pytest.mark.parametrize("exclude", [None, 0.05])
def test_only_users_with_their_own_heads_are_user_specific(exclude):
    options = {"k": 4, "n_splits": 20, "n_null": 50, "exclude": exclude}
    own = overlap(scores_of(planted(8, own=True), examples=6, noise=1.0), **options)
    shared = overlap(scores_of(planted(8, own=False), examples=6, noise=1.0), **options)
    assert own.user_specific is True
    assert (own.ceiling["within"] > own.ceiling["between"]).mean() > 0.8
    assert shared.user_specific is False
    low, high = shared.specificity.set_index("measure").loc["difference", ["low", "high"]]
    assert low < 0 < high
    assert shared.jaccard.mean() > own.jaccard.mean()
    assert own.manifest["half"] == 3


def test_order_puts_similar_sets_together():
    draw = random.Random(6)
    groups = [draw.sample(ALL, 6) for _ in range(2)]
    groups[1] = [head for head in ALL if head not in groups[0]][:6]
    sets = {}
    for index in range(6):
        sets[f"s{index}"] = HeadSet(draw.sample(groups[index % 2], 5), shape=SHAPE)
    found = overlap(sets, n_null=20)
    assert found.linkage.shape == (5, 4)
    assert [index % 2 for index in found.order] in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])


def test_errors_say_what_to_do(unchecked):
    scores = scores_of(noise_maps(3))
    with pytest.raises(HeadError, match=r"give shape=\(n_layers, n_heads\)"):
        overlap({"a": A, "b": B})
    with pytest.raises(HeadError, match=r"a: L4H0 is not in this model.*check shape="):
        overlap({"a": A, "b": B}, shape=(4, 5))
    with pytest.raises(HeadError, match=r"different sizes \(shape= \(9, 9\), a \(6, 5\)"):
        overlap({"a": scores, "b": scores}, shape=(9, 9))
    with pytest.raises(HeadError, match="asked for 31 of 30"):
        overlap(scores, k=31)
    with pytest.raises(ScoreError, match="1 set; give at least two"):
        overlap(scores_of(noise_maps(1)))
    with pytest.raises(ScoreError, match="'b' is a HeadSet"):
        overlap({"a": scores, "b": B}, exclude=0.02)
    with pytest.raises(ScoreError, match="drops 3 heads, all of the top 3"):
        overlap(scores, k=3, exclude=0.1)
    with pytest.raises(ScoreError, match="between 0 and 1"):
        overlap(scores, exclude=2)
    with pytest.raises(ScoreError, match="start at 1, found 0"):
        overlap(scores, k=0)
    undefined = scores_of(torch.full((1, *SHAPE), float("nan")), family="retrieval", reason="no needle found")
    with pytest.raises(ScoreError, match="retrieval are not defined: no needle found"):
        overlap({"a": scores, "b": undefined})


def test_empty_sets_are_alike():
    found = overlap({"a": HeadSet(), "b": HeadSet(), "c": A}, shape=SHAPE, n_null=10)
    assert found.jaccard[0].tolist() == [1, 1, 0]
    assert found.p[0, 1] == found.p[0, 2] == 1


def test_figure_shows_the_matrix_in_order():
    scores = scores_of(planted(5, own=True), examples=4, noise=0.5)
    found = overlap(scores, k=4, n_null=50, n_splits=5)
    figure = found.plot()
    (trace,) = figure.data
    names = [found.names[index] for index in found.order]
    assert list(trace.x) == list(trace.y) == names
    for row, a in enumerate(names):
        for column, b in enumerate(names):
            pair = found.names.index(a), found.names.index(b)
            if a == b:
                assert np.isnan(trace.z[row][column])
            else:
                expected = [getattr(found, name)[pair] for name in ("null_low", "null_high", "null_mean", "p")]
                assert trace.z[row][column] == found.jaccard[pair]
                assert list(trace.customdata[row][column]) == expected
    assert (trace.zmin, trace.zmax) == (0, 1)
    assert trace.colorscale == plot(found).data[0].colorscale
    bar = trace.colorbar
    low, high = (float(getattr(found, name).nanmean()) for name in ("null_low", "null_high"))
    within, between = (found.ceiling[name].mean() for name in ("within", "between"))
    assert f"chance {low:.2f} to {high:.2f}" in bar.title.text
    assert f"halves of 2: within a user {within:.2f},<br>between users {between:.2f}" in bar.title.text
    assert dict(zip(bar.ticktext, bar.tickvals, strict=True))["within"] == pytest.approx(within)
    assert figure.layout.xaxis.type == "category"
    assert list(plot(found, order=False, title="t").data[0].x) == list(found.names)
    assert plot(found, title="t").layout.title.text == "t"
    directed = overlap({"a": scores, "b": scores}, k=4, exclude=0.05, n_null=20).plot()
    assert directed.layout.yaxis.title.text == "top 4 without the other's top 5%"
    assert "halves" not in directed.data[0].colorbar.title.text
