"""Curves, patches and vectors of head sets against plain Hugging Face, and on a model of known answer."""

import random
import re
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import toy
from conftest import no_hooks_left
from folders import digest
from oracles import attention_modules, columns_replaced, edited_positions, output_projection, z_of
from scipy.stats import skew
from torch.nn.functional import cross_entropy

import dps_lens as dps
from dps_lens.data import build_prompt
from dps_lens.data.conditions import donors_of, neutral_prompt
from dps_lens.data.copied import copied_tokens
from dps_lens.errors import FileError, HeadError, PromptError, RunError, ScoreError
from dps_lens.heads import Head, HeadSet
from dps_lens.plots import ablation as plot
from dps_lens.scores import HeadScores
from dps_lens.scoring import CleanRun
from dps_lens.selection import draw_seed, folds, rankings
from dps_lens.validation.edits import EditWork
from dps_lens.validation.effects import SetEffects

# Nats per token. Float32 losses of a few nats, from a cache and from a whole forward, differ by 1e-6 to 1e-5; effects
# are differences of two of them, and those that are tested are above 1e-2.
TOLERANCE = 1e-4
HEADS = HeadSet.parse("L1H2,L0H1,L2H3")
NEUTRAL = ("The tide comes in twice a day, and nobody at the harbour looks up when it does. " * 6,)
CARRIER = Head(*toy.CARRIER)
SETS = {"carrier": HeadSet([CARRIER]), "other": HeadSet.parse("L0H1")}


@pytest.fixture(scope="module")
def users(probe):
    """Two users with two evaluation examples, and one with one."""
    return [*probe[:2], replace(probe[5], examples=probe[5].examples[:1])]


@contextmanager
def replaced(plain, heads, d_head, positions, new):
    """Columns of several heads, replaced by `new(layer)[:, columns]`, or by zeros."""
    with ExitStack() as stack:
        for layer, head in heads:
            columns = slice(head * d_head, (head + 1) * d_head)
            value = new(layer)[:, columns] if new else 0.0
            stack.enter_context(columns_replaced(plain, layer, head, d_head, positions, value))
        yield


@torch.no_grad()
def losses(plain, prompt):
    start, stop = prompt.spans["response"]
    logits = plain(input_ids=prompt.tokens[None]).logits[0, start - 1 : stop - 1].double()
    return cross_entropy(logits, prompt.tokens[start:stop], reduction="none")


def copied_by_search(response, profile, n):
    """Naive string search: does the n-gram that ends here stand anywhere in the profile?"""
    text = " " + " ".join(map(str, profile)) + " "
    ends = [" " + " ".join(map(str, response[max(i - n + 1, 0) : i + 1])) + " " in text for i in range(len(response))]
    return torch.tensor([float(i >= n - 1 and end) for i, end in enumerate(ends)], dtype=torch.float64)


def parts(changes, own):
    """All tokens, and those copied from the profile of the own prompt."""
    start, stop = own.spans["profile"]
    copied = copied_by_search(own.response_tokens.tolist(), own.tokens[start:stop].tolist(), 2)
    return [float(changes.mean()), float((changes * copied).sum() / len(changes))]


def close(got, expected):
    assert torch.as_tensor(got).tolist() == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("positions", ["response", "all"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_curve_equals_plain_hugging_face(tinies, users, short, architecture, positions):
    tiny = tinies(architecture)
    model, plain, d_head = tiny.hooked, tiny.plain, tiny.hooked.cfg.d_head
    effects = dps.ablation_curve(
        model,
        users,
        {"chosen": HEADS},
        ks=(0, 1, 3),
        n_random=3,
        seed=4,
        prompt_config=short,
        held_out_config=dps.HeldOutConfig(
            positions=positions, neutral=NEUTRAL, controls=("own", "no_profile", "other_user", "neutral")
        ),
    )
    examples = [example for user in users for example in user.examples]
    assert effects.example_ids == tuple(example.id for example in examples)
    gains, taken = {}, {}
    for row, example in enumerate(examples):
        own = build_prompt(model, example, "own", config=short)
        prompts = {
            "own": own,
            "no_profile": build_prompt(model, example, "none", config=short),
            "other_user": build_prompt(model, example, donors_of(example, users, 1, 4)[0], config=short),
            "neutral": neutral_prompt(model, NEUTRAL[0]),
        }
        clean = {name: losses(plain, prompt) for name, prompt in prompts.items()}
        change = {}
        for name, prompt in prompts.items():
            at = edited_positions(prompt, positions)
            close(effects.full[name][row, 0], float(clean[name].mean()))
            for index, k in enumerate(effects.ks):
                with replaced(plain, HEADS[:k], d_head, at, None):
                    change[name, k] = losses(plain, prompt) - clean[name]
                got = effects.chosen[name][row, 0, index]
                close(got[0], float(change[name, k].mean()))
                if name != "neutral":
                    close(got, parts(change[name, k], own))
                if k == 0:
                    assert not got.any()
        same_user = [other.id for other in examples if other.user_id == example.user_id]
        for draw in range(same_user.index(example.id), 3, len(same_user)):
            heads = dps.random_heads(model, HEADS, match="nearest", seed=draw_seed(4, draw))
            column = [user.id for user in users].index(example.user_id)
            for name, prompt in prompts.items():
                with replaced(plain, heads, d_head, edited_positions(prompt, positions), None):
                    found = losses(plain, prompt) - clean[name]
                expected = [float(found.mean()), 0.0] if name == "neutral" else parts(found, own)
                close(effects.draws[name][draw, column, 0, 2], expected)
        gains.setdefault(example.user_id, []).append(float((clean["no_profile"] - clean["own"]).mean()))
        taken.setdefault(example.user_id, []).append(float((change["own", 3] - change["no_profile", 3]).mean()))
    frame = effects.to_frame().set_index(["family", "k", "measure"])
    close(frame.loc[("full model", 0, "gain"), "mean"], np.mean([np.mean(of) for of in gains.values()]))
    close(frame.loc[("chosen", 3, "gain_removed"), "mean"], np.mean([np.mean(of) for of in taken.values()]))
    kept = [np.mean(gains[user]) - np.mean(taken[user]) for user in gains]
    close(frame.loc[("chosen", 3, "gain_left"), "mean"], np.mean(kept))
    for name in ("own", "no_profile", "other_user", "neutral"):
        assert effects.chosen[name][:, 0, 2].abs().max() > 100 * TOLERANCE, "the ablation changes nothing"
    assert effects.chosen["own"][..., 1].any(), "nothing is copied"
    assert no_hooks_left(model)


def test_copied_tokens_agree_with_a_string_search():
    rng = random.Random(0)
    found = 0
    for _ in range(500):
        n, vocabulary = rng.randint(1, 4), rng.choice([2, 4, 12])
        response, profile = ([rng.randrange(vocabulary) for _ in range(rng.randint(0, 12))] for _ in range(2))
        got = copied_tokens(response, profile, n)
        assert torch.equal(got, copied_by_search(response, profile, n))
        found += int(got.sum())
    assert found > 500
    assert not copied_tokens([1, 2], [], 1).any()


@pytest.fixture(scope="module")
def curve(tinies, users):
    """Two families on the llama, with everything that a curve can hold."""
    config = dps.PromptConfig(items=3, profile_tokens=60, task_tokens=30, response_tokens=8)
    families = {"one": HEADS, "two": HeadSet.parse("L2H0,L1H1,L0H3")}
    return dps.ablation_curve(tinies("llama").hooked, users, families, ks=(0, 2, 3), n_random=39, prompt_config=config)


def test_copied_and_rest_add_up_to_all(curve):
    whole, copied, rest = (curve.to_frame(part=part) for part in ("all", "copied", "rest"))
    assert set(whole["measure"]) >= {
        "gain_removed",
        "gain_left",
        "gain_removed_other",
        "gain_left_other",
        "task_cost",
        "neutral_cost",
        "gain",
    }
    for column in ("mean", "control", "difference"):
        assert whole[column].notna().any()
        assert np.allclose(copied[column] + rest[column], whole[column], equal_nan=True, atol=1e-12)
    assert copied.loc[copied["measure"] == "gain_removed", "mean"].any()
    assert rest.loc[rest["measure"] == "gain_removed", "mean"].any()
    assert not copied.loc[copied["measure"] == "neutral_cost", "mean"].any()


@pytest.mark.parametrize("part", ["all", "copied", "rest"])
def test_the_means_of_a_frame_are_those_of_the_users(curve, part):
    frame, by_user = curve.to_frame(part=part), curve.by_user(part=part)
    sizes = by_user.groupby(["family", "k"]).size()
    assert (sizes == len({*curve.user_ids})).all()
    told = frame[~frame["measure"].str.startswith("NLL") | (frame["family"] == "full model")]
    for row in told.to_dict("records"):
        of = by_user[(by_user["family"] == row["family"]) & (by_user["k"] == row["k"])]
        assert of[row["measure"]].mean() == pytest.approx(row["mean"], abs=1e-12)
        if "control" in row and not np.isnan(row["control"]):
            assert of[f"random {row['measure']}"].mean() == pytest.approx(row["control"], abs=1e-12)


def test_no_heads_change_nothing(curve):
    frame = curve.to_frame().query("k == 0 and family != 'full model'")
    still = frame[frame["measure"].isin(["gain_removed", "gain_removed_other", "task_cost", "neutral_cost"])]
    assert len(still) == 8
    assert not still[["mean", "low", "high"]].to_numpy().any()
    assert (frame.loc[frame["measure"] == "gain_removed", "p"] == 1).all()
    assert np.allclose(frame.loc[frame["measure"] == "gain_left", "percent"].dropna(), 100)


def test_random_sets_are_compared_on_the_examples_that_they_were_measured_on():
    """Sets that do what random sets do, on examples that differ much."""
    of_example = 10.0 * torch.arange(6, dtype=torch.float64)
    chosen = of_example[:, None, None, None].expand(6, 1, 1, 2)
    rows = torch.tensor([[draw % 3, 3 + draw % 3] for draw in range(40)])
    noise = 0.1 * torch.randn(40, 2, generator=torch.Generator().manual_seed(0)).double()
    draws = (of_example[rows] + noise)[..., None, None, None].expand(40, 2, 1, 1, 2)
    effects = SetEffects(
        ("one",),
        (1,),
        ("u", "u", "u", "v", "v", "v"),
        tuple("abcdef"),
        {"own": torch.zeros(6, 2).double(), "no_profile": torch.zeros(6, 2).double()},
        {"own": chosen, "no_profile": torch.zeros_like(chosen)},
        {"own": draws, "no_profile": torch.zeros_like(draws)},
        {"model": {"n_heads": 4}, "sets": {"one": {"u": ["L0H0"], "v": ["L0H1"]}}},
    )
    row = effects.to_frame().set_index("measure").loc["gain_removed"]
    assert row["mean"] == 25
    # Three examples a user: the mean of their levels, not of the draws, of which they have 14, 13 and 13.
    levels = torch.stack([noise[start::3].mean(0) for start in range(3)])
    assert row["control"] == pytest.approx(25 + float(levels.mean()))
    assert row["difference"] == pytest.approx(-float(levels.mean()))
    assert 0.05 < row["control_high"] - row["control_low"] < 0.5, "as wide as the noise, not as the examples"
    residual = torch.cat(
        [(noise[start::3] - levels[start]) * (m / (m - 1)) ** 0.5 for start, m in enumerate((14, 13, 13))]
    )
    above = int((levels.mean() + residual.mean(1) >= 0).sum())
    assert row["p"] == pytest.approx((1 + above) / 41)
    assert row["p_less"] == pytest.approx((1 + 40 - above) / 41)
    means = np.sort((25 + levels.mean() + residual.mean(1)).numpy())
    # A new set is as likely in each of the 41 places between 40 sorted ones: 1.025 of them on either side.
    assert row["control_low"] == pytest.approx(means[0] + 0.025 * (means[1] - means[0]))
    assert row["control_high"] == pytest.approx(means[-1] - 0.025 * (means[-1] - means[-2]))


def test_levelled_random_sets_keep_their_spread():
    """On average over many runs, the spread between draws is what it would be with one example a user."""
    rng, spreads = np.random.default_rng(0), []
    for _ in range(300):
        noise, levels = rng.normal(size=(24, 1)), 5 * rng.normal(size=4)
        draws = noise + np.tile(levels, 6)[:, None]
        empty = torch.zeros(4, 2).double()
        effects = SetEffects(("one",), (1,), ("u",) * 4, tuple("abcd"), {"own": empty}, {}, {}, {})
        spreads.append(effects._levelled(draws).var(ddof=1))
    # One degree of freedom an example is spent on its level: 24 / 23 · 20 / 24 · 6 / 5.
    assert np.mean(spreads) == pytest.approx(24 / 23, abs=0.05)


def test_every_family_has_its_nll(curve):
    frame = curve.to_frame().set_index(["family", "k", "measure"])["mean"]
    for condition, change in (("own", None), ("no_profile", "task_cost"), ("neutral", "neutral_cost")):
        full = frame["full model", 0, f"NLL, {condition}"]
        assert frame["one", 0, f"NLL, {condition}"] == pytest.approx(full)
        if change:
            assert frame["one", 3, f"NLL, {condition}"] == pytest.approx(full + frame["one", 3, change])
    gain = frame["one", 3, "NLL, no_profile"] - frame["one", 3, "NLL, own"]
    assert gain == pytest.approx(frame["one", 3, "gain_left"])


def test_unknown_parts_are_refused(curve, unchecked):
    with pytest.raises(ScoreError, match="part 'some' is unknown"):
        curve.to_frame(part="some")


def test_every_draw_is_measured_once_for_every_user(llama, users, short, monkeypatch):
    measured, sweeps = [], []
    real = EditWork.make

    def make(self, key, given=None):
        sweeps.append(self)
        user = self.by_key[key].user_id
        measured.extend((draw, user) for draw in self.draws_of(key))
        chosen, drawn = self.masks(key)
        assert len(chosen) == 4
        assert len(drawn) == 4 * len(self.draws_of(key))
        for one, controls in zip(chosen, drawn.unflatten(0, (4, -1)) if len(drawn) else [], strict=False):
            for control in controls:
                assert not (control & one).any(), "disjoint"
                assert torch.equal(control.sum(1), one.sum(1)), "the same layers"
        found = real(self, key, given)
        assert found["draws.own"].shape == (2, 2, len(self.draws_of(key)), 2)
        return found

    monkeypatch.setattr(EditWork, "make", make)
    families = {"one": HeadSet.parse("L1H2,L1H0,L2H3"), "two": {user.id: HEADS for user in users}}
    for n_random in (20, 1, 0):
        measured.clear()
        effects = dps.ablation_curve(
            llama.hooked,
            users,
            families,
            ks=(1, 3),
            n_random=n_random,
            prompt_config=short,
            held_out_config=dps.HeldOutConfig(neutral=()),
        )
        assert sorted(measured) == sorted((draw, user.id) for draw in range(n_random) for user in users)
        frame = effects.to_frame()
        if n_random:
            assert effects.draws["own"].shape == (n_random, 3, 2, 2, 2)
            taken = frame.query("measure == 'gain_removed'")
            assert taken["controls"].isin(["same layers"]).all()
            if n_random == 20:
                assert taken["p"].between(1 / 21, 1).all()
                assert "control_low" not in frame, "20 random sets have no 95% range"
                assert "a 95% range of random sets needs 39" in effects.summary()
                assert "a 95% range of random sets needs 39" in plot(effects).layout.title.text
            else:
                assert "p" not in frame, "one random set gives no p"
                assert "control_low" not in frame
        else:
            assert effects.draws == {}
            assert "range" not in effects.summary()
            assert "control" not in frame
    assert "neutral_cost" not in effects.measures
    seen = {str(dps.random_heads(llama.hooked, HEADS, match="nearest", seed=draw)) for draw in range(5)}
    assert len(seen) > 1, "draws differ"


def scores_of(users, *, favourite=None, examples=2, seed=0, shape=(3, 4), **manifest):
    """Random scores of made-up discovery examples; `favourite` gives a user's own best head."""
    values = torch.randn(len(users) * examples, *shape, generator=torch.Generator().manual_seed(seed))
    owners = [user.id for user in users for _ in range(examples)]
    for user, head in (favourite or {}).items():
        values[[owner == user for owner in owners], head[0], head[1]] = 1e6
    ids = [f"discovery {index}" for index in range(len(owners))]
    return HeadScores(values, example_ids=ids, user_ids=owners, manifest=manifest)


def score_settings(config, **changes):
    return {"call": "score_heads", "ablation": "zero", "positions": "response", "objective": "nll"} | {
        "prompt_config": config.to_dict(),
        **changes,
    }


def test_nobody_is_tested_with_heads_that_he_chose(probe):
    before, _ = rankings("test", {"p": scores_of(probe)}, probe, (1, 4))
    for user in probe:
        wild = scores_of(probe, favourite={user.id: (2, 3)})
        after, _ = rankings("test", {"p": wild}, probe, (1, 4))
        fold = next(fold for fold in folds(probe, 0) if user.id in fold)
        assert 2 <= len(fold) <= 3
        for other in probe:
            if other.id in fold:
                assert after["p"][other.id] == before["p"][other.id]
            else:
                assert after["p"][other.id][0].heads == (Head(2, 3),)
    assert sorted(name for fold in folds(probe, 0) for name in fold) == sorted(user.id for user in probe)
    assert folds(probe, 0) == folds(probe[::-1], 0)
    assert folds(probe, 0) != folds(probe, 1)
    assert [len(fold) for fold in folds(probe[:3], 0)] == [1, 1, 1]


def test_cross_fitted_ranking_is_the_top_of_the_other_folds(probe):
    scores = scores_of(probe)
    found, _ = rankings("test", {"p": scores}, probe[:7], (0, 2, 5), seed=3)
    for fold in folds(probe[:7], 3):
        others = scores.without(fold)
        assert not set(fold) & set(others.users)
        for user in fold:
            assert [heads.heads for heads in found["p"][user]] == [others.top(k).heads for k in (0, 2, 5)]
    with pytest.raises(ScoreError, match="too few to cross-fit; use select='user'"):
        rankings("test", {"p": scores_of(probe[:1])}, probe[:1], (1,))


def test_scores_of_other_people_rank_for_everybody(probe):
    scores = scores_of(probe[:4])
    found, _ = rankings("test", {"p": scores}, probe[4:], (2,))
    assert {heads.heads for (heads,) in found["p"].values()} == {scores.top(2).heads}


def test_own_rankings_use_the_own_scores_alone(probe):
    scores = scores_of(probe, favourite={user.id: (0, index % 4) for index, user in enumerate(probe)})
    families = {"own": scores, "all": scores}
    found, _ = rankings("test", families, probe, (1, 3), {"own": "user"})
    for index, user in enumerate(probe):
        assert [heads.heads for heads in found["own"][user.id]] == [scores.top(k, user.id).heads for k in (1, 3)]
        assert found["own"][user.id][0].heads == (Head(0, index % 4),)
    assert found["all"] == rankings("test", {"all": scores}, probe, (1, 3))[0]["all"]
    with pytest.raises(ScoreError, match="is not in these scores"):
        rankings("test", {"p": scores_of(probe[1:])}, probe, (1,), "user")
    strangers = scores_of(probe[:3], call="reference_heads")
    found, _ = rankings("test", {"own": scores_of(probe[3:]), "reference": strangers}, probe[3:], (2,), "user")
    assert {heads.heads for (heads,) in found["reference"].values()} == {strangers.top(2).heads}


def test_rankings_of_head_sets(probe):
    three = [HeadSet.parse(names) for names in ("L0H0", "L1H1,L0H0", "L0H0,L2H2,L1H1")]
    mine = {user.id: HeadSet([(index % 3, 0), (index % 3, 1)]) for index, user in enumerate(probe)}
    families = {"ranking": three[2], "nested": three, "mine": mine}
    found, undefined = rankings("test", families, probe, (0, 1, 2))
    assert undefined == {}
    for user in probe:
        assert found["ranking"][user.id] == [three[2][:k] for k in (0, 1, 2)]
        assert found["nested"][user.id] == [HeadSet(), *three[:2]]
        assert found["mine"][user.id] == [mine[user.id][:k] for k in (0, 1, 2)]
    for family, error, match in (
        (three[2], HeadError, "ranks 3 heads, asked for 4"),
        (three, HeadError, "none of 4"),
        ([three[0], HeadSet.parse("L1H1,L2H2")], HeadError, "none of 4|not nested"),
        ({probe[0].id: HEADS}, ScoreError, f"no heads for user '{probe[1].id}'"),
        (scores_of(probe, shape=(1, 3)), HeadError, "asked for 4 of 3"),
    ):
        with pytest.raises(error, match=match):
            rankings("test", {"p": family}, probe, (4,))
    with pytest.raises(HeadError, match="not nested"):
        rankings("test", {"p": [three[0], HeadSet.parse("L1H1,L2H2")]}, probe, (1, 2))


def test_excluded_heads_are_in_no_ranking(probe):
    scores = scores_of(probe)
    for select in ("global", "user"):
        free, _ = rankings("test", {"p": scores, "q": scores}, probe, (4,), select)
        banned = HeadSet(free["p"][probe[0].id][0].heads[:2])
        found, _ = rankings("test", {"p": scores, "q": scores}, probe, (4,), select, {"p": banned})
        assert found["q"] == free["q"]
        assert all(not heads & banned and len(heads) == 4 for (heads,) in found["p"].values())
    with pytest.raises(HeadError, match="asked for 11 of 10"):
        rankings("test", {"p": scores}, probe, (11,), exclude={"p": banned})


def test_arguments_of_rankings_are_checked(probe, unchecked):
    family = {"p": scores_of(probe)}
    for arguments, match in (
        (({}, probe, (1,)), "at least one family"),
        ((family, [], (1,)), "one user"),
        ((family, probe, ()), "one k"),
        ((family, probe, (1, -1)), "not negative"),
        ((family, probe, (1,), "best"), "select 'best' is unknown"),
        ((family, probe, (1,), {"q": "user"}), "'q' in exclude or select"),
        ((family, probe, (1,), "global", {"q": HEADS}), "'q' in exclude or select"),
        (({"p": HEADS}, probe, (1,), "global", {"p": HEADS}), "exclude needs scores for family 'p'"),
    ):
        with pytest.raises(ScoreError, match=match):
            rankings("test", *arguments)


def test_undefined_families_are_left_out(llama, users, short):
    nothing = scores_of(users, family="retrieval", reason="no needle was recalled")
    nothing.values[0, 0, 0] = float("nan")
    families = {"retrieval": nothing, "chosen": HEADS}
    with pytest.warns(UserWarning, match="'retrieval' is left out: no needle was recalled"):
        effects = dps.ablation_curve(
            llama.hooked, users, families, ks=(1,), n_random=2, max_examples=1, prompt_config=short
        )
    assert effects.families == ("chosen",)
    assert effects.manifest["undefined"] == {"retrieval": "no needle was recalled"}
    assert set(effects.manifest["sets"]) == {"chosen"}
    assert effects.chosen["own"].shape == (3, 1, 1, 2)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ScoreError, match="no family is defined"):
        dps.ablation_curve(llama.hooked, users, {"retrieval": nothing}, ks=(1,), prompt_config=short)


VERBS = {"curve": dps.ablation_curve, "patch": dps.patch_heads, "vector": dps.vector_recovery}


@pytest.fixture(params=list(VERBS))
def verb(request):
    return VERBS[request.param]


def test_examples_that_chose_the_heads_are_refused(llama, users, short, verb):
    seen = HeadScores(
        torch.zeros(2, 3, 4),
        example_ids=["x", users[1].examples[1].id],
        user_ids=[users[0].id, users[1].id],
        manifest=score_settings(short),
    )
    with pytest.raises(ScoreError, match=f"chosen on 1 .*{users[1].examples[1].id}"):
        verb(llama.hooked, users, {"p": seen}, ks=(1,))


def test_settings_come_from_the_scores_and_may_not_differ(llama, users, short, unchecked):
    # Users who are not tested, so that the scores rank for everybody.
    others = [replace(user, id=f"other {user.id}") for user in users]
    best = {user.id: (0, 1) for user in others}  # low in the model, where positions matter
    scores = scores_of(others, favourite=best, **score_settings(short, ablation="uniform", positions="all"))
    options = {"ks": (1,), "n_random": 1, "max_examples": 1, "held_out_config": dps.HeldOutConfig(neutral=())}
    effects = dps.ablation_curve(llama.hooked, users, {"p": scores}, **options)
    found = effects.manifest
    assert (found["ablation"], found["positions"], found["prompt_config"]) == ("uniform", "all", short.to_dict())
    assert found["sets"]["p"][users[0].id] == [str(scores.top(1))]
    by_hand = dps.ablation_curve(
        llama.hooked,
        users,
        {"p": scores.top(1)},
        ablation="uniform",
        prompt_config=short,
        **{**options, "held_out_config": dps.HeldOutConfig(positions="all", neutral=())},
    )
    assert torch.equal(by_hand.chosen["own"], effects.chosen["own"])
    for asked, named in (
        ({"ablation": "zero"}, "ablation 'uniform', asked for is 'zero'"),
        (
            {"held_out_config": dps.HeldOutConfig(positions="response", neutral=())},
            "positions 'all', asked for is 'response'",
        ),
        ({"prompt_config": replace(short, profile_tokens=30)}, "scored with prompt_config"),
    ):
        with pytest.raises(ScoreError, match=named):
            dps.ablation_curve(llama.hooked, users, {"p": scores}, **options | asked)
        at = {"held_out_config": dps.HeldOutConfig(positions="all", neutral=())}
        tested = {"ablation": "uniform", "prompt_config": short} | at | asked
        again = dps.ablation_curve(llama.hooked, users, {"p": scores.top(1)}, **options | tested)
        assert not torch.equal(again.chosen["own"], effects.chosen["own"])
    mixed = {"p": scores, "q": scores_of(others, **score_settings(short))}
    with pytest.raises(ScoreError, match="family 'q' was scored with ablation 'zero'"):
        dps.ablation_curve(llama.hooked, users, mixed, **options)
    reference = scores_of(others, call="reference_heads", family="induction")
    both = dps.ablation_curve(llama.hooked, users, {"induction": reference, "p": scores}, **options)
    assert both.manifest["positions"] == "all"
    patched = dps.patch_heads(
        llama.hooked, users, {"p": scores_of(others, **score_settings(short))}, ks=(1,), n_random=0
    )
    assert (patched.manifest["ablation"], patched.manifest["prompt_config"]) == ("patch", short.to_dict())
    with pytest.raises(PromptError, match="equal token length"):
        dps.patch_heads(llama.hooked, users, {"p": scores}, ks=(1,), n_random=0)


def test_wrong_settings_are_refused(llama, users, short, unchecked):
    families, config = {"p": HEADS}, dps.HeldOutConfig
    for verb, change, match in (
        (dps.ablation_curve, {"ablation": "patch"}, "'patch' compares two runs; use patch_heads"),
        (dps.ablation_curve, {"n_random": -1}, "n_random"),
        (dps.ablation_curve, {"held_out_config": config(controls=("mine",))}, "controls \\['mine'\\] are unknown"),
        (dps.ablation_curve, {"max_examples": 0}, "max_examples 0 is not a whole number from 1 up"),
        (dps.ablation_curve, {"max_examples": -1}, "max_examples -1 is not a whole number from 1 up"),
        (
            dps.ablation_curve,
            {"held_out_config": config(neutral=("too short",))},
            "a neutral text needs more than 17 tokens",
        ),
        (dps.patch_heads, {"against": "nobody"}, "against 'nobody' is unknown"),
        (dps.vector_recovery, {"vector_config": dps.VectorConfig(layer=3)}, "layer 3 is not in this model of 3 layers"),
    ):
        with pytest.raises(dps.DPSLensError, match=match):
            verb(llama.hooked, users, families, **{"ks": (1,), "prompt_config": short} | change)
    with pytest.raises(ScoreError, match="ngram"):
        dps.HeldOutConfig(ngram=0)
    with pytest.raises(ScoreError, match="has no evaluation example"):
        dps.ablation_curve(llama.hooked, [replace(users[0], examples=())], families, ks=(1,))
    with pytest.raises(ScoreError, match="at least two users"):
        dps.patch_heads(llama.hooked, users[:1], families, ks=(1,), against="other_user")
    silent = [replace(users[0], history=users[0].history[:2])]
    with pytest.raises(ScoreError, match="no discovery example"):
        dps.vector_recovery(llama.hooked, silent, families, ks=(1,), prompt_config=short)


def test_a_single_user_has_no_other_and_no_interval(toy_model, toy_users):
    frame = dps.ablation_curve(toy_model, toy_users[:1], SETS, ks=(1,), n_random=2).to_frame()
    assert not frame["measure"].str.contains("other").any()
    assert frame["low"].isna().all()
    assert "recovered_other" not in dps.vector_recovery(toy_model, toy_users[:1], SETS, ks=(1,), n_random=0).measures


def counting(monkeypatch, fail_after=None):
    calls = []
    real = EditWork.make

    def make(self, key, given=None):
        if fail_after is not None and len(calls) == fail_after:
            raise KeyboardInterrupt
        calls.append(list(self.by_key).index(key))
        return real(self, key, given)

    monkeypatch.setattr(EditWork, "make", make)
    return calls


def test_an_interrupted_run_resumes_and_equals_an_uninterrupted_one(toy_model, toy_users, verb, tmp_path, monkeypatch):
    def run(folder, **more):
        options = {"ks": (0, 1), "n_random": 2} | more
        return verb(toy_model, toy_users[:3], SETS, out=tmp_path / folder, **options)

    whole = run("whole")
    assert len(whole.example_ids) == 6
    with monkeypatch.context() as patch:
        counting(patch, fail_after=4)
        with pytest.raises(KeyboardInterrupt):
            run("cut")
    with pytest.raises(ScoreError, match="holds no SetEffects"):
        SetEffects.load(tmp_path / "cut")
    with monkeypatch.context() as patch:
        calls = counting(patch)
        resumed = run("cut")
        assert calls == [4, 5]
        assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
        assert resumed.to_frame().equals(whole.to_frame())
        run("cut", run_config=dps.RunConfig(batch_size=3))
        assert calls == [4, 5], "finished units are read"
    with monkeypatch.context() as patch:
        counting(patch, fail_after=1)
        with pytest.raises(KeyboardInterrupt):
            run("cut", run_config=dps.RunConfig(force=True), seed=1)
    with pytest.raises(ScoreError, match="holds no SetEffects"):
        SetEffects.load(tmp_path / "cut")


def test_a_folder_of_another_run_is_refused(toy_model, toy_users, tmp_path):
    def run(users=toy_users[:2], families=SETS, verb=dps.ablation_curve, **more):
        options = {"ks": (0, 1), "n_random": 1} | more
        return verb(toy_model, users, families, out=tmp_path, **options)

    run()
    before = digest(tmp_path)
    for change, named in (
        ({"ks": (1,)}, r"ks was \[0, 1\], now \[1\]"),
        ({"users": toy_users[:3]}, "data was .*also examples, sets"),
        ({"families": {**SETS, "carrier": HeadSet.parse("L0H3")}}, "sets.carrier.u0 was"),
        ({"families": {"renamed": SETS["carrier"]}}, "families was"),
        ({"families": dict(reversed(SETS.items()))}, "families was"),
        ({"n_random": 2}, "n_random was 1, now 2"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"held_out_config": dps.HeldOutConfig(ngram=3)}, "ngram was 2, now 3"),
        ({"held_out_config": dps.HeldOutConfig(patched=False)}, "patched was true, now false"),
        ({"held_out_config": dps.HeldOutConfig(controls=("own",))}, "controls was"),
        ({"ablation": "uniform"}, 'ablation was "zero", now "uniform"'),
        ({"held_out_config": dps.HeldOutConfig(positions="all")}, 'positions was "response", now "all"'),
        ({"held_out_config": dps.HeldOutConfig(neutral=())}, "neutral was"),
        ({"prompt_config": dps.PromptConfig(items=1)}, "prompt_config.items was 6, now 1"),
        ({"verb": dps.patch_heads}, 'ablation was "zero", now "patch" .*also .*call'),
    ):
        with pytest.raises(RunError, match=named):
            run(**change)
    assert digest(tmp_path) == before


@pytest.mark.parametrize(
    ("verb", "changes"),
    [
        (dps.patch_heads, [("against", {"against": "other_user"})]),
        (
            dps.vector_recovery,
            [
                ("layer", {"vector_config": dps.VectorConfig(layer=1)}),
                ("scale", {"vector_config": dps.VectorConfig(scale=2.0)}),
                ("vector_examples", {"vector_config": dps.VectorConfig(examples=1)}),
                ("against", {"vector_config": dps.VectorConfig(against="other_user")}),
            ],
        ),
    ],
)
def test_a_folder_of_another_patch_or_vector_is_refused(toy_model, toy_users, tmp_path, verb, changes):
    verb(toy_model, toy_users[:2], SETS, ks=(1,), n_random=0, out=tmp_path)
    for name, change in changes:
        with pytest.raises(RunError, match=f"{name} was"):
            verb(toy_model, toy_users[:2], SETS, ks=(1,), n_random=0, out=tmp_path, **change)


def test_effects_survive_a_round_trip(curve, tmp_path):
    curve.save(tmp_path)
    loaded = SetEffects.load(tmp_path)
    for part in ("all", "copied", "rest"):
        assert loaded.to_frame(part=part).equals(curve.to_frame(part=part))
    assert (loaded.families, loaded.ks, loaded.user_ids) == (curve.families, curve.ks, curve.user_ids)
    assert loaded.manifest["sets"] == curve.manifest["sets"]
    loaded.save(tmp_path / "again")
    assert digest(tmp_path / "again")["effects.safetensors"] == digest(tmp_path)["effects.safetensors"]


def test_half_written_folders_are_refused(curve, tmp_path, monkeypatch):
    with pytest.raises(ScoreError, match="holds no SetEffects"):
        SetEffects.load(tmp_path)
    curve.save(tmp_path)
    tensors, manifest = tmp_path / "effects.safetensors", tmp_path / "effects.json"
    whole = tensors.read_bytes(), manifest.read_bytes()
    for file, torn, match in (
        (tensors, whole[0][:-40], "not a whole safetensors file"),
        (manifest, whole[1][:-40], "not a whole SetEffects"),
        (manifest, b"{}", "not a whole SetEffects"),
    ):
        file.write_bytes(torn)
        with pytest.raises(ScoreError, match=match):
            SetEffects.load(tmp_path)
        tensors.write_bytes(whole[0])
        manifest.write_bytes(whole[1])
    tensors.unlink()
    with pytest.raises(ScoreError, match="not a whole safetensors file"):
        SetEffects.load(tmp_path)

    curve.save(tmp_path)

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("dps_lens.files.save_file", full_disk)
    with pytest.raises(FileError, match="No space left .*what was there before is kept; make room"):
        replace(curve, ks=(3, 4)).save(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert SetEffects.load(tmp_path).ks == curve.ks


@pytest.mark.parametrize("positions", ["response", "all"])
def test_only_the_carrier_takes_the_gain(toy_model, toy_users, positions):
    frame = dps.ablation_curve(
        toy_model,
        toy_users,
        SETS,
        ks=(0, 1),
        n_random=20,
        max_examples=1,
        held_out_config=dps.HeldOutConfig(positions=positions),
    ).to_frame()
    frame = frame.set_index(["family", "k", "measure"])
    gain, other_gain = (frame.loc[("full model", 0, name), "mean"] for name in ("gain", "gain_other"))
    assert gain > 0.5
    assert other_gain > 0.5
    for suffix, of in (("", gain), ("_other", other_gain)):
        taken, kept = (frame.loc[("carrier", 1, name + suffix)] for name in ("gain_removed", "gain_left"))
        assert taken["percent"] == pytest.approx(100, abs=2)
        assert taken["percent_low"] > 90
        assert abs(kept["mean"]) < 0.02 * of
        assert kept["percent"] == pytest.approx(0, abs=2)
        idle = frame.loc[("other", 1, "gain_removed" + suffix)]
        assert abs(idle["percent"]) < 2
    taken = frame.loc[("carrier", 1, "gain_removed")]
    assert abs(taken["control"]) < 0.02 * gain
    assert taken["difference_low"] > 0.8 * gain
    assert taken["p"] == frame.loc[("carrier", 1, "gain_left"), "p"] == pytest.approx(1 / 21)
    assert frame.loc[("carrier", 0, "gain_left"), "percent"] == pytest.approx(100)


def test_the_carrier_is_necessary_and_sufficient(toy_model, toy_users):
    for patch_from, suffix in (("no_profile", ""), ("other_user", "_other")):
        effects = dps.patch_heads(toy_model, toy_users, SETS, ks=(1,), n_random=39, max_examples=1, against=patch_from)
        assert effects.measures == (f"necessity{suffix}", f"sufficiency{suffix}")
        frame = effects.to_frame().set_index(["family", "measure"])
        gain = frame.loc[("full model", "gain" + suffix), "mean"]
        assert gain > 0.5
        for measure in effects.measures:
            carrier, other = frame.loc[("carrier", measure)], frame.loc[("other", measure)]
            assert carrier["percent"] == pytest.approx(100, abs=2)
            assert abs(other["percent"]) < 2
            assert max(abs(carrier["control_low"]), abs(carrier["control_high"])) < 0.02 * gain
            assert carrier["p"] == pytest.approx(1 / 40)


@pytest.mark.parametrize("layer", [None, 1])
def test_the_carriers_vector_brings_the_own_user_back(toy_model, toy_users, layer):
    """What the carrier writes is read by the unembedding, so that it may enter below any layer."""
    effects = dps.vector_recovery(
        toy_model, toy_users, SETS, ks=(0, 1), n_random=20, max_examples=1, vector_config=dps.VectorConfig(layer=layer)
    )
    assert effects.manifest["layer"] == (layer or 0)
    frame = effects.to_frame().set_index(["family", "k", "measure"])
    gain = frame.loc[("full model", 0, "gain"), "mean"]
    carrier = frame.loc[("carrier", 1, "recovered")]
    assert carrier["percent"] == pytest.approx(100, abs=5)
    assert abs(carrier["control"]) < 0.02 * gain
    assert carrier["p"] == pytest.approx(1 / 21)
    # Another user's signature is a wrong answer.
    assert frame.loc[("carrier", 1, "recovered_other"), "high"] < 0
    assert abs(frame.loc[("other", 1, "recovered"), "mean"]) < 0.02 * gain
    for name in ("recovered", "recovered_other"):
        assert frame.loc[("carrier", 0, name), "mean"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("ablation", ["zero", "uniform"])
def test_a_curve_patches_as_patch_heads_does(llama, users, short, ablation):
    """The same sets between the same two runs, whatever the curve ablates with; random sets are the same, too."""
    families = {"p": HEADS, "q": HeadSet.parse("L2H0,L1H1,L0H3")}
    options = {"ks": (1, 3), "n_random": 3, "seed": 5, "prompt_config": short}
    curve = dps.ablation_curve(llama.hooked, users, families, ablation=ablation, **options)
    alone = dps.patch_heads(llama.hooked, users, families, against="other_user", **options)
    assert {"necessity_other", "sufficiency_other", "gain_removed_other"} < {*curve.measures}
    for held in (curve.chosen, curve.draws):
        assert {"noising_other", "denoising_other"} < held.keys()
    for name, values in alone.chosen.items():
        # Two passes over the same float32 weights; the effects are above 1e-2.
        assert values.abs().max() > 1e-2
        assert torch.allclose(curve.chosen[name], values, atol=1e-6)
        assert torch.allclose(curve.draws[name], alone.draws[name], atol=1e-6)
    for name in ("own", "other_user"):
        assert torch.allclose(curve.full[name], alone.full[name], atol=1e-6)
    frames = [effects.to_frame().set_index(["family", "k", "measure"]) for effects in (curve, alone)]
    for name in alone.measures:
        both = [frame.loc[("q", 3, name), ["mean", "low", "control", "difference"]].astype(float) for frame in frames]
        assert np.allclose(*both, atol=1e-6)
    without = dps.HeldOutConfig(patched=False)
    bare = dps.ablation_curve(llama.hooked, users, families, ablation=ablation, held_out_config=without, **options)
    assert bare.chosen.keys() == {"own", "no_profile", "other_user", "neutral"}
    for name, values in bare.chosen.items():
        assert torch.equal(values, curve.chosen[name]), "patches change no ablation"


@pytest.mark.parametrize(("ablation", "n_runs"), [("zero", 4), ("uniform", 6)])
def test_no_prompt_is_run_twice(toy_model, toy_users, monkeypatch, ablation, n_runs):
    """Own, none, another's, neutral: once each; attention that is edited has no run that a patch could start from."""
    ran = []
    real = CleanRun.__init__

    def init(self, runner, prompt, **options):
        ran.append(prompt)
        real(self, runner, prompt, **options)

    monkeypatch.setattr(CleanRun, "__init__", init)
    dps.ablation_curve(toy_model, toy_users[:2], SETS, ks=(1,), n_random=1, max_examples=1, ablation=ablation)
    assert len(ran) == 2 * n_runs
    texts = [prompt.text for prompt in ran[:4]]
    assert len({*texts}) == 4


def test_patches_need_a_response_and_another_user(toy_model, toy_users):
    everywhere = dps.HeldOutConfig(positions="all")
    effects = dps.ablation_curve(toy_model, toy_users[:2], SETS, ks=(1,), n_random=1, held_out_config=everywhere)
    assert "gain_removed_other" in effects.measures
    assert "necessity_other" not in effects.measures
    own = dps.HeldOutConfig(controls=("own", "noising_other"))
    effects = dps.ablation_curve(toy_model, toy_users[:2], SETS, ks=(1,), n_random=1, held_out_config=own)
    assert effects.draws.keys() == {"own", "noising_other"}
    assert "sufficiency_other" in effects.measures
    alone = dps.ablation_cost(toy_model, toy_users[:1], SETS["carrier"], n_random=1)
    assert alone.chosen.keys() == {"own", "no_profile", "neutral"}


def test_the_cost_of_one_set_is_measured_in_every_condition(toy_model, toy_users):
    cost = dps.ablation_cost(toy_model, toy_users, SETS["carrier"], n_random=20, max_examples=1)
    assert cost.chosen.keys() == cost.draws.keys()
    frame = cost.beside_random().set_index(["ablated", "measure"])["mean"]
    gain = frame["full model", "gain_other"]
    removed = ("gain_removed_other", "necessity_other", "sufficiency_other")
    for measure in removed:
        assert frame["top 1 heads", measure] == pytest.approx(gain, rel=0.03)
    for measure, condition in (("task_cost", "no_profile"), ("neutral_cost", "neutral")):
        by_hand = np.mean([float(change) for change in cost.chosen[condition][:, 0, 0, 0]])  # one example a user
        assert frame["top 1 heads", measure] == pytest.approx(by_hand)
    for measure in (*removed, "task_cost", "neutral_cost"):
        difference = frame["top 1 heads", measure] - frame["20 random sets", measure]
        assert frame["difference", measure] == pytest.approx(difference, abs=1e-9)
    assert frame["top 1 heads", "gain_other"] == pytest.approx(gain - frame["top 1 heads", "gain_removed_other"])
    verdict = cost.verdict()
    told = [
        "More of the gain over another user",
        "More of the gain over no profile",
        "Necessity: patching them from another user's run loses more",
        "Sufficiency: patching them into another user's run brings back more",
    ]
    places = [verdict.index(one) for one in ("the same task without a profile", "on neutral text", *told)]
    assert places == sorted(places), "costs first"


def test_patches_equal_plain_hugging_face(tinies, users, short):
    for architecture in ("llama", "gpt2"):
        tiny = tinies(architecture)
        model, plain, d_head = tiny.hooked, tiny.plain, tiny.hooked.cfg.d_head
        examples = [example for user in users for example in user.examples[-1:]]
        for patch_from, suffix in (("no_profile", ""), ("other_user", "_other")):
            effects = dps.patch_heads(
                model,
                users,
                {"p": HEADS},
                ks=(1, 3),
                n_random=1,
                max_examples=1,
                prompt_config=short,
                against=patch_from,
            )
            for row, example in enumerate(examples):
                own = build_prompt(model, example, "own", config=short)
                donor = "none" if patch_from == "no_profile" else donors_of(example, users, 1, 0)[0]
                other = build_prompt(model, example, donor, config=short)
                close(effects.full["own"][row, 0], float(losses(plain, own).mean()))
                close(effects.full[patch_from][row, 0], float(losses(plain, other).mean()))
                for name, base, source in (("noising", own, other), ("denoising", other, own)):
                    clean = losses(plain, base)
                    source_z = {layer: z_of(plain, source, layer) for layer in range(3)}
                    at, there = (edited_positions(prompt, "response") for prompt in (base, source))

                    def new(layer, source_z=source_z, there=there):
                        return source_z[layer][there]

                    random_set = dps.random_heads(model, HEADS, match="nearest", seed=0)
                    for heads, got in (
                        (HEADS[:1], effects.chosen[name + suffix][row, 0, 0]),
                        (HEADS, effects.chosen[name + suffix][row, 0, 1]),
                        (random_set, effects.draws[name + suffix][0, row, 0, 1]),
                    ):
                        with replaced(plain, heads, d_head, at, new):
                            expected = losses(plain, base) - clean
                        close(got, parts(expected, own))
                assert effects.chosen[name + suffix].abs().max() > 100 * TOLERANCE, "the patch changes nothing"


def plain_vector(plain, model, user, heads, config, n_examples):
    """`Σ_h mean(z_h) W_O[h]` from the inputs and the weight of the output projections."""
    d_head = model.cfg.d_head
    total = torch.zeros(model.cfg.d_model)
    prompts = [build_prompt(model, e, "own", config=config) for e in user.discovery_examples()[-n_examples:]]
    for layer, head in heads:
        columns = slice(head * d_head, (head + 1) * d_head)
        spans = [prompt.spans["response"] for prompt in prompts]
        z = [z_of(plain, p, layer)[s - 1 : e - 1, columns] for p, (s, e) in zip(prompts, spans, strict=True)]
        projection = output_projection(attention_modules(plain)[layer])
        weight = projection.weight if isinstance(projection, torch.nn.Linear) else projection.weight.T
        total += torch.cat(z).mean(0) @ weight[:, columns].T.detach()
    return total


@contextmanager
def added_to(plain, layer, start, vector):
    """`vector` enters the residual stream before a decoder layer, from a position on."""

    def add(module, arguments, options):
        held = arguments[0] if arguments else options["hidden_states"]
        held = held.clone()
        held[:, start:] += vector
        return ((held, *arguments[1:]), options) if arguments else (arguments, options | {"hidden_states": held})

    layers = plain.model.layers if hasattr(plain, "model") else plain.transformer.h
    handle = layers[layer].register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_preference_vector_equals_plain_hugging_face(tinies, users, short, architecture):
    tiny, config = tinies(architecture), replace(short, response_tokens=24)
    lengths = {
        len(build_prompt(tiny.hooked, example, config=config).response_tokens)
        for example in users[0].discovery_examples()
    }
    assert len(lengths) > 1, "every position counts the same, not every example"
    for n_examples in (2, None):
        got = dps.preference_vector(tiny.hooked, users[0], HEADS, max_examples=n_examples, prompt_config=config)
        expected = plain_vector(tiny.plain, tiny.hooked, users[0], HEADS, config, n_examples or 99)
        # Float32 sums of three heads' outputs, each about 1.
        assert torch.allclose(got, expected, atol=1e-5)
        assert got.norm() > 0.1


@pytest.mark.parametrize("layer", [None, 2])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_vectors_equal_plain_hugging_face(tinies, users, short, architecture, layer):
    tiny = tinies(architecture)
    model, plain = tiny.hooked, tiny.plain
    vectors = {user.id: plain_vector(plain, model, user, HEADS, short, 2) for user in users}
    effects = dps.vector_recovery(
        model,
        users,
        {"p": HEADS},
        ks=(0, 3),
        n_random=1,
        max_examples=1,
        prompt_config=short,
        vector_config=dps.VectorConfig(layer=layer, scale=1.5, examples=2),
    )
    at = 1 if layer is None else layer
    random_set = dps.random_heads(model, HEADS, match="nearest", seed=0)
    for row, user in enumerate(users):
        example = user.examples[-1]
        own, none = (build_prompt(model, example, profile, config=short) for profile in ("own", "none"))
        clean = losses(plain, none)
        close(effects.full["no_profile"][row, 0], float(clean.mean()))
        close(effects.full["own"][row, 0], float(losses(plain, own).mean()))
        donor = donors_of(example, users, 1, 0)[0]
        for vector, got in (
            (vectors[user.id], effects.chosen["vector"][row, 0, 1]),
            (vectors[donor.id], effects.chosen["vector_other"][row, 0, 1]),
            (plain_vector(plain, model, user, random_set, short, 2), effects.draws["vector"][0, row, 0, 1]),
            (0.0, effects.chosen["vector"][row, 0, 0]),
        ):
            with added_to(plain, at, none.spans["response"][0] - 1, 1.5 * vector):
                expected = losses(plain, none) - clean
            close(got, parts(expected, own))
    assert effects.chosen["vector"].abs().max() > 100 * TOLERANCE, "the vector changes nothing"


def test_vectors_of_outside_heads_are_refused(llama, users):
    with pytest.raises(HeadError, match="L3H0 is not in this model"):
        dps.preference_vector(llama.hooked, users[0], HeadSet.parse("L3H0"))


def test_figure_holds_the_values_of_the_frame(curve):
    frame = curve.to_frame()
    assert {"gain_removed_other", "task_cost", "neutral_cost", "sufficiency_other"} < {*curve.measures}
    for name in curve.measures:
        figure = plot(curve, measure=name)
        lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
        assert [trace.name for trace in lines] == list(curve.families)
        bands = {trace.legendgroup: trace for trace in figure.data if trace.fill == "toself"}
        assert set(bands) == set(curve.families)
        for trace in lines:
            rows = frame[(frame["family"] == trace.name) & (frame["measure"] == name)]
            assert list(trace.y) == list(rows["mean"])
            assert np.allclose(trace.error_y.array, rows["high"] - rows["mean"])
            assert np.asarray(trace.customdata)[:, 0].tolist() == list(curve.ks)
            assert np.allclose(np.asarray(trace.customdata)[:, 1:], rows[["low", "high"]])
            assert np.allclose(trace.x, curve.ks, atol=0.5)
            if trace.name in bands:
                band = bands[trace.name]
                assert list(band.y) == [*rows["control_high"], *rows["control_low"][::-1]]
                assert list(band.x) == [*curve.ks, *curve.ks[::-1]]
        at = [shape.y0 for shape in figure.layout.shapes]
        assert at == [*gains_of(frame, name), 0]
    assert curve.plot("task_cost").to_dict() == plot(curve, measure="task_cost").to_dict()
    with pytest.raises(ScoreError, match="measure 'loss' is not in these effects"):
        plot(curve, measure="loss")


def gains_of(frame, measure):
    """The gain that a measure is a part of, if it is one of any."""
    if measure in ("task_cost", "neutral_cost"):
        return []
    return list(frame.loc[frame["measure"] == ("gain_other" if measure.endswith("_other") else "gain"), "mean"])


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_figure_shows_both_costs_and_patches_beside_what_is_removed(curve, columns):
    """By default: a panel each, on one scale, in the order of the table."""
    frame, figure = curve.to_frame(), plot(curve, columns=columns)
    shown = ("gain_removed_other", "task_cost", "neutral_cost", "necessity_other", "sufficiency_other")
    names = [note.text for note in figure.layout.annotations if note.text.startswith("<b>")]
    assert names == [
        "<b>gain removed, other user</b>",
        "<b>task cost</b>",
        "<b>neutral cost</b>",
        "<b>necessity, other user</b>",
        "<b>sufficiency, other user</b>",
    ]
    axes = list(dict.fromkeys(trace.yaxis for trace in figure.data))
    assert len(axes) == len(shown)
    assert len({figure.layout[f"yaxis{axis[1:]}"].matches or axis for axis in axes}) == 1, "one scale"
    for axis, measure in zip(axes, shown, strict=True):
        lines = [trace for trace in figure.data if trace.yaxis == axis and trace.mode == "lines+markers"]
        assert [trace.name for trace in lines] == list(curve.families)
        for trace in lines:
            rows = frame[(frame["family"] == trace.name) & (frame["measure"] == measure)]
            assert list(trace.y) == list(rows["mean"])
        marked = [shape.y0 for shape in figure.layout.shapes if shape.yref == axis]
        assert marked == [*gains_of(frame, measure), 0]
    legend = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert legend == list(curve.families)
    places = {(note.x, note.y) for note in figure.layout.annotations if note.text.startswith("<b>")}
    assert len(places) == len(shown)


def test_figure_falls_back_to_what_was_measured(toy_model, toy_users, curve):
    alone = dps.ablation_curve(toy_model, toy_users[:1], SETS, ks=(1,), n_random=0)
    patched = dps.patch_heads(toy_model, toy_users[:2], SETS, ks=(1,), n_random=0, max_examples=1)
    for effects, first in ((alone, "gain removed, no profile"), (patched, "necessity")):
        names = [note.text for note in plot(effects).layout.annotations if note.text.startswith("<b>")]
        assert first in names[0]
    several = plot(curve, ["gain_left", "task_cost"])
    assert len({trace.yaxis for trace in several.data}) == 2
    with pytest.raises(ScoreError, match="measure 'loss' is not in these effects"):
        plot(curve, ["task_cost", "loss"])


def test_figure_shows_every_family(curve):
    many = replace(
        curve,
        families=tuple(f"family {index}" for index in range(10)),
        chosen={name: values[:, :1].expand(-1, 10, -1, -1) for name, values in curve.chosen.items()},
        draws={},
    )
    lines = [trace.name for trace in plot(many, measure="gain_removed").data]
    assert lines == list(many.families)


def random_set_effects(taken, cost, gain, gain_other=None, **changes):
    """Effects of one set (the first row of each) and of its random sets, a user an example.

    Beside own and no_profile, `changes` of the NLL in other conditions.
    """
    names = tuple(f"u{index}" for index in range(len(gain)))

    def both(values):
        values = torch.tensor(values)
        return torch.stack([values, torch.zeros_like(values)], dim=-1)

    changes = {"own": taken + cost, "no_profile": cost} | changes
    full = {"own": 0 * gain, "no_profile": gain, "other_user": gain_other, "neutral": 0 * gain}
    return SetEffects(
        ("heads",),
        (1,),
        names,
        names,
        {name: both(3 + nll) for name, nll in full.items() if name in changes},
        {name: both(change[0])[:, None, None] for name, change in changes.items()},
        {name: both(change[1:])[:, :, None, None] for name, change in changes.items()},
        {"spread": False, "model": {"n_heads": 4}, "sets": {"heads": {name: ["L0H0"] for name in names}}},
    )


def claims_of(rng, n_users, spread_of_sets, n=20, more=0.0):
    """What is said where the chosen set is one more random set, each with a level of its own, plus `more`."""

    def drawn():
        level, user = spread_of_sets * rng.standard_normal((n + 1, 1)), 0.3 * rng.standard_normal(n_users)
        return 0.3 + level + user + 0.2 * rng.standard_normal((n + 1, n_users))

    taken, cost = drawn(), drawn()
    taken[0] += more
    return random_set_effects(taken, cost, 3 + 0.4 * rng.standard_normal(n_users)).verdict()


@pytest.mark.parametrize("spread_of_sets", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n_users", [5, 12])
def test_a_verdict_about_one_more_random_set_is_rarely_wrong(spread_of_sets, n_users):
    rng, runs = np.random.default_rng(0), 200
    said = [claims_of(rng, n_users, spread_of_sets) for _ in range(runs)]
    claims = ("More of the gain", "Less of the gain", "profile more than random", "profile less than random")
    assert not any("neutral" in verdict or "another user goes" in verdict for verdict in said), "were not measured"
    for claim in claims:
        # Each is a one-sided test at 5%, and what chance may add to it in 200 runs.
        assert sum(claim in verdict for verdict in said) / runs <= 0.05 + 2.6 * (0.05 * 0.95 / runs) ** 0.5, claim
    assert any("cannot be told from random heads" in verdict for verdict in said)
    assert any("cannot be told from what random heads of the same layers cost" in verdict for verdict in said)
    # Where the interval alone would tell, the rank is named.
    untold = re.findall(r"cannot be told[^(]*\(([^)]*interval (\S+) to (-?[\d.]+\d)[^)]*)\)", " ".join(said))
    wide = [
        (text, float(low) * float(high))
        for text, low, high in untold
        if "0.000" not in (low.strip("-"), high.strip("-"))
    ]
    assert {("rank" in text) == (ends > 0) for text, ends in wide} == {True}


def test_a_verdict_about_a_real_effect_is_mostly_right():
    rng = np.random.default_rng(0)
    assert sum("More of the gain over no profile" in claims_of(rng, 12, 0.3, more=1.0) for _ in range(40)) >= 34
    assert sum("Less of the gain over no profile" in claims_of(rng, 12, 0.3, more=-1.0) for _ in range(40)) >= 34


CLAIMS = {
    "task_cost": ("profile more than random", "profile less than random", "of the same layers cost ("),
    "neutral_cost": ("neutral text they cost more", "neutral text they cost less", "their cost cannot be told"),
    "gain_removed_other": ("More of the gain over another", "Less of the gain over another", "Of the gain over anoth"),
    "gain_removed": ("More of the gain over no", "Less of the gain over no", "Of the gain over no profile"),
    "necessity_other": ("run loses more than", "run loses less than", "run loses cannot be told"),
    "sufficiency_other": ("brings back more than", "brings back less than", "brings back cannot be told"),
}


def everywhere(rng, n_users=12, n=20, sd=0.3, more=None):
    """The chosen set is one more random set in every measure, plus `more` in some."""

    def drawn(name):
        level, user = sd * rng.standard_normal((n + 1, 1)), 0.3 * rng.standard_normal(n_users)
        values = 0.3 + level + user + 0.2 * rng.standard_normal((n + 1, n_users))
        values[0] += (more or {}).get(name, 0.0)
        return values

    of = {name: drawn(name) for name in CLAIMS}
    gains = [3 + 0.4 * rng.standard_normal(n_users) for _ in range(2)]
    own = of["gain_removed"] + of["task_cost"]
    return random_set_effects(
        of["gain_removed"], of["task_cost"], *gains,
        other_user=own - of["gain_removed_other"], neutral=of["neutral_cost"],
        noising_other=of["necessity_other"], denoising_other=-of["sufficiency_other"],
    )  # fmt: skip


def test_every_claim_of_a_verdict_is_rarely_wrong():
    rng, runs = np.random.default_rng(1), 150
    said = [everywhere(rng).verdict() for _ in range(runs)]
    for more, less, untold in CLAIMS.values():
        for claim in (more, less):
            assert sum(claim in verdict for verdict in said) / runs <= 0.05 + 2.6 * (0.05 * 0.95 / runs) ** 0.5, claim
        assert all((more in one) + (less in one) + (untold in one) == 1 for one in said)


@pytest.mark.parametrize("planted", CLAIMS)
def test_a_verdict_claims_what_is_planted(planted):
    for sign, claim in ((1.0, CLAIMS[planted][0]), (-1.0, CLAIMS[planted][1])):
        assert claim in everywhere(np.random.default_rng(0), sd=0.1, more={planted: 2 * sign}).verdict()
    verdict = everywhere(np.random.default_rng(0), sd=0.1, more={planted: 2.0}).verdict()
    for other, (more, _, _) in CLAIMS.items():
        assert (more in verdict) == (other == planted)


def test_a_verdict_claims_nothing_of_a_gain_that_is_not_there():
    rng = np.random.default_rng(0)
    effects = everywhere(rng, more=dict.fromkeys(CLAIMS, 3.0))
    own, noise = effects.full["own"], torch.from_numpy(0.1 * rng.standard_normal((12, 1)))
    no_other = replace(effects, full=effects.full | {"other_user": own + noise}).verdict()
    assert "The gain over another user is not reliably above 0" in no_other
    assert "More of the gain over no profile" in no_other
    assert not any(word in no_other for word in ("More of the gain over another", "Necessity", "Sufficiency"))
    no_profile = replace(effects, full=effects.full | {"no_profile": own + noise}).verdict()
    assert "The gain over no profile is not reliably above 0" in no_profile
    assert "More of the gain over another user" in no_profile
    neither = replace(effects, full=effects.full | {"no_profile": own + noise, "other_user": own + noise}).verdict()
    assert neither.startswith("Here the profile does not reliably help")


def test_a_verdict_names_what_it_is_not_about():
    effects = everywhere(np.random.default_rng(0), more=dict.fromkeys(CLAIMS, 3.0))
    fewer = replace(effects, draws={name: effects.draws[name] for name in ("own", "no_profile", "noising_other")})
    verdict = fewer.verdict()
    assert "Random sets were not measured for neutral_cost, gain_removed_other, sufficiency_other" in verdict
    assert "Necessity: patching them from another user's run loses more" in verdict
    assert "Nothing was measured with another user's profile" in claims_of(np.random.default_rng(0), 12, 0.0)
    assert "Nothing was measured" not in effects.verdict()


def test_a_verdict_says_where_intervals_fall_short():
    rng = np.random.default_rng(0)
    assert "5 users are too few to show skewed effects" in claims_of(rng, 5, 0.0)
    skewed = np.zeros((21, 12))
    skewed[:] = rng.normal(size=12) * 0.1
    skewed[:, 3] = 5.0
    effects = random_set_effects(skewed, 0 * skewed, np.full(12, 3.0) + 0.1 * rng.normal(size=12))
    assert "Effects are skewed over users (skewness 3." in effects.verdict()
    row = effects.to_frame().set_index("measure").loc["gain_removed"]
    assert row["skewness"] == pytest.approx(skew(skewed[0], bias=False))
    assert "skewed" not in claims_of(rng, 30, 0.0)


def test_a_verdict_is_about_what_was_measured(toy_model, toy_users):
    patched = dps.patch_heads(toy_model, toy_users, SETS, ks=(1,), n_random=0, max_examples=1)
    with pytest.raises(ScoreError, match="about the gain that an ablation takes.* these effects hold necessity"):
        patched.verdict()
    rng = np.random.default_rng(0)
    taken = 0.3 + 0.1 * rng.standard_normal((21, 8))
    effects = random_set_effects(taken, 0 * taken, np.full(8, 3.0) + 0.1 * rng.normal(size=8))
    with pytest.raises(ScoreError, match="no family 'others' with K = 1; families are heads, and K 1"):
        effects.verdict("others")
    with pytest.raises(ScoreError, match="no family 'heads' with K = 5"):
        effects.beside_random(k=5)
    half = replace(effects, draws={"own": effects.draws["own"]})
    assert "not measured both with and without" in half.verdict()


def test_a_verdict_needs_random_sets_for_its_level():
    rng = np.random.default_rng(0)
    taken = 0.3 + 0.1 * rng.standard_normal((20, 8))
    taken[0] += 3
    effects = random_set_effects(taken, 0 * taken, np.full(8, 3.0) + 0.1 * rng.normal(size=8))
    assert "More of the gain" in effects.verdict()
    assert "19 random sets are too few to claim anything of these heads at 99%, 99 are needed" in effects.verdict(
        level=0.99
    )
