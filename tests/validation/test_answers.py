"""Which answers a model prefers: against plain Hugging Face, and against numbers that are known."""

import numpy as np
import oracles
import pandas as pd
import pytest
import torch

import dps_lens as dps
from dps_lens.data.conditions import donors_of
from dps_lens.errors import ScoreError

QUIET = dps.RunConfig(progress=False)
NAN = float("nan")


def test_every_answer_is_read_after_every_prompt(llama, probe, short):
    users = dps.make_pairs(probe[:4], n_rejected=2)  # of one other user or of two, which leaves two donors or one
    ranks = dps.rank_answers(llama.hooked, users, max_examples=1, prompt_config=short, run_config=QUIET)
    assert ranks.conditions == ["own", "no_profile", "other_user"]
    for row, user in enumerate(users):
        example = user.examples[-1]
        shown = {"own": ["own"], "no_profile": ["none"], "other_user": donors_of(example, users, 2, 0)}
        for name, profiles in shown.items():
            read = {key: nll[row] for key, nll in ranks.nll.items() if key.startswith(name)}
            assert sum(not torch.isnan(nll).all() for nll in read.values()) == len(profiles)
            for place, profile in enumerate(profiles):
                prompt = dps.build_prompt(llama.hooked, example, profile, config=short)
                expected = [oracles.nll(llama.plain, one) for one in prompt.answers]
                assert read[f"{name}.{place}" if place else name].tolist() == pytest.approx(expected, abs=1e-4)
                assert ranks.length[row].tolist() == [len(one.response_tokens) for one in prompt.answers]


def ranks_of(own, length, user_ids=("a", "a", "b"), **others):
    nll = {name: torch.tensor(values, dtype=torch.float64) for name, values in {"own": own, **others}.items()}
    return dps.AnswerRanks(
        nll, torch.tensor(length, dtype=torch.float64), user_ids=user_ids, example_ids=tuple(map(str, range(3)))
    )


def test_measures_are_what_they_say():
    """Examples of one user weigh together as much as one of another; donors are averaged; fewer answers are NaN."""
    own = [[1.0, 2.0, 3.0], [2.0, 1.0, NAN], [1.0, 1.0, NAN]]
    length = [[2.0, 2.0, 2.0], [3.0, 1.0, NAN], [1.0, 1.0, NAN]]
    ranks = ranks_of(own, length, other_user=own, **{"other_user.1": [[9.0, 2.0, 3.0], *own[1:]]})
    frame = ranks.to_frame().set_index(["condition", "measure"])["mean"]
    assert frame["own", "accuracy"] == pytest.approx(np.mean([np.mean([1, 0]), 0.5]))
    assert frame["own", "chance"] == pytest.approx(np.mean([np.mean([1 / 3, 1 / 2]), 1 / 2]))
    assert frame["own", "margin"] == pytest.approx(np.mean([np.mean([1.5, -1.0]), 0.0]))
    assert frame["other_user", "accuracy"] == pytest.approx(np.mean([np.mean([0.5, 0]), 0.5]))
    assert frame["own − other_user", "accuracy"] == pytest.approx(0.125)
    first = np.exp([-2.0, -4.0, -6.0])
    second = np.exp([-6.0, -1.0])
    shares = [first[0] / first.sum(), second[0] / second.sum(), 0.5]
    assert frame["own", "probability"] == pytest.approx(np.mean([np.mean(shares[:2]), shares[2]]))
    sure = [shares[0] - 1, 1 - shares[1], 0.5 - 0.5]
    assert frame["own", "overconfidence"] == pytest.approx(np.mean([np.mean(sure[:2]), sure[2]]))
    summed = ranks.to_frame(per_token=False).set_index(["condition", "measure"])
    assert summed.loc[("own", "margin"), "mean"] == pytest.approx(np.mean([np.mean([3.0, -5.0]), 0.0]))
    assert summed.loc[("own", "margin"), "unit"] == "nats"
    assert summed.loc[("own", "probability"), "mean"] == pytest.approx(frame["own", "probability"])


def test_a_calibrated_model_is_not_overconfident():
    """The own answer is drawn as the model says it is."""
    rng = np.random.default_rng(0)
    likelier = rng.uniform(0.5, 0.95, 4000)
    own_is_it = rng.uniform(size=4000) < likelier
    margin = np.log(likelier / (1 - likelier)) * np.where(own_is_it, 1, -1)
    values = torch.tensor(np.stack([-margin, np.zeros(4000)], 1))
    users = tuple(str(index // 40) for index in range(4000))
    ones = torch.ones(4000, 2, dtype=torch.float64)
    for sure, calibrated in ((1.0, True), (3.0, False)):
        ranks = dps.AnswerRanks({"own": sure * values}, ones, user_ids=users, example_ids=users)
        row = ranks.to_frame().set_index("measure").loc["overconfidence"]
        assert (row["low"] < 0 < row["high"]) == calibrated


def test_ranks_are_kept_and_read_again(llama, probe, short, tmp_path):
    users = dps.make_pairs(probe[:3])
    options = {"max_examples": 1, "prompt_config": short, "run_config": QUIET, "out": tmp_path / "run"}
    ranks = dps.rank_answers(llama.hooked, users, **options)
    read = dps.AnswerRanks.load(tmp_path / "run")
    pd.testing.assert_frame_equal(read.to_frame(), ranks.to_frame())
    pd.testing.assert_frame_equal(
        dps.rank_answers(llama.hooked, users, **options).by_user("accuracy"), ranks.by_user("accuracy")
    )
    alone = dps.rank_answers(llama.hooked, users[:1], max_examples=1, prompt_config=short, run_config=QUIET)
    assert alone.conditions == ["own", "no_profile"]
    with pytest.raises(ScoreError, match="use one of accuracy"):
        ranks.by_user("calibration")
    with pytest.raises(ScoreError, match="n_donors"):
        dps.rank_answers(llama.hooked, users, n_donors=-1)
    with pytest.raises(ScoreError, match="make_pairs"):
        dps.rank_answers(llama.hooked, probe[:2], run_config=QUIET)
