"""What is done with a set that was found: tested, compared, kept, shown."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import dps_lens as dps
from dps_lens.errors import HeadError, ScoreError
from dps_lens.found import Inclusion
from dps_lens.heads import Head, HeadSet
from dps_lens.selection import rankings

SHORT = dps.PromptConfig(items=3, profile_tokens=60, task_tokens=30, response_tokens=8)
FREE = {"max_task_cost": None, "max_neutral_cost": None}
OPTIONS = {
    "method": "rank",
    **FREE,
    "max_examples": 1,
    "prompt_config": SHORT,
    "find_config": dps.FindConfig(n_donors=1, n_bootstraps=8),
}


@pytest.fixture(scope="module")
def people(probe):
    return probe[:4]


@pytest.fixture(scope="module")
def found(tinies, people):
    return dps.find_heads(tinies("llama").hooked, people, 3, **OPTIONS)


def sets(*names):
    return tuple(HeadSet.parse(one, "found") for one in names)


@pytest.fixture
def planted():
    """Three users, each left out by a fold of its own, whose sets are known."""
    heads, *by_fold = sets("L0H1,L1H0", "L0H1,L1H1", "L1H0,L0H1", "L0H0,L1H1")
    return dps.FoundHeads(
        heads,
        torch.arange(4.0).reshape(2, 2),
        roles={"facilitating": heads, "interfering": HeadSet.parse("L0H0")},
        folds=[["a"], ["b"], ["c"]],
        by_fold=by_fold,
        resampled=sets("L0H1,L1H0", "L0H1", "L1H1,L0H1", "L0H1,L1H0"),
        example_ids=["1", "2", "3", "4"],
        user_ids=["a", "a", "b", "c"],
        effects={"necessity": torch.tensor([1.0, 3.0, 4.0, 6.0]).double()},
        crossed={"necessity": torch.tensor([0.0, 2.0, 4.0, 1.0]).double()},
    )


def test_inclusion_has_wilsons_interval(planted):
    assert planted.inclusion == {
        Head(0, 1): Inclusion(4, 4),
        Head(1, 0): Inclusion(2, 4),
        Head(1, 1): Inclusion(1, 4),
        Head(0, 0): Inclusion(0, 4),
    }
    z = 1.959963984540054
    for one in planted.inclusion.values():
        p, n = one.chosen / one.of, one.of
        middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        assert one.frequency == p
        assert one.ci() == pytest.approx((middle - half, middle + half), abs=1e-9)
    with pytest.raises(ScoreError, match="level is a share"):
        Inclusion(1, 2).ci(95.0)


def test_evidence_weighs_users_equally(planted):
    frame = planted.evidence().set_index("sample")
    means = np.array([2.0, 4.0, 6.0])
    half = 4.302652729911275 * means.std(ddof=1) / np.sqrt(3)  # t of two degrees of freedom, 0.975
    assert frame.loc["in-sample", ["mean", "low", "high"]].tolist() == pytest.approx([4.0, 4.0 - half, 4.0 + half])
    assert frame.loc["crossed", "mean"] == pytest.approx((1 + 4 + 1) / 3)


def test_of_user_is_the_set_that_others_chose(planted):
    assert [str(planted.of_user(user)) for user in "abcd"] == ["L0H1,L1H1", "L1H0,L0H1", "L0H0,L1H1", "L0H1,L1H0"]
    assert str(planted.top(1, "c")) == "L0H0"
    assert planted.top(2, label="mine").label == "mine"
    with pytest.raises(HeadError, match="the set holds 2 heads, asked for 3"):
        planted.top(3)


def test_frame_holds_every_head_that_a_fit_chose(planted):
    frame = planted.to_frame().set_index("name")
    assert frame.index.tolist() == ["L0H1", "L1H0", "L1H1", "L0H0"]
    assert frame["place"].tolist()[:2] == [1, 2]
    assert frame["place"].isna().tolist() == [False, False, True, True]
    assert frame["value"].tolist() == [1.0, 2.0, 3.0, 0.0]
    assert frame["role"].tolist() == ["facilitating", "facilitating", "", "interfering"]
    assert frame["inclusion"].tolist() == [1.0, 0.5, 0.25, 0.0]
    assert frame["folds"].tolist() == [2, 1, 2, 1]


def test_save_and_load(planted, found, tmp_path):
    for name, one in (("planted", planted), ("found", found)):
        one.save(tmp_path / name)
        again = dps.FoundHeads.load(tmp_path / name)
        assert again.heads == one.heads
        assert again.heads.shape == one.heads.shape
        assert torch.equal(again.values, one.values)
        assert (again.folds, again.by_fold, again.resampled) == (one.folds, one.by_fold, one.resampled)
        assert again.to_frame().equals(one.to_frame())
        assert again.evidence().equals(one.evidence())
        assert again.summary() == one.summary()
        assert again.roles == one.roles
        assert "L" in again._repr_html_()


def test_shapes_are_checked(planted):
    for wrong in ({"user_ids": ["a"]}, {"folds": []}, {"nll": {"own": torch.zeros(3)}}):
        with pytest.raises(ScoreError, match="FoundHeads: "):
            replace(planted, **wrong)


def test_nobody_is_tested_with_heads_that_the_same_person_chose(llama, people, found, probe):
    users = [*people, probe[5]]
    with pytest.raises(HeadError, match="was found for k=3, asked for 4 heads"):
        dps.ablation_curve(llama.hooked, users, {"found": found}, ks=(4,))
    effects = dps.ablation_curve(llama.hooked, users, {"found": found}, ks=(1, 2), n_random=0, max_examples=1)
    tested = effects.manifest["sets"]["found"]
    assert len(set(map(str, found.by_fold))) > 1, "folds differ"
    for user in people:
        (own,) = (heads for fold, heads in zip(found.folds, found.by_fold, strict=True) if user.id in fold)
        assert tested[user.id] == [str(own[:1]), str(own[:2])]
    assert tested[probe[5].id] == [str(found.heads[:1]), str(found.heads[:2])]
    assert effects.manifest["prompt_config"] == SHORT.to_dict()
    assert effects.manifest["ablation"] == "zero"
    again = dps.ablation_curve(
        llama.hooked,
        users,
        {"found": {user.id: found.of_user(user.id) for user in users}},
        ks=(1, 2),
        n_random=0,
        max_examples=1,
        prompt_config=SHORT,
    )
    assert torch.equal(again.chosen["own"], effects.chosen["own"])


def test_a_set_that_its_users_chose_alone_does_not_test_them(llama, people, probe):
    config = replace(OPTIONS["find_config"], folds=False)
    found = dps.find_heads(llama.hooked, people, 2, **(OPTIONS | {"find_config": config}))
    with pytest.raises(ScoreError, match="family 'found' was chosen by user 'asker-bread', who is tested"):
        rankings("ablation_curve", {"found": found}, people, (1,))
    sets, _ = rankings("ablation_curve", {"found": found}, probe[5:7], (1,))
    assert {str(one) for (one,) in sets["found"].values()} == {str(found.heads[:1])}


def test_settings_are_inherited_and_held_out_examples_checked(llama, people, found):
    with pytest.raises(ScoreError, match=r"prompt_config .*pass its heads, found\.heads"):
        dps.ablation_curve(llama.hooked, people, {"found": found}, ks=(1,), prompt_config=dps.PromptConfig(items=1))
    with pytest.raises(ScoreError, match="found for all users together; use select='global'"):
        dps.ablation_curve(llama.hooked, people, {"found": found}, ks=(1,), select="user")
    config = dps.HeldOutConfig(exclude={"found": HeadSet.parse("L0H0")})
    with pytest.raises(ScoreError, match="exclude needs scores for family 'found'"):
        dps.ablation_curve(llama.hooked, people, {"found": found}, ks=(1,), held_out_config=config)
    labelled = replace(OPTIONS["find_config"], discovery="labelled")
    seen = dps.find_heads(llama.hooked, people, 1, **(OPTIONS | {"find_config": labelled}))
    with pytest.raises(ScoreError, match="the heads were chosen on 4 of these examples"):
        dps.ablation_curve(llama.hooked, people, {"found": seen}, ks=(1,))


def test_other_uses(llama, people, found):
    patched = dps.patch_heads(llama.hooked, people, {"found": found}, ks=(2,), n_random=0, max_examples=1)
    assert patched.manifest["sets"]["found"][people[0].id] == [str(found.of_user(people[0].id)[:2])]
    between = dps.overlap({"found": found, "other": HeadSet.parse("L0H0,L0H1,L0H2")}, n_null=20)
    assert between.sets["found"] == found.heads
    prompt = dps.build_prompt(llama.hooked, people[0].examples[0], profile="own", config=SHORT)
    written = dps.generate(llama.hooked, [prompt], heads=found.heads, gamma=1.0, max_new_tokens=3)
    assert len(written.texts) == 1


def test_cost_of_a_found_set_tests_each_user_with_what_others_chose(llama, people, found):
    options = {"n_random": 2, "max_examples": 1, "held_out_config": dps.HeldOutConfig(patched=False)}
    cost = dps.ablation_cost(llama.hooked, people, found, **options)
    assert cost.sets("found") == {user.id: found.of_user(user.id) for user in people}
    curve = dps.ablation_curve(llama.hooked, people, {"found": found}, ks=(found.k,), **options)
    for name, changes in cost.chosen.items():
        assert torch.allclose(changes, curve.chosen[name], atol=1e-6)
    leaking = replace(found, example_ids=[user.examples[-1].id for user in people])
    with pytest.raises(ScoreError, match="the heads were chosen on 4"):
        dps.ablation_cost(llama.hooked, people, leaking, **options)


def test_a_set_that_bounds_kept_short_is_tested_whole(llama, people, found):
    short = replace(found, by_fold=[heads[:1] for heads in found.by_fold])
    effects = dps.ablation_curve(llama.hooked, people, {"found": short}, ks=(1, 3), n_random=0, max_examples=1)
    for user in people:
        assert effects.sets("found", 3)[user.id].heads == short.of_user(user.id).heads
    assert torch.equal(effects.chosen["own"][:, 0, 0], effects.chosen["own"][:, 0, 1])


def test_a_found_set_is_a_family_of_the_page(llama, people, found):
    scores = dps.score_heads(llama.hooked, people, max_examples=1, prompt_config=SHORT)
    shown = {"gammas": (1.0,), "ks": (1,), "max_users": 1, "max_new_tokens": 2, "k": 2}
    page = dps.explore(llama.hooked, people, scores, families={"found": found}, **shown)
    assert torch.equal(page.families["found"].mean(), found.values.double())
    assert page.families["found"].top(1).heads == found.heads.heads[:1]
