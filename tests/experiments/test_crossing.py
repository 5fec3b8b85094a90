"""Effects of style and topic: donors, contrasts, and intervals within cells."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import t

import dps_lens as dps
from dps_lens.errors import DataError
from dps_lens.scoring import single_heads
from experiments.lib.crossing import SHARED, conditions, contrasts, donor, within_cells
from experiments.lib.measured import changes


def test_donors_share_what_they_should(probe):
    for user in probe:
        for condition, (style, topic) in SHARED.items():
            found = donor(user.examples[0], probe, condition, 0)
            assert (found.labels["style"] == user.labels["style"]) is style
            assert (found.labels["topic"] == user.labels["topic"]) is topic
            assert (found.id == user.id) is (condition == "own")


def test_users_without_labels_are_refused(toy_users):
    with pytest.raises(DataError, match="labels"):
        donor(toy_users[0].examples[0], toy_users, "style", 0)


def test_contrasts_recover_planted_effects():
    conditions = {
        name: torch.tensor([3.0 * style + 2.0 * topic + 0.5 * (style and topic)]).double()
        for name, (style, topic) in SHARED.items()
    }
    found = {name: float(value) for name, value in contrasts(conditions).items()}
    assert found == {"style": 3.25, "topic": 2.25, "interaction": 0.5}


def test_cells_are_fixed():
    rng = np.random.default_rng(0)
    cells = [name for name in "abcd" for _ in range(3)]
    noise = rng.normal(size=12)
    values = torch.tensor(noise + np.repeat([0.0, 100.0, -50.0, 7.0], 3))
    design = np.kron(np.eye(4), np.ones((3, 1)))
    beta, (residual,), *_ = np.linalg.lstsq(design, values.numpy(), rcond=None)
    weights = np.full(4, 0.25)
    error = (residual / 8 * weights @ np.linalg.inv(design.T @ design) @ weights) ** 0.5
    found = within_cells(values, cells)
    assert found["mean"] == pytest.approx(float(beta.mean()))
    assert found["high"] - found["mean"] == pytest.approx(t.ppf(0.975, 8) * error)


def test_the_head_that_reads_signatures_responds_to_style(toy_model, toy_users, tmp_path):
    """Users 0 and 1, and 2 and 3, are given one signature each: a style that two authors share."""
    labels = [("s0", "t0"), ("s0", "t1"), ("s1", "t0"), ("s1", "t1")]
    signatures = {"s0": "sig0", "s1": "sig2"}

    def retold(user, style):
        def title(text):
            return " ".join([signatures[style], *text.split()[1:]])

        history = tuple(replace(d, fields={**d.fields, "title": title(d.fields["title"])}) for d in user.history)
        examples = tuple(replace(e, reference=title(e.reference), profile=history) for e in user.examples)
        return replace(user, history=history, examples=examples)

    users = [
        replace(retold(user, style), labels={"style": style, "topic": topic})
        for user, (style, topic) in zip(toy_users, labels, strict=False)
    ]
    examples = [user.examples[0] for user in users]
    shown = conditions(toy_model, users, dps.PromptConfig(), 0)
    effects, nll = changes(toy_model, examples, shown, lambda _: single_heads(2, 4), {}, tmp_path)
    found = contrasts(effects)
    style = found["style"].mean(0).reshape(2, 4)
    assert float(style[1, 2]) == float(style.max()) > 0.5
    assert abs(float(found["topic"].mean(0).reshape(2, 4)[1, 2])) < 0.1 * float(style.max())
    assert float(contrasts({name: -value for name, value in nll.items()})["style"].mean()) > 0.5
