"""Heads, head sets, scores."""

import math

import pytest
import torch
from scipy.stats import skew, t

import dps_lens as dps
from dps_lens.errors import HeadError, ScoreError
from dps_lens.heads import Head, HeadSet
from dps_lens.scores import HeadScores
from dps_lens.selection import random_heads


def planted_scores(mean=None):
    """Six examples of three users, 3 layers × 2 heads; user b has one example."""
    noise = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(0))
    values = noise if mean is None else mean.expand(6, 3, 2).clone()
    return HeadScores(
        values,
        example_ids=[f"e{index}" for index in range(6)],
        user_ids=["a", "a", "a", "b", "c", "c"],
        components={"own": values * 2, "no_profile": values},
        nll={"own": torch.arange(6.0)},
        manifest={"against": "no_profile"},
    )


def test_sets_keep_order_and_names():
    heads = HeadSet.parse("L12H3, L4H0 L12H3", label="a")
    assert [str(head) for head in heads] == ["L12H3", "L4H0"]
    assert str(heads | HeadSet.parse("L0H1")) == "L12H3,L4H0,L0H1"
    assert str(heads & HeadSet.parse("L4H0,L9H9")) == "L4H0"
    assert str(heads - HeadSet.parse("L4H0")) == "L12H3"
    assert heads.jaccard(HeadSet.parse("L4H0,L0H0,L0H1")) == 1 / 4
    assert HeadSet().jaccard(HeadSet()) == 1.0
    assert (heads & HeadSet.parse("L4H0")).label == "a"
    assert heads[0] == Head(12, 3)
    assert str(heads[1:]) == "L4H0"
    with pytest.raises(HeadError, match="L12H3"):
        HeadSet.parse("12.3")


def test_mean_is_over_users_and_interval_is_students_t():
    scores = planted_scores()
    by_user = [scores.values[:3].mean(0), scores.values[3:4].mean(0), scores.values[4:].mean(0)]
    means = torch.stack(by_user).double()
    assert torch.allclose(scores.mean(), means.mean(0))
    low, high = scores.ci(0.9)
    half = t.ppf(0.95, 2) * means[:, 1, 1].std() / math.sqrt(3)
    assert float(high[1, 1]) == pytest.approx(float(means[:, 1, 1].mean() + half))
    assert float(low[1, 1]) == pytest.approx(float(means[:, 1, 1].mean() - half))
    assert torch.isnan(scores.ci(user="b")[0]).all()
    with pytest.raises(ScoreError, match="not in these scores"):
        scores.mean("nobody")


def test_skewness_is_over_users_or_examples():
    scores = planted_scores()
    means = torch.stack([scores.values[:3].mean(0), scores.values[3:4].mean(0), scores.values[4:].mean(0)]).double()
    assert float(scores.skewness()[1, 1]) == pytest.approx(skew(means[:, 1, 1].numpy(), bias=False))
    of_a = skew(scores.values[:3, 0, 1].double().numpy(), bias=False)
    assert float(scores.skewness("a")[0, 1]) == pytest.approx(of_a)
    assert torch.isnan(scores.skewness("b")).all(), "one example"
    assert torch.isnan(planted_scores(torch.zeros(3, 2)).skewness()).all(), "nothing varies"


def test_top_sorts_signed_values_with_ties_by_position():
    scores = planted_scores(torch.tensor([[0.0, 2.0], [2.0, -9.0], [1.0, 1.0]]))
    assert str(scores.top(4)) == "L0H1,L1H0,L2H0,L2H1"
    assert len(scores.top(0)) == 0
    with pytest.raises(HeadError, match="7 of 6"):
        scores.top(7)
    harmless = scores.top(4, max_task_cost=1.5)
    assert Head(0, 1) not in harmless


def test_saved_scores_come_back(tmp_path):
    scores = planted_scores()
    scores.save(tmp_path / "s")
    again = dps.HeadScores.load(tmp_path / "s")
    assert torch.equal(again.values, scores.values)
    assert again.user_ids == scores.user_ids
    assert again.example_ids == scores.example_ids
    assert torch.equal(again.components["no_profile"], scores.components["no_profile"])
    assert torch.equal(again.nll["own"], scores.nll["own"])
    made = again.manifest.pop("made")
    assert again.manifest == {"against": "no_profile"}
    assert made["dps_lens"] == dps.__version__
    frame = again.to_frame()
    assert list(frame["mean"]) == sorted(frame["mean"], reverse=True)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pkl", ".pt", ".tmp")]


def test_half_written_scores_do_not_load(tmp_path):
    planted_scores().save(tmp_path)
    file = tmp_path / "scores.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ScoreError, match="not a whole safetensors"):
        dps.HeadScores.load(tmp_path)
    with pytest.raises(ScoreError, match="holds no HeadScores"):
        dps.HeadScores.load(tmp_path / "empty")
    (tmp_path / "scores.json").write_text("{")
    with pytest.raises(ScoreError, match="not a whole HeadScores"):
        dps.HeadScores.load(tmp_path)


def test_random_heads_are_disjoint_and_layer_matched(llama):
    like = HeadSet.parse("L0H0,L0H2,L2H3")
    seen = set()
    for seed in range(20):
        drawn = random_heads(llama.hooked, like, seed=seed)
        assert not set(drawn) & set(like)
        assert sorted(head.layer for head in drawn) == [0, 0, 2]
        assert drawn == random_heads(llama.hooked, like, seed=seed)
        seen.add(str(drawn))
    assert len(seen) > 1
    with pytest.raises(HeadError, match="layer 0 has 1 heads"):
        random_heads(llama.hooked, HeadSet.parse("L0H0,L0H1,L0H2"))
    crowded = HeadSet.parse("L0H0,L0H1,L0H2")
    assert len(random_heads(llama.hooked, crowded, match="none")) == 3
    near = random_heads(llama.hooked, crowded, match="nearest")
    assert sorted(head.layer for head in near) == [0, 1, 1]
    assert not set(near) & set(crowded)
    assert random_heads(llama.hooked, like, match="nearest") == random_heads(llama.hooked, like)
    with pytest.raises(HeadError, match="7 heads asked for, 5 are outside"):
        random_heads(
            llama.hooked,
            HeadSet((layer, head) for layer in range(2) for head in range(4) if layer + head < 4),
            match="none",
        )


def test_parts_of_scores():
    values = torch.arange(5.0)[:, None, None].expand(5, 1, 2)
    scores = HeadScores(values, example_ids=list("abcde"), user_ids=list("uuvvu"), nll={"own": torch.arange(5.0)})
    assert scores.newest(1).example_ids == ("e", "d")
    assert scores.newest(2).example_ids == ("b", "e", "c", "d")
    assert scores.newest(1).nll["own"].tolist() == [4, 3]
    assert scores.newest(9).values[:, 0, 0].tolist() == [0, 1, 4, 2, 3]
    assert scores.without(["u"]).example_ids == ("c", "d")
    with pytest.raises(ScoreError, match="all of the 2 users"):
        scores.without("uv")
    with pytest.raises(HeadError, match="L5H0 is not in this model"):
        scores.top(1, exclude=HeadSet.parse("L5H0"))
