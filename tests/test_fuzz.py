"""No damaged or hostile file ends in a traceback, hangs, or gives other numbers than were written."""

import pytest
from fuzz import fuzz


def check(n, seed):
    failures, outcomes = fuzz(n, seed)
    assert not failures, "\n".join(failures)
    assert outcomes["refused"] > 0.5 * n
    assert outcomes["read"] > 0.02 * n, "some damage does no harm"


def test_some_damaged_files():
    check(440, seed=1)


@pytest.mark.full
def test_many_damaged_files():
    check(5000, seed=2)
