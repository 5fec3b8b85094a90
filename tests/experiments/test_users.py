"""Agreement within and between users, on planted maps."""

import numpy as np
import pytest
import torch

from dps_lens.scores import HeadScores
from experiments.q04_users import Users, correlations, others_heads, pairs_mean


def planted(own: float) -> HeadScores:
    """Five users of four examples: noise, a map that all share, and one of each user."""
    generator = torch.Generator().manual_seed(0)
    shared, owned = torch.randn(4, 8, generator=generator), torch.randn(5, 1, 4, 8, generator=generator)
    values = torch.randn(5, 4, 4, 8, generator=generator) * 0.5 + shared + own * owned
    ids = [f"u{user}" for user in range(5) for _ in range(4)]
    return HeadScores(values.reshape(20, 4, 8), example_ids=[str(i) for i in range(20)], user_ids=ids)


def test_a_users_own_map_shows_within_and_not_between():
    config = Users(n_splits=10)
    within, between = correlations(planted(1.0), config)
    assert (within - between).min() > 0.1
    within, between = correlations(planted(0.0), config)
    assert abs((within - between).mean()) < 0.05
    assert between.mean() > 0.7


def test_another_users_heads_are_never_ones_own(probe):
    scores = planted(1.0)
    users = [type("U", (), {"id": name}) for name in scores.users]
    for user, heads in others_heads(scores, users, Users(k=3)).items():
        assert heads.label != user
        assert heads == scores.top(3, heads.label)


def test_pairs_are_counted_once():
    matrix = np.array([[9.0, 1.0, 2.0], [1.0, 9.0, 3.0], [2.0, 3.0, 9.0]])
    assert pairs_mean(matrix) == pytest.approx(2.0)
