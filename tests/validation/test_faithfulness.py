"""Faithfulness curves against plain Hugging Face, the published areas, and a model of known answer."""

from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
import toy
from conftest import no_hooks_left
from folders import digest
from oracles import columns_replaced, edited_positions, nll, z_of

import dps_lens as dps
from dps_lens.data.conditions import prompts_in
from dps_lens.errors import HeadError, PromptError, RunError, ScoreError
from dps_lens.heads import Head, HeadSet
from dps_lens.plots import faithfulness as plot
from dps_lens.selection import folds, random_rankings
from dps_lens.stats.intervals import sets_for_p
from dps_lens.validation.circuits import Faithfulness
from dps_lens.validation.faithfulness import SIZES, FaithfulnessWork, heads_in

CARRIER = Head(*toy.CARRIER)
OTHERS = [Head(layer, head) for layer in range(2) for head in range(4) if (layer, head) != CARRIER]
BEST, WORST = HeadSet([CARRIER, *OTHERS]), HeadSet([*OTHERS, CARRIER])
TOY_SIZES = (0.0, 0.125, 0.25, 0.5, 1.0)


def published(percentages, metrics, corrupted, baseline):
    """`evaluate_area_under_curve` of hannamw/MIB-circuit-track (arXiv 2504.13151), linear scale: f, CPR, CMD."""
    faithfulnesses = [(metric - corrupted) / (baseline - corrupted) for metric in metrics]
    area_under = area_from_1 = 0.0
    for i in range(len(faithfulnesses) - 1):
        width = percentages[i + 1] - percentages[i]
        area_from_1 += width * (abs(1.0 - faithfulnesses[i]) + abs(1.0 - faithfulnesses[i + 1])) / 2
        area_under += width * (faithfulnesses[i] + faithfulnesses[i + 1]) / 2
    return faithfulnesses, area_under, area_from_1


def planted(shares, *, users=20, draws=0, gain=1.0, noise=0.1, sizes=TOY_SIZES, seed=0):
    """Curves of one example a user in which a family keeps known shares of a gain that scatters over users."""
    generator = torch.Generator().manual_seed(seed)

    def scatter(*shape):
        return noise * torch.randn(*shape, generator=generator, dtype=torch.float64)

    gains = gain + scatter(users)
    kept = torch.tensor(shares, dtype=torch.float64)
    ends = torch.tensor([size not in (0, 1) for size in sizes])
    empty = 5 + scatter(users)
    names = tuple(f"u{index}" for index in range(users))
    return Faithfulness(
        ("family",),
        sizes,
        tuple(round(8 * size) for size in sizes),
        names,
        names,
        empty - gains,
        empty,
        (empty[:, None] - gains[:, None] * kept - scatter(users, len(sizes)) * ends)[:, None],
        empty[:, None, None] - gains[:, None, None] * torch.rand(draws, len(sizes), generator=generator).double(),
        {"against": "other_user"},
    )


@pytest.fixture(scope="module")
def users(probe):
    """Two users with two evaluation examples, and one with one."""
    return [*probe[:2], replace(probe[5], examples=probe[5].examples[:1])]


@pytest.mark.parametrize("against", ["other_user", "no_profile"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_curves_equal_plain_hugging_face(tinies, users, short, architecture, against):
    tiny = tinies(architecture)
    model, plain, d_head = tiny.hooked, tiny.plain, tiny.hooked.cfg.d_head
    sizes = (0.0, 0.1, 0.3, 0.75, 1.0)  # 0, 1, 3, 9 and 12 of 12 heads
    (ranking,) = random_rankings(model, 1, seed=5)
    curves = dps.faithfulness(
        model, users, {"one": ranking}, against=against, sizes=sizes, n_random=2, seed=4, prompt_config=short
    )
    assert curves.counts == (0, 1, 3, 9, 12)
    assert no_hooks_left(model)
    everything = {(layer, head) for layer in range(3) for head in range(4)}
    examples = [example for user in users for example in user.examples]
    assert curves.example_ids == tuple(example.id for example in examples)
    drawn = random_rankings(model, 2, seed=4)
    for row, example in enumerate(examples):
        (own,) = prompts_in(model, example, "own", users, config=short)
        (other,) = prompts_in(model, example, against, users, seed=4, config=short)
        zs = [z_of(plain, other, layer)[edited_positions(other, "response")] for layer in range(3)]

        def patched(kept, own=own, zs=zs):
            with ExitStack() as stack:
                for layer, head in everything - {*kept}:
                    new = zs[layer][:, head * d_head : (head + 1) * d_head]
                    stack.enter_context(
                        columns_replaced(plain, layer, head, d_head, edited_positions(own, "response"), new)
                    )
                return nll(plain, own)

        assert float(curves.full[row]) == pytest.approx(nll(plain, own), abs=1e-5)
        assert float(curves.empty[row]) == pytest.approx(patched(()), abs=1e-5)
        for place, count in enumerate(curves.counts):
            assert float(curves.circuits[row, 0, place]) == pytest.approx(patched(ranking[:count]), abs=1e-5)
            for draw, heads in enumerate(drawn):
                assert float(curves.random[row, draw, place]) == pytest.approx(patched(heads[:count]), abs=1e-5)
        if architecture == "llama":  # nothing but heads tells the two runs apart, at these positions
            assert float(curves.empty[row]) == pytest.approx(nll(plain, other), abs=1e-5)
    change = (curves.circuits[:, 0, 1:-1] - curves.full[:, None]).abs()
    assert float(change.mean()) > 1e-2, "a thousand times the tolerance"


def test_areas_equal_the_published_definition(tinies, users, short):
    curves = dps.faithfulness(
        tinies("llama").hooked,
        users,
        {name: heads for name, heads in zip("ab", random_rankings(tinies("llama").hooked, 2, seed=9), strict=True)},
        n_random=3,
        prompt_config=short,
    )
    assert curves.sizes == SIZES
    # Random models have no gain to speak of; the numbers need one to be shares of it.
    curves = replace(curves, full=curves.full - 3, circuits=curves.circuits - 3 * torch.rand(5, 2, 10).double())
    frame, areas = curves.to_frame(), curves.areas()

    def over_users(values):
        first, second, third = values[:2].mean(0), values[2:4].mean(0), values[4]
        return (first + second + third) / 3

    baseline, corrupted = -over_users(curves.full), -over_users(curves.empty)
    for index, family in enumerate("ab"):
        f, cpr, cmd = published(SIZES, -over_users(curves.circuits[:, index]), corrupted, baseline)
        assert [*frame[frame["family"] == family]["f"]] == pytest.approx([float(value) for value in f], rel=1e-12)
        assert areas["CPR"][index] == pytest.approx(float(cpr), rel=1e-12)
        assert areas["CMD"][index] == pytest.approx(float(cmd), rel=1e-12)
    random = [published(SIZES, -over_users(curves.random[:, draw]), corrupted, baseline) for draw in range(3)]
    assert [*areas["CPR_control"]] == pytest.approx([float(np.mean([one[1] for one in random]))] * 2, rel=1e-12)
    assert [*areas["CMD_control"]] == pytest.approx([float(np.mean([one[2] for one in random]))] * 2, rel=1e-12)


@pytest.mark.parametrize("n_heads", [8, 12, 144, 270, 1024])
def test_sizes_are_rounded_down_as_published(n_heads):
    assert [heads_in(size, n_heads) for size in SIZES] == [int(size * n_heads) for size in SIZES]
    assert [heads_in(k / n_heads, n_heads) for k in range(n_heads + 1)] == list(range(n_heads + 1))


def test_areas_by_hand():
    curves = planted([0.0, 0.5, 1.2, 0.8, 1.0], noise=0.0)
    (row,) = curves.areas().to_dict("records")
    # 0.125 · 0.25 + 0.125 · 0.85 + 0.25 · 1 + 0.5 · 0.9, and 0.125 · 0.75 + 0.125 · 0.35 + 0.25 · 0.2 + 0.5 · 0.1
    assert row["CPR"] == pytest.approx(0.8375)
    assert row["CMD"] == pytest.approx(0.2375)
    assert row["CPR_low"] == pytest.approx(row["CPR_high"]), "all users alike"
    assert "CPR_p" not in row, "there are no random rankings"


def test_f_is_0_and_1_at_the_ends_and_the_carrier_keeps_everything(toy_model, toy_users):
    families = {"best": BEST, "worst": WORST, "each": {user.id: BEST for user in toy_users}}
    curves = dps.faithfulness(toy_model, toy_users, families, sizes=TOY_SIZES, n_random=39)
    frame, areas = curves.to_frame(), curves.areas().set_index("family")
    f = frame.pivot(index="family", columns="size", values="f")
    assert (f[0.0] == 0).all(), "exactly"
    assert (f[1.0] == 1).all(), "exactly"
    assert f.loc["best", 0.125:].to_list() == pytest.approx([1] * 4, abs=1e-3)
    assert f.loc["worst", :0.5].to_list() == pytest.approx([0] * 4, abs=1e-3)
    assert f.loc["each"].to_list() == f.loc["best"].to_list()
    # One head carries everything: all is kept from its place on, by any ranking.
    drawn = random_rankings(toy_model, 39, 0)
    places = [heads.heads.index(CARRIER) for heads in drawn]
    expected = [published(TOY_SIZES, [float(place < count) for count in curves.counts], 0, 1) for place in places]
    ahead = sum(place == 0 for place in places)
    assert 0 < ahead < 20
    assert areas.loc["best", "CPR"] == pytest.approx(1 - 0.125 / 2, abs=1e-3)
    assert areas.loc["best", "CMD"] == pytest.approx(0.125 / 2, abs=1e-3)
    assert areas.loc["best", "CPR_control"] == pytest.approx(np.mean([one[1] for one in expected]), abs=1e-3)
    means = [-values.mean(0) for values in (curves.empty, curves.full, curves.random)]
    cpr = [published(TOY_SIZES, one.tolist(), float(means[0]), float(means[1]))[1] for one in means[2]]
    assert areas.loc["best", "CPR"] > max(cpr) - 1e-4
    assert areas.loc["best", "CPR"] > max(area for area, place in zip(cpr, places, strict=True) if place) + 0.05
    assert areas.loc["best", "CPR_p"] <= (1 + ahead) / 40
    assert areas.loc["best", "CMD_p"] <= (1 + ahead) / 40
    assert areas.loc["worst", "CPR_p"] > 0.5
    assert (areas["CPR_control_low"] < areas["CPR_control_high"]).all()
    assert "CPR 0.94, CMD 0.06" in repr(curves)


def test_users_are_tested_with_heads_that_others_chose(toy_model, toy_users):
    # Everybody's own scores put one head first that nobody else's do.
    values = torch.zeros(6, 2, 4)
    for index in range(6):
        values[index].view(-1)[index] = 10.0
    scores = dps.HeadScores(values, example_ids=["old"] * 6, user_ids=[user.id for user in toy_users])

    def first_heads(**options):
        curves = dps.faithfulness(
            toy_model, toy_users, {"found": scores}, sizes=(0.0, 1.0), n_random=0, max_examples=1, seed=3, **options
        )
        return {user: HeadSet.parse(sets[0]) for user, sets in curves.manifest["sets"]["found"].items()}

    crossed = first_heads()
    for fold in folds(toy_users, 3):
        expected = scores.without(fold).top(8)
        for user in fold:
            assert crossed[user].heads == expected.heads
            assert crossed[user][0] != scores.top(1, user)[0]
    own = first_heads(select="user")
    assert all(own[user][0] == scores.top(1, user)[0] for user in own)
    evaluated = [user.examples[0].id for user in toy_users]
    seen = dps.HeadScores(values, example_ids=evaluated, user_ids=[user.id for user in toy_users])
    with pytest.raises(ScoreError, match="the heads were chosen on 6 of these examples"):
        dps.faithfulness(toy_model, toy_users, {"found": seen})


def test_an_interrupted_run_resumes_and_equals_an_uninterrupted_one(toy_model, toy_users, tmp_path, monkeypatch):
    def run(folder, **more):
        options = {"sizes": TOY_SIZES, "n_random": 2} | more
        return dps.faithfulness(toy_model, toy_users[:3], {"best": BEST}, out=tmp_path / folder, **options)

    whole = run("whole")
    real, made = FaithfulnessWork.make, []

    def make(self, key, given=None):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(key)
        return real(self, key, given)

    monkeypatch.setattr(FaithfulnessWork, "make", make)
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    with pytest.raises(ScoreError, match="holds no Faithfulness"):
        Faithfulness.load(tmp_path / "cut")
    monkeypatch.setattr(FaithfulnessWork, "make", real)
    resumed = run("cut")
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    assert resumed.to_frame().equals(whole.to_frame())
    loaded = Faithfulness.load(tmp_path / "cut")
    assert loaded.areas().equals(whole.areas())
    assert (repr(loaded), loaded.manifest["against"]) == (repr(whole), "other_user")
    for change, named in (
        ({"sizes": (0.0, 1.0)}, "made with other settings.*sizes"),
        ({"against": "no_profile"}, 'against was "other_user", now "no_profile"'),
        ({"n_random": 3}, "n_random was 2, now 3"),
        ({"seed": 1}, "seed was 0, now 1"),
    ):
        with pytest.raises(RunError, match=named):
            run("cut", **change)
    run("cut", run_config=dps.RunConfig(batch_size=1))


def test_a_short_ranking_has_no_f_beyond_its_heads(toy_model, toy_users):
    few = HeadSet([CARRIER, Head(0, 0), Head(0, 1)])
    with pytest.warns(UserWarning, match=r"'few' ranks fewer heads than sizes above 0.25 ask for"):
        curves = dps.faithfulness(
            toy_model, toy_users, {"few": few, "best": BEST}, sizes=TOY_SIZES, n_random=19, max_examples=1
        )
    frame, areas = curves.to_frame(), curves.areas().set_index("family")
    f = frame[frame["family"] == "few"]["f"].to_list()
    assert f[:3] == pytest.approx([0, 1, 1], abs=1e-3)
    assert np.isnan(f[3:]).all()
    assert np.isnan(areas.loc["few"].drop([name for name in areas if "control" in name])).all()
    assert np.isfinite(areas.loc["best", ["CPR", "CMD", "CPR_p"]].astype(float)).all()
    assert np.isnan(areas.loc["best", "CPR_control_low"]), "19 rankings have no 95% range"
    assert "needs 39" in curves.summary()
    assert "needs 39" in curves.plot().layout.title.text
    with pytest.raises(HeadError, match="family 'few' ranks 3 heads, asked for 4"):
        dps.faithfulness(toy_model, toy_users, {"few": few}, sizes=(0.5, 1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"users": 1}, "'other_user' needs at least two users"),
        ({"against": "nobody"}, "against 'nobody' is unknown"),
        ({"sizes": (0.5,)}, "no growing shares"),
        ({"sizes": (0.5, 0.1)}, "no growing shares"),
        ({"sizes": (0.5, 1.5)}, "no growing shares"),
        ({"sizes": (float("nan"), 1.0)}, "no growing shares"),
        ({"families": {"nested": [HeadSet([CARRIER])]}}, "a list of sets, which rank no heads"),
        ({"families": {"each": {"u0": BEST}}}, "holds no heads for user 'u1'"),
        ({"families": {}}, "at least one family"),
        ({"n_random": -1}, "n_random is not negative"),
    ],
)
def test_what_cannot_be_measured_is_refused(toy_model, toy_users, options, message, unchecked):
    options = {"users": 6, "families": {"best": BEST}} | options
    with pytest.raises(ScoreError, match=message):
        dps.faithfulness(toy_model, toy_users[: options.pop("users")], options.pop("families"), **options)


def test_other_positions_need_profiles_of_equal_length(toy_model, toy_users):
    config = dps.HeldOutConfig(positions="all")
    with pytest.raises(PromptError, match="use positions='response'"):
        dps.faithfulness(toy_model, toy_users, {"best": BEST}, against="no_profile", held_out_config=config)


def test_without_a_gain_there_is_no_f(toy_model, toy_users):
    one = dps.faithfulness(toy_model, toy_users[:1], {"best": BEST}, against="no_profile", n_random=2)
    assert "one user gives no interval" in one.summary()
    flat = planted([0.0, 0.5, 0.7, 0.9, 1.0], gain=0.01, draws=40)
    assert "the gain over another user's profile is not reliably above 0" in flat.summary()
    harmful = planted([0.0, 0.5, 0.7, 0.9, 1.0], gain=-1.0, draws=40)
    for curves in (one, flat, harmful):
        frame, areas = curves.to_frame(), curves.areas()
        assert frame[["f", "low", "high", "control"]].isna().all(axis=None)
        assert frame["recovered"].notna().all(), "nats need no gain"
        assert areas.drop(columns="family").isna().all(axis=None)
        figure = plot(curves)
        assert not figure.data
        assert curves.undefined() in figure.layout.annotations[0].text


def test_both_areas_mirror_each_other_below_1_and_no_distance_is_negative():
    curves = planted([0.0, 0.3, 0.6, 0.8, 1.0])
    (row,) = curves.areas().to_dict("records")
    assert row["CMD"] == pytest.approx(1 - row["CPR"])
    assert row["CMD_low"] == pytest.approx(1 - row["CPR_high"])
    assert row["CMD_high"] == pytest.approx(1 - row["CPR_low"])
    close = planted([1.0] * 5, sizes=(0.1, 0.2, 0.3, 0.4, 0.5), noise=0.5).areas()
    assert close["CMD_low"][0] == 0
    assert close["CMD"][0] > 0


def test_intervals_cover_the_planted_areas():
    # Student's t over 20 normal users: 95%, give or take 2.3% with 400 draws of them.
    shares = [0.0, 0.4, 0.7, 1.3, 1.0]
    _, cpr, cmd = published(TOY_SIZES, shares, 0, 1)
    rows = [planted(shares, noise=0.3, seed=seed).areas().iloc[0] for seed in range(400)]
    for name, truth in (("CPR", cpr), ("CMD", cmd)):
        covered = np.mean([row[f"{name}_low"] <= truth <= row[f"{name}_high"] for row in rows])
        assert 0.92 < covered < 0.98, name


def test_p_counts_random_rankings_that_do_as_well():
    curves = planted([0.0, 0.9, 0.9, 0.9, 1.0], draws=sets_for_p(0.95))
    (row,) = curves.areas().to_dict("records")
    random = (curves.empty[:, None, None] - curves.random).mean(0) / (curves.empty - curves.full).mean()
    areas = [published(TOY_SIZES, one, 0, 1) for one in random.tolist()]
    assert row["CPR_p"] == pytest.approx((1 + sum(one[1] >= row["CPR"] for one in areas)) / 20)
    assert row["CMD_p"] == pytest.approx((1 + sum(one[2] <= row["CMD"] for one in areas)) / 20)
    fewer = planted([0.0, 0.9, 0.9, 0.9, 1.0], draws=18).areas()
    assert fewer[["CPR_p", "CMD_p"]].isna().all(axis=None)


def test_random_rankings_hold_every_head_once_and_every_order_alike(llama):
    drawn = random_rankings(llama.hooked, 600, seed=2)
    assert {len({*heads}) for heads in drawn} == {12}
    firsts = np.bincount([4 * heads[0].layer + heads[0].head for heads in drawn], minlength=12)
    assert firsts.min() > 20, "50 expected of each, standard deviation 7"
    assert [*map(str, drawn[:3])] == [*map(str, random_rankings(llama.hooked, 3, seed=2))]
    assert {*map(str, drawn)}.isdisjoint(map(str, random_rankings(llama.hooked, 600, seed=3)))


def test_the_figure_holds_the_numbers_and_names_every_line():
    curves = planted([0.0, 0.3, 0.6, 0.8, 1.0], draws=39)
    frame = curves.to_frame().query("size > 0")
    band, mean, line = curves.plot().data
    assert [*band.y] == pytest.approx([*frame["control_high"], *frame["control_low"][::-1]])
    assert [*mean.y] == pytest.approx([*frame["control"]])
    assert ([*line.x], [*line.y]) == ([*frame["size"]], [*frame["f"]])
    assert [*line.error_y.array] == pytest.approx([*(frame["high"] - frame["f"])])
    assert [*line.error_y.arrayminus] == pytest.approx([*(frame["f"] - frame["low"])])
    area = curves.areas().iloc[0]
    assert line.name == f"family (CPR {area['CPR']:.2f}, CMD {area['CMD']:.2f})"
    (label,) = curves.plot().layout.annotations
    apart = frame[frame["size"] < 1].set_index("size").eval("abs(f - control)")
    assert (label.text, 10**label.x) == ("family", pytest.approx(apart.idxmax()))
    assert label.y == pytest.approx(frame.set_index("size")["f"][apart.idxmax()])
    evil = replace(curves, families=("<b>bold</b>",)).plot()
    assert "<b>bold</b>" not in str(evil.layout.annotations) + evil.data[-1].name
    assert len(planted([0.0, 0.3, 0.6, 0.8, 1.0]).plot().data) == 1, "without random rankings, only the line"
