"""Users who number their documents alike: every call tells their examples apart."""

import pytest
import toy
from pcs import score_pcs

import dps_lens as dps
from dps_lens.errors import EvaluationError, ScoreError

SETS = {"preference": [dps.HeadSet([toy.CARRIER])]}


@pytest.fixture(scope="module")
def users():
    return dps.load_users([record | {"id": record["id"].split("-")[1]} for record in toy.records()])


@pytest.mark.full
def test_scores_and_effects_are_those_of_distinct_ids(toy_model, toy_users, users, short):
    ids = [[document.id for document in user.history] for user in users]
    assert ids[0] == ids[1], "the ids are those of every user"
    options = {"prompt_config": short, "run_config": dps.RunConfig(progress=False)}
    for against in (None, "no_profile"):
        scores = [score_pcs(toy_model, of, against=against, **options) for of in (users, toy_users)]
        assert scores[0].values.equal(scores[1].values)
    found = score_pcs(toy_model, users, against="other_user", max_examples=1, **options)
    assert len(found.user_ids) == len(users)
    assert found.manifest["examples"] == [f"{u}|{e}" for u, e in zip(found.user_ids, found.example_ids, strict=True)]
    effects = dps.ablation_curve(toy_model, users[:4], SETS, ks=(1,), n_random=1, prompt_config=short, max_examples=1)
    assert "gain_removed_other" in effects.measures


def test_shards_are_put_together_in_the_order_of_the_whole(toy_model, users, short, tmp_path):
    options = {"prompt_config": short, "run_config": dps.RunConfig(progress=False), "max_examples": 1, "against": None}
    whole = score_pcs(toy_model, users, **options)
    for index in (1, 2):
        score_pcs(toy_model, users, out=tmp_path / str(index), engine=dps.Shard(index, 2), **options)
    dps.merge_runs([tmp_path / "1", tmp_path / "2"], tmp_path / "merged")
    merged = dps.HeadScores.load(tmp_path / "merged")
    assert (merged.user_ids, merged.example_ids) == (whole.user_ids, whole.example_ids)
    assert merged.values.equal(whole.values)


def test_a_grid_asks_for_the_user_where_ids_are_equal(toy_model, users, short):
    grid = dps.steering_grid(
        toy_model, users[:2], SETS["preference"][0], gammas=(1.0,), ks=(1,), prompt_config=short, max_new_tokens=2
    )
    asked = users[0].examples[-1]
    assert asked.id == users[1].examples[-1].id
    assert grid.references == {f"{user.id}|{asked.id}": user.examples[-1].reference for user in users[:2]}
    with pytest.raises(EvaluationError, match=r"2 users have an example .*; give user="):
        grid.find(asked.id, 1.0, 1)
    assert grid.find(asked.id, 1.0, 1, user=users[1].id).user == users[1].id


def test_users_without_discovery_examples_are_left_out_with_a_count(toy_model, users, short):
    from dataclasses import replace

    silent = [replace(user, history=user.history[:2]) for user in users[:1]]
    options = {"prompt_config": short, "run_config": dps.RunConfig(progress=False), "max_examples": 1, "against": None}
    with pytest.warns(UserWarning, match=rf"score_heads: 1 user is left out \('{users[0].id}'\)"):
        found = score_pcs(toy_model, [*silent, *users[1:3]], **options)
    assert found.users == tuple(user.id for user in users[1:3])
    with pytest.raises(ScoreError, match=f"user '{users[0].id}' has no discovery example"):
        score_pcs(toy_model, [*silent, *users[1:3]], score_config=dps.ScoreConfig(strict=True), **options)
    with pytest.warns(UserWarning, match="ablation_curve: 1 user is left out"):
        dps.ablation_curve(
            toy_model, [replace(users[0], examples=()), *users[1:3]], SETS, ks=(1,), n_random=0, prompt_config=short
        )
