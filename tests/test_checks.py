"""Settings that are numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dps_lens.checks import check_flag, check_number, check_seed, check_whole
from dps_lens.errors import SteeringError


@pytest.mark.parametrize(
    "value", [True, "1", None, [1.0], math.nan, math.inf, -math.inf, 1j, -(10**400), np.float32("nan")]
)
def test_what_is_no_number_is_refused(value):
    with pytest.raises(SteeringError, match="call: knob .* is not a number"):
        check_number(SteeringError, "call: knob", value)
    with pytest.raises(SteeringError, match="call: knob .* is not a whole number from 0 up"):
        check_whole(SteeringError, "call: knob", value, least=0)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_bounds_are_in_or_out(value):
    def passes(**bounds):
        try:
            check_number(SteeringError, "knob", value, **bounds)
        except SteeringError:
            return False
        return True

    assert passes(least=-1, most=2) is (-1 <= value <= 2)
    assert passes(above=0, most=1) is (0 < value <= 1)
    assert passes()


def numbers_from(seed):
    return torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()


@given(st.integers())
def test_seeds_are_those_of_torch_and_tell_numbers_apart(value):
    try:
        check_seed(SteeringError, "seed", value)
    except SteeringError:
        assert not 0 <= value < 2**32
    else:
        assert numbers_from(value) == numbers_from(value + 2**32), "torch reads 32 bits"
        assert numbers_from(value) != numbers_from(value ^ 1)


def test_numbers_of_numpy_are_numbers():
    check_number(SteeringError, "knob", np.float32(0.5), above=0)
    check_whole(SteeringError, "knob", np.int64(3), least=1, most=3)
    with pytest.raises(SteeringError, match=r"knob 2\.0 is not a whole number from 1 to 3; why"):
        check_whole(SteeringError, "knob", 2.0, least=1, most=3, why="why")
    check_flag(SteeringError, "knob", False)
    with pytest.raises(SteeringError, match="knob 'no' is neither True nor False"):
        check_flag(SteeringError, "knob", "no")
