"""Profiles of few, foreign and shuffled items, and the slopes over them."""

import numpy as np
import pytest

from dps_lens.data import PromptConfig, build_prompt
from experiments.q05_samples import Samples, levels, shuffled, slope


def test_levels_hold_what_they_say(probe, tinies):
    config = Samples(items=(1, 4), mixed=4, foreign=(0, 2, 4))
    example, own = probe[0].examples[0], {document.id for document in probe[0].history}
    found = levels(example, probe, config)
    shares = {
        name: sum(d.id in own for d in shown.profile) for name, (shown, kind, _) in found.items() if kind == "own"
    }
    assert shares == {
        "1 items": 1,
        "4 items": 4,
        "0 of 4 foreign": 4,
        "2 of 4 foreign": 2,
        "4 of 4 foreign": 0,
        "shuffled words": 4,
    }
    shown = found["2 of 4 foreign"][0]
    prompt = build_prompt(tinies("llama").hooked, shown, config=PromptConfig(items=4, profile_tokens=300))
    assert set(prompt.shown) == {document.id for document in shown.profile}


def test_shuffling_keeps_the_words(probe):
    document = probe[0].history[0]
    mixed = shuffled(document, 0)
    assert mixed == shuffled(document, 0)
    assert mixed.fields["text"] != document.fields["text"]
    assert sorted(mixed.fields["text"].split()) == sorted(document.fields["text"].split())


def test_slopes_are_least_squares():
    x, y = np.array([0.0, 1.0, 3.0]), np.random.default_rng(0).normal(size=(3, 2))
    assert slope(x, y) == pytest.approx([np.polyfit(x, y[:, 0], 1)[0], np.polyfit(x, y[:, 1], 1)[0]])
