"""Sets of heads against plain Hugging Face: what they do, how each finder chooses, whom a fit looks at."""

import shutil
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
import toy
from conftest import no_hooks_left
from folders import digest
from oracles import attention_modules, columns_replaced, edited_positions, nll, output_projection, z_of
from torch.nn.functional import cross_entropy

import dps_lens as dps
from dps_lens.data import build_prompt
from dps_lens.data.conditions import donors_of, neutral_prompt
from dps_lens.errors import HeadError, RunError, ScoreError
from dps_lens.finding.sets import Weighted
from dps_lens.finding.work import FindWork
from dps_lens.heads import Head, HeadSet
from dps_lens.selection import folds
from dps_lens.work import Failure

# Nats per token. Float32 losses of a few nats, from a cache and from a whole forward, differ by 1e-6 to 1e-5; effects
# that are compared are above 1e-2.
TOLERANCE = 1e-4
CARRIER = Head(*toy.CARRIER)
TEXTS = tuple(
    f"The tide comes in {n} times a day, and nobody at the harbour looks up when it does. " * 4 for n in "abc"
)
CONFIG = dps.FindConfig(n_donors=1, n_bootstraps=0, neutral=TEXTS)
SHORT = dps.PromptConfig(items=3, profile_tokens=60, task_tokens=30, response_tokens=8)
HEADS = [Head(layer, head) for layer in range(3) for head in range(4)]
METHODS = ("rank", "greedy", "conditional")


class Plain:
    """What sets do and what paths score, of a plain Hugging Face model, one forward a set."""

    def __init__(self, tiny, users, max_examples, seed=0, donors=1):
        self.model, self.plain, self.d_head = tiny.hooked, tiny.plain, tiny.hooked.cfg.d_head
        self.examples = [e for user in users for e in user.discovery_examples()[-max_examples:]]
        places = sorted(f"{e.user_id}|{e.id}" for e in self.examples)
        self.owners = [e.user_id for e in self.examples]
        self.prompts = []
        for e in self.examples:
            shown = {"own": "own", "no_profile": "none"}
            made = {name: build_prompt(self.model, e, profile, config=SHORT) for name, profile in shown.items()}
            others = donors_of(e, users, donors, seed)
            made["others"] = [build_prompt(self.model, e, donor, config=SHORT) for donor in others]
            place = places.index(f"{e.user_id}|{e.id}")
            self.prompts.append(made | {"neutral": neutral_prompt(self.model, TEXTS[place % len(TEXTS)])})
        self.known = {}

    def nll(self, base, source, heads):
        """NLL of a prompt with heads patched from the run of another, or zeroed without one."""
        at = edited_positions(base, "response")
        with ExitStack() as stack:
            for layer, head in heads:
                columns = slice(head * self.d_head, (head + 1) * self.d_head)
                value = 0.0
                if source is not None:
                    value = z_of(self.plain, source, layer)[edited_positions(source, "response"), columns]
                stack.enter_context(columns_replaced(self.plain, layer, head, self.d_head, at, value))
            return nll(self.plain, base)

    def does(self, row, name, heads):
        key = (row, name, frozenset(heads))
        if key not in self.known:
            made = self.prompts[row]
            pairs = {
                "necessity": [(made["own"], other) for other in made["others"]],
                "sufficiency": [(other, made["own"]) for other in made["others"]],
                "task_cost": [(made["no_profile"], None)],
                "neutral_cost": [(made["neutral"], None)],
            }[name]
            sign = -1 if name == "sufficiency" else 1
            self.known[key] = np.mean([sign * (self.nll(*pair, heads) - self.nll(*pair, ())) for pair in pairs])
        return self.known[key]

    def mean(self, name, heads, without=()):
        """Mean over users of their examples' means."""
        users = [user for user in dict.fromkeys(self.owners) if user not in without]
        rows = {user: [row for row, owner in enumerate(self.owners) if owner == user] for user in users}
        return np.mean([np.mean([self.does(row, name, heads) for row in rows[user]]) for user in users])

    def path(self, base, source, steps=5):
        """Integrated gradients of every head, by autograd through gates on the output projection's input."""
        at, d_head = edited_positions(base, "response"), self.d_head
        ends = [0.0] * 3
        if source is not None:
            ends = [z_of(self.plain, source, layer)[edited_positions(source, "response")] for layer in range(3)]
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        total = torch.zeros(3, 4, dtype=torch.float64)
        for node, weight in zip(nodes, weights, strict=True):
            gates = torch.full((3, 4), (node + 1) / 2, dtype=torch.float32, requires_grad=True)
            handles = []
            for layer, attention in enumerate(attention_modules(self.plain)):

                def edit(module, arguments, layer=layer, gates=gates):
                    z = arguments[0].clone()
                    gate = gates[layer].repeat_interleave(d_head)
                    z[:, at] = ends[layer] + gate * (z[:, at] - ends[layer])
                    return (z, *arguments[1:])

                handles.append(output_projection(attention).register_forward_pre_hook(edit))
            start, stop = base.spans["response"]
            logits = self.plain(input_ids=base.tokens[None]).logits[0, start - 1 : stop - 1].double()
            (gradient,) = torch.autograd.grad(cross_entropy(logits, base.tokens[start:stop]), gates)
            for handle in handles:
                handle.remove()
            total -= weight / 2 * gradient.double()
        return total.numpy()

    def mean_path(self, pairs_of):
        """Mean over users of examples' mean paths."""
        by_user = {}
        for made, owner in zip(self.prompts, self.owners, strict=True):
            by_user.setdefault(owner, []).append(np.mean([self.path(*pair) for pair in pairs_of(made)], axis=0))
        return np.mean([np.mean(of, axis=0) for of in by_user.values()], axis=0)


RANK = {"method": "rank", "max_task_cost": None, "max_neutral_cost": None}
"""The finder that the oracles are of."""


@pytest.fixture(scope="module")
def people(probe):
    """Three users; the last one has a single discovery example, the others two."""
    short = probe[2]
    return [*probe[:2], replace(short, history=short.history[:4])]


@pytest.fixture(scope="module")
def plain(tinies, people):
    return Plain(tinies("llama"), people, 2)


def find(llama, people, k=3, **options):
    config = options.pop("find_config", CONFIG)
    options = RANK | options
    return dps.find_heads(llama.hooked, people, k, max_examples=2, prompt_config=SHORT, find_config=config, **options)


def order(values):
    """Heads of largest value that is above 0, best first."""
    return [head for head in sorted(HEADS, key=lambda head: -values[head]) if values[head] > 0]


def gain(plain, heads):
    return (plain.mean("necessity", heads) + plain.mean("sufficiency", heads)) / 2


def forward_selection(plain, k, keeps=lambda heads: True):
    """The definition of `Greedy`, over all heads."""
    chosen = []
    while len(chosen) < k:
        gains = {head: gain(plain, [*chosen, head]) for head in HEADS if head not in chosen}
        allowed = [head for head in gains if keeps([*chosen, head])]
        best = max(allowed, key=gains.get, default=None)
        if best is None or gains[best] - gain(plain, chosen) <= TOLERANCE:
            break
        chosen.append(best)
    return chosen


def test_people_differ_in_examples(people):
    assert [len(user.discovery_examples()[-2:]) for user in people] == [2, 2, 1]


def test_what_sets_do_equals_plain_hugging_face(llama, people, plain):
    found = find(llama, people)
    assert found.example_ids == tuple(e.id for e in plain.examples)
    for row, owner in enumerate(plain.owners):
        for name in ("necessity", "sufficiency", "task_cost", "neutral_cost"):
            assert float(found.effects[name][row]) == pytest.approx(plain.does(row, name, found.heads), abs=TOLERANCE)
            own = found.of_user(owner)
            assert float(found.crossed[name][row]) == pytest.approx(plain.does(row, name, own), abs=TOLERANCE)
        made = plain.prompts[row]
        for name, prompt in (("own", made["own"]), ("no_profile", made["no_profile"]), ("against", made["others"][0])):
            assert float(found.nll[name][row]) == pytest.approx(nll(plain.plain, prompt), abs=TOLERANCE)
    frame = found.evidence().set_index(["sample", "measure"])["mean"]
    assert frame["in-sample", "necessity"] == pytest.approx(plain.mean("necessity", found.heads), abs=TOLERANCE)
    assert no_hooks_left(llama.hooked)


def test_rank_is_the_order_of_integrated_scores(llama, people, plain):
    values = plain.mean_path(lambda made: [(made["own"], other) for other in made["others"]])
    found = find(llama, people, 4)
    assert found.values.numpy() == pytest.approx(values, abs=TOLERANCE)
    assert list(found.heads) == order(values)[:4]
    assert len(order(values)) >= 4


def test_rank_takes_the_smallest_penalty_whose_set_keeps_its_bounds(llama, people, plain):
    score = plain.mean_path(lambda made: [(made["own"], other) for other in made["others"]])
    cost = plain.mean_path(lambda made: [(made["no_profile"], None)])
    penalties = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    sets = [order(score - penalty * np.maximum(cost, 0))[:3] for penalty in penalties]
    costs = [plain.mean("task_cost", heads) for heads in sets]
    assert costs[0] > min(costs) + 0.02, "the penalty lowers the cost"
    bound = (costs[0] + min(costs)) / 2
    expected = next(heads for heads, one in zip(sets, costs, strict=True) if one <= bound)
    found = find(llama, people, max_task_cost=bound)
    assert list(found.heads) == expected
    assert plain.mean("task_cost", found.heads) <= bound
    assert found.manifest["max_task_cost"] == bound


def test_greedy_equals_naive_forward_selection(llama, people, plain):
    free = forward_selection(plain, 3)
    assert list(find(llama, people, method="greedy").heads) == free
    dear = max(plain.mean("task_cost", free[:size]) for size in (1, 2, 3))
    bound = dear - 0.02
    bounded = forward_selection(plain, 3, lambda heads: plain.mean("task_cost", heads) <= bound)
    assert bounded
    assert bounded != free
    found = find(llama, people, method="greedy", max_task_cost=bound)
    assert list(found.heads) == bounded
    assert all(plain.mean("task_cost", found.heads[:size]) <= bound for size in (1, 2, 3))


def test_greedy_tries_so_many_candidates_of_the_integrated_scores(llama, people, plain):
    values = plain.mean_path(lambda made: [(made["own"], other) for other in made["others"]])
    found = find(llama, people, method=dps.Greedy(candidates=4))
    assert set(found.heads) <= set(sorted(HEADS, key=lambda head: -values[head])[:4])
    assert found.manifest["method"] == {"name": "greedy", "candidates": 4, "least": 1e-4}
    # As many as are asked for are always tried.
    assert len(find(llama, people, method=dps.Greedy(candidates=1, least=0.0)).heads) > 1


@pytest.mark.parametrize("by", ["effect", "growth"])
def test_conditional_adds_the_largest_effect_once_the_set_is_gone(llama, people, plain, by):
    values = plain.mean_path(lambda made: [(made["own"], other) for other in made["others"]])
    chosen = order(values)[:1]
    while len(chosen) < 3:
        added = {
            h: plain.mean("necessity", [*chosen, h]) - plain.mean("necessity", chosen) for h in HEADS if h not in chosen
        }
        if by == "growth":
            added = {h: one - plain.mean("necessity", [h]) for h, one in added.items()}
        chosen.append(max(added, key=added.get))
        assert added[chosen[-1]] > TOLERANCE
    assert list(find(llama, people, method=dps.Conditional(by=by, all_rounds=2)).heads) == chosen


def test_counterfactuals(llama, people, plain):
    """Both: the mean over the donor's run and the run without a profile."""
    pairs = {
        "other_user": lambda made: [(made["own"], made["others"][0])],
        "no_profile": lambda made: [(made["own"], made["no_profile"])],
    }
    expected = {name: plain.mean_path(of) for name, of in pairs.items()}
    expected["both"] = (expected["other_user"] + expected["no_profile"]) / 2
    for against, values in expected.items():
        found = find(llama, people, against=against)
        assert found.values.numpy() == pytest.approx(values, abs=TOLERANCE)


@dataclass(frozen=True)
class Weighing(dps.Finder):
    """Chooses head i for the i-th user that weighs something, and keeps the weights as values."""

    name: ClassVar[str] = "weighing"
    n_bootstraps: ClassVar[int] = 40
    together: ClassVar[int | None] = 7

    def fit(self, trials, weights, k, bounds, seed):
        fits = []
        for row in weights:
            of_user = Counter()
            for trial, weight in zip(trials, row.tolist(), strict=True):
                of_user[int(trial.user_id.removeprefix("u"))] += weight
            values = torch.zeros(2, 4)
            for user, weight in of_user.items():
                values[divmod(user, 4)] = weight
            assert float(row.sum()) == pytest.approx(1)
            heads = HeadSet(divmod(user, 4) for user, weight in sorted(of_user.items()) if weight > 0)
            fits.append(dps.Fit(heads, values))
        return fits


def users_in(heads):
    return {f"u{4 * head.layer + head.head}" for head in heads}


def test_fits_look_at_the_users_that_they_say(toy_model, toy_users):
    users = [replace(user, history=user.history[: 5 + number % 3]) for number, user in enumerate(toy_users)]
    assert len({len(user.discovery_examples()) for user in users}) > 1, "users differ in examples"
    found = dps.find_heads(toy_model, users, 8, method=Weighing(), seed=3, max_task_cost=None, max_neutral_cost=None)
    assert found.values.flatten()[:6].tolist() == pytest.approx([1 / 6] * 6), "users weigh equally"
    everybody = {user.id for user in users}
    assert users_in(found.heads) == everybody
    assert [list(fold) for fold in found.folds] == folds(users, 3)
    for fold, heads in zip(found.folds, found.by_fold, strict=True):
        assert users_in(heads) == everybody - {*fold}
        assert all(found.of_user(user) == heads for user in fold)
    assert len(found.resampled) == 40
    # A resample of n users misses each with probability (1 - 1/n)^n: 0.335 for six, here 240 times.
    missed = np.mean([user not in users_in(heads) for heads in found.resampled for user in everybody])
    assert missed == pytest.approx((5 / 6) ** 6, abs=0.1)
    assert len({str(heads) for heads in found.resampled}) > 10
    for head, one in found.inclusion.items():
        assert one.chosen == sum(head in heads for heads in found.resampled)
    again = dps.find_heads(
        toy_model, users[::-1], 8, method=Weighing(), seed=3, max_task_cost=None, max_neutral_cost=None
    )
    assert [str(heads) for heads in again.resampled] == [str(heads) for heads in found.resampled]


@pytest.mark.parametrize("method", METHODS)
def test_the_carrier_is_found_in_every_fit(toy_model, toy_users, method):
    found = dps.find_heads(toy_model, toy_users, 1, method=method, max_examples=2, max_neutral_cost=0.01)
    assert list(found.heads) == [CARRIER]
    assert all(list(heads) == [CARRIER] for heads in (*found.by_fold, *found.resampled))
    assert found.inclusion[CARRIER].frequency == 1
    assert len(found.by_fold) == 5
    assert len(found.resampled) == {"rank": 20, "greedy": 9, "conditional": 4}[method]
    assert no_hooks_left(toy_model)


@dataclass(frozen=True)
class Fixed(dps.Finder):
    """Says one set, whatever it costs."""

    name: ClassVar[str] = "fixed"
    names: str = "L0H0"

    def fit(self, trials, weights, k, bounds, seed):
        return [dps.Fit(HeadSet.parse(self.names), torch.zeros(3, 4)) for _ in weights]


def test_no_bound_is_broken_silently(llama, people, plain):
    dear = max(HEADS, key=lambda head: plain.mean("task_cost", [head]))
    cost = plain.mean("task_cost", [dear])
    assert cost > 0.05
    with pytest.raises(ScoreError, match=r"set of finder 'fixed' costs .*, and max_task_cost is"):
        find(llama, people, method=Fixed(str(dear)), max_task_cost=cost - 0.01)
    assert list(find(llama, people, method=Fixed(str(dear)), max_task_cost=cost + 0.01).heads) == [dear]


def test_a_ranking_that_breaks_its_bound_is_cut_short(llama, people, plain):
    """To the longest beginning that keeps it, measured as a set; with a warning, or an error where none does."""
    best = order(plain.mean_path(lambda made: [(made["own"], other) for other in made["others"]]))
    costs = [plain.mean("task_cost", best[:size]) for size in range(1, 5)]
    assert costs[3] > costs[2] + 0.02
    options = {"k": 4, "method": dps.Rank(penalties=(0.0,))}
    with pytest.warns(UserWarning, match=r"the set holds 3 of 4 heads \(task_cost -?0\.\d+\).*keeps max_task_cost="):
        found = find(llama, people, max_task_cost=(costs[2] + costs[3]) / 2, **options)
    assert list(found.heads) == best[:3]
    with pytest.raises(
        ScoreError, match=r"'rank' found no head that helps and keeps max_task_cost=.*; raise the bound"
    ):
        find(llama, people, max_task_cost=min(costs) - 0.02, **options)


@pytest.mark.parametrize(
    "method", [pytest.param(one, marks=[pytest.mark.full] * (one == "conditional")) for one in METHODS]
)
def test_a_stopped_run_resumes_byte_for_byte(llama, people, tmp_path, method):
    options = {"method": method, "find_config": replace(CONFIG, n_bootstraps=6), "max_neutral_cost": 0.3}
    whole = find(llama, people, out=tmp_path / "whole", **options)
    units = sorted((tmp_path / "whole" / "units").iterdir())
    for kept in (0, len(units) // 2, len(units) - 1):
        part = tmp_path / f"part{kept}"
        shutil.copytree(tmp_path / "whole", part)
        for name in ("found.json", "found.safetensors"):
            (part / name).unlink()
        for unit in units[kept:]:
            (part / "units" / unit.name).unlink()
        again = find(llama, people, out=part, **options)
        assert digest(part) == digest(tmp_path / "whole")
        assert str(again.heads) == str(whole.heads)
    with pytest.raises(RunError, match="seed"):
        find(llama, people, out=tmp_path / "whole", seed=1, **options)


def test_work_travels_without_its_runs(llama, people):
    """And makes the same units where it arrives."""
    options = (dps.Rank(), "other_user", dps.Bounds(0.5), 2, SHORT, CONFIG, 0)
    work = FindWork(llama.hooked, people, 3, *options)
    (key, *_) = work.by_key
    unit = work.make(key)
    state = work.__getstate__()
    assert not {"model", "_trials", "_given"} & {*state}
    other = FindWork.__new__(FindWork)
    vars(other).update(state, model=llama.hooked)
    assert {name: value.tolist() for name, value in other.make(key).items()} == {
        name: value.tolist() for name, value in unit.items()
    }


def test_shards_find_the_whole_set(llama, people):
    whole = find(llama, people)
    part = find(llama, people, engine=dps.Shard(1, 2))
    assert str(part.heads) == str(whole.heads)
    assert part.example_ids == whole.example_ids


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 0}, ScoreError, "find_heads: k 0 is not a whole number from 1 up"),
        ({"k": 13}, HeadError, "asked for 13 of 12 heads"),
        ({"method": "best"}, ScoreError, "method 'best' is unknown; use one of rank, greedy, conditional"),
        ({"against": "nobody"}, ScoreError, "against 'nobody' is unknown"),
        ({"max_task_cost": float("nan")}, ScoreError, "max_task_cost nan is not a number"),
        ({"max_neutral_cost": "0.1"}, ScoreError, "max_neutral_cost '0.1' is not a number"),
        (
            {"max_neutral_cost": 0.1, "find_config": replace(CONFIG, neutral=())},
            ScoreError,
            "max_neutral_cost needs neutral texts",
        ),
        ({"method": Fixed("")}, ScoreError, "'fixed' found no head that helps; give more users"),
        ({"method": Fixed(""), "max_task_cost": 0.1}, ScoreError, "and keeps max_task_cost=0.1; raise the bound"),
        ({"method": Fixed("L0H0,L0H1,L0H2,L0H3")}, ScoreError, "gave 4 heads for k=3"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors(llama, people, options, error, message):
    with pytest.raises(error, match=message):
        find(llama, people, **options)


@pytest.mark.usefixtures("unchecked")
def test_errors_of_settings(llama, people):
    with pytest.raises(ScoreError, match="there are no users"):
        find(llama, [])
    with pytest.raises(ScoreError, match="needs at least two users; use 'no_profile'"):
        find(llama, people[:1])
    for make in (
        lambda: dps.FindConfig(n_donors=0),
        lambda: dps.FindConfig(ig_steps=0),
        lambda: dps.FindConfig(n_bootstraps=-1),
        lambda: dps.FindConfig(folds="no"),
        lambda: dps.Rank(penalties=()),
        lambda: dps.Rank(penalties=(1.0, 0.5)),
        lambda: dps.Greedy(candidates=0),
        lambda: dps.Greedy(least=-1),
        lambda: dps.Conditional(by="size"),
        lambda: dps.Conditional(all_rounds=-1),
    ):
        with pytest.raises(ScoreError):
            make()


def test_one_user_alone_has_no_folds(llama, people):
    found = find(llama, people[:1], against="no_profile", find_config=replace(CONFIG, n_bootstraps=5))
    assert found.folds == found.by_fold == found.resampled == ()
    assert found.inclusion == {}
    assert found.crossed == {}
    with pytest.raises(ScoreError, match="no fit left the user out"):
        found.of_user(people[0].id)


def test_without_neutral_texts_there_is_no_neutral_cost(llama, people):
    found = find(llama, people, find_config=replace(CONFIG, neutral=()))
    assert {*found.effects} == {"necessity", "sufficiency", "task_cost"}


def test_both_counterfactuals_weigh_the_same_whatever_the_donors(llama, people):
    config = dps.FindConfig(n_donors=2, n_bootstraps=0, folds=False)
    found = dps.find_heads(llama.hooked, people, 2, against="both", find_config=config, max_examples=1, **RANK)
    scores = dps.score_heads(
        llama.hooked, people, against="both", max_examples=1, score_config=dps.ScoreConfig(n_donors=2)
    )
    assert torch.allclose(found.values.double(), scores.mean(), atol=1e-6)
    assert found.heads.heads == scores.top(2).heads
    nll = (scores.nll["other_user"] + scores.nll["no_profile"]) / 2
    assert torch.allclose(found.nll["against"], nll, atol=1e-6)


class Known(Weighted):
    """Two heads whose scores and costs are known."""

    def path(self, quantity):
        return torch.tensor([[1.0, 0.9]] if quantity == "necessity" else [[0.1, 0.1]]).double()

    def keeps(self, sets, bounds):
        return [{1: 0.05, 2: 0.11}[len(heads)] <= bounds.task_cost for heads in sets]


def test_rank_cuts_the_last_penalty_that_has_heads():
    (fit,) = [dps.Rank()._fit(Known([], torch.zeros(0)), 2, dps.Bounds(task_cost=0.06))]
    assert fit.heads.heads == (Head(0, 0),)


def test_units_of_other_examples_are_not_read(llama, people, tmp_path):
    """Fits that were made without an example, which an engine gave up, are made again when it is there."""
    options = {"max_examples": 1, "find_config": dps.FindConfig(n_donors=1, n_bootstraps=0), **RANK}
    whole = dps.find_heads(llama.hooked, people, 2, **options)
    with_one_lost = LoseFirst()
    with pytest.warns(UserWarning, match="given up"):
        dps.find_heads(llama.hooked, people, 2, out=tmp_path, engine=with_one_lost, **options)
    again = dps.find_heads(llama.hooked, people, 2, out=tmp_path, **options)
    assert torch.equal(again.values, whole.values)
    assert again.heads == whole.heads
    assert all(torch.equal(again.effects[name], whole.effects[name]) for name in whole.effects)


class LoseFirst(dps.Engine):
    """Gives up the first example."""

    def __init__(self):
        self.lost = False

    def make(self, work, keys, folder):
        for key in keys:
            if not self.lost:
                self.lost = True
                yield key, Failure("no luck")
            else:
                yield key, work.make(key, work.given(key))
