"""Head atlases: what they hold of anybody, and how far two agree."""

import json
import random
from pathlib import Path

import plants
import pytest
import torch

import dps_lens as dps
from dps_lens.atlas import chance_jaccard
from dps_lens.errors import ScoreError
from dps_lens.heads import HeadSet


@pytest.fixture(scope="module")
def scores(planted):
    one = planted("one")
    return dps.score_heads(one.model, one.users, max_examples=2)


@pytest.fixture(scope="module")
def found(planted):
    one = planted("redundant")
    return dps.find_heads(one.model, one.users, 2, method="rank", max_examples=1)


def test_an_atlas_holds_heads_and_settings_and_nothing_of_users(scores, planted, tmp_path):
    atlas = scores.publish(tmp_path, k=4)
    again = dps.load_atlas(tmp_path)
    assert again.heads == atlas.heads == scores.top(4)
    low, high = scores.ci()
    assert torch.allclose(again.low, low.float(), atol=1e-6)
    assert torch.allclose(again.high, high.float(), atol=1e-6)
    assert (again.n_users, again.n_examples) == (len(scores.users), len(scores.values))
    assert again.manifest["method"] == "integrated"
    assert again.manifest["model"]["n_layers"] == plants.N_LAYERS
    assert "place,name,value,low,high" in (tmp_path / "heads.csv").read_text()
    written = (tmp_path / "atlas.json").read_text() + (tmp_path / "heads.csv").read_text()
    tokens = {word for user in planted("one").users for word in (user.id, *(one.id for one in user.history))}
    assert not [word for word in tokens if json.dumps(word) in written or f"{word}|" in written]
    assert str(tmp_path.parent) not in written
    assert "command" not in written


def test_a_set_brings_its_inclusion(found, tmp_path):
    atlas = found.publish(tmp_path)
    frame = dps.load_atlas(tmp_path).to_frame()
    assert frame["name"].tolist() == [str(head) for head in found.heads]
    assert frame["inclusion"].tolist() == pytest.approx([found.inclusion[head].frequency for head in found.heads])
    assert atlas.expected_jaccard() == pytest.approx(1.0, abs=0.1)
    assert atlas.low.isnan().all()


def test_two_runs_of_other_seeds_agree_as_their_inclusion_says(planted, found, tmp_path):
    one = planted("redundant")
    other = dps.find_heads(one.model, one.users, 2, method="rank", max_examples=1, seed=1)
    agreed = dps.compare_atlas(found.publish(tmp_path / "a"), other.publish(tmp_path / "b"))
    assert agreed["jaccard"] == pytest.approx(agreed["expected"], abs=0.1)
    assert agreed["k"] == 2
    assert agreed["differ"] == {"seed": (0, 1)}
    assert agreed["spearman"] > 0.3


def test_expected_overlap_is_that_of_independent_choices():
    """By simulation: sets that hold each head with its own frequency."""
    inclusion = torch.tensor([[0.9, 0.8, 0.2], [0.1, 0.5, 0.5]])
    values = torch.zeros(2, 3)
    atlas = dps.Atlas(HeadSet.parse("L0H0"), values, values, values, inclusion, 1, 1)
    rng = random.Random(0)
    shares = inclusion.flatten().tolist()

    def draw():
        return {place for place, share in enumerate(shares) if rng.random() < share}

    pairs = [(draw(), draw()) for _ in range(20000)]
    shared = sum(len(a & b) for a, b in pairs) / sum(len(a | b) for a, b in pairs)
    assert atlas.expected_jaccard() == pytest.approx(shared, abs=0.01)


def test_chance_is_that_of_random_sets():
    rng = random.Random(0)
    found = []
    for _ in range(20000):
        a, b = (set(rng.sample(range(30), 5)) for _ in range(2))
        found.append(len(a & b) / len(a | b))
    assert chance_jaccard(5, 30) == pytest.approx(sum(found) / len(found), abs=0.005)


def test_atlases_of_other_sizes_or_lengths_are_not_compared(scores, tinies, probe, tmp_path):
    atlas = scores.publish(tmp_path / "a", k=3)
    other = dps.Atlas(HeadSet.parse("L0H0"), *(torch.zeros(2, 2),) * 3, torch.empty(0), 1, 1)
    with pytest.raises(ScoreError, match="do not correspond"):
        dps.compare_atlas(atlas, other)
    with pytest.raises(ScoreError, match="both list 3"):
        dps.compare_atlas(atlas, atlas, k=4)
    with pytest.raises(ScoreError, match="no folder"):
        dps.load_atlas(tmp_path / "nowhere")


def test_the_atlas_that_ships_is_of_the_embedded_model_and_holds_no_text(probe):
    atlas = dps.load_atlas("smollm2-135m")
    assert atlas.values.shape == (30, 9)
    assert "SmolLM2-135M" in atlas.model
    assert 0 < len(atlas.heads) <= 10
    assert atlas.n_users == len(probe)
    frame = atlas.to_frame()
    assert bool(((frame["inclusion"] >= 0) & (frame["inclusion"] <= 1)).all())
    assert 0 < atlas.expected_jaccard() <= 1
    folder = Path(dps.__file__).parent / "atlases" / "smollm2-135m"
    written = "".join(file.read_text(encoding="utf-8") for file in folder.iterdir() if file.suffix in (".json", ".csv"))
    assert not [user.id for user in probe if user.id in written]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 50_000
