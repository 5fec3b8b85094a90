"""What carries over: planted maps of users and depths."""

import numpy as np
import pytest
import torch

from dps_lens.scores import HeadScores
from experiments.q08_transfer import by_layer, cached, depth_row, part, similarity


def scores_of(values: torch.Tensor, ids: list[str]) -> HeadScores:
    return HeadScores(values, example_ids=[str(i) for i in range(len(ids))], user_ids=ids)


def test_halves_of_time_leave_the_middle_out():
    scores = scores_of(torch.arange(8.0)[:, None, None].expand(8, 2, 3), ["a"] * 5 + ["b"] * 3)
    assert part(scores, newer=False).example_ids == ("0", "1", "5")
    assert part(scores, newer=True).example_ids == ("3", "4", "7")


def test_depth_is_where_the_positive_scores_lie():
    values = torch.zeros(2, 3, 4)
    values[:, 2, 1], values[:, 0, 0] = 3.0, -5.0
    assert by_layer(scores_of(values, ["a", "b"])).tolist() == [0.0, 0.0, 1.0]
    assert depth_row(scores_of(values, ["a", "b"]))["mean depth"] == pytest.approx(1.0)


def test_users_who_are_alike_in_both_are_found():
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(3, 40))
    users = np.repeat([0, 1, 2], 4)
    one = kinds[users] + 0.3 * rng.normal(size=(12, 40))
    two = (kinds @ rng.normal(size=(40, 60)))[users] + 0.3 * rng.normal(size=(12, 60))
    assert similarity(one, two) > 0.5
    assert abs(similarity(one, rng.permutation(two))) < 0.4


def test_a_second_model_is_taken_where_the_cache_holds_its_weights(tmp_path):
    names = ("some/half", "some/whole")
    for name, files in zip(names, (["config.json"], ["config.json", "model.safetensors"]), strict=True):
        place = tmp_path / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("abc")
        (place / "snapshots" / "abc").mkdir(parents=True)
        for file in files:
            (place / "snapshots" / "abc" / file).write_text("{}")
    assert cached(names, tmp_path) == "some/whole"
    assert cached(names[:1], tmp_path) is None
    assert cached(("some/other",), tmp_path) is None
