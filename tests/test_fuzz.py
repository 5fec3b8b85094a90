"""No damaged or hostile file ends in a traceback, hangs, or gives other numbers than were written."""

from collections import Counter

import pytest
from fuzz import Target, fuzz, tried


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


def key_error(folder):
    raise KeyError("planted")


def endless(folder):
    while True:
        pass


@pytest.mark.parametrize(
    ("read", "signed", "found"),
    [
        (key_error, False, "KeyError: 'planted'"),
        (endless, False, "Hang: more than 0.2 s"),
        (lambda folder: "other", True, "a was read, and holds something else"),
        (lambda folder: "whole", True, None),
    ],
)
def test_the_fuzzer_sees_faults(read, signed, found, monkeypatch):
    monkeypatch.setattr("fuzz.SECONDS", 0.2)
    wrong = tried(Target("planted", {"a": b'{"a": 1}'}, read, signed), "whole", "seed", Counter())
    assert wrong is None if found is None else found in wrong
