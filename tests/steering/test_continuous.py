"""Requests that join and leave a batch write what they write alone."""

import random

import pytest
import torch
from conftest import ARCHITECTURES, no_hooks_left

import dps_lens as dps
from dps_lens.errors import SteeringError
from dps_lens.heads import HeadSet
from dps_lens.model import runner_of
from dps_lens.model.fast import cache as caches
from dps_lens.model.fast.cache import forget_first, join_rows, preallocated_cache
from dps_lens.steering.continuous import ContinuousBatch, Writing
from dps_lens.steering.plan import plan_of

SETS = [HeadSet.parse(names) for names in ("L0H1,L2H3", "L1H0", "L0H2,L1H1,L2H0")]
RULES = ["greedy", "dps", "dps-entropy", "dps-patch", "decore", "cad", "dola", "amplify", "vector", "head_vector",
         "dps+cad", "head_vector+dps"]  # fmt: skip


def requests(model, users, config, rules, *, seed=0):
    """Calls of `generate`, each with prompts, lengths, heads, strengths and sampling of its own."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shape = (model.cfg.n_layers, model.cfg.n_heads)
    for index, rule in enumerate(rules):
        parts, user = rule.split("+"), users[index % len(users)]
        own, bare = (
            dps.build_prompt(model, rng.choice(user.examples), which, config=config, response=False)
            for which in ("own", "none")
        )
        given = {"prompts": own, "rule": rule, "max_new_tokens": rng.randint(1, 14), "gamma": rng.choice([0.6, 1.5])}
        if any(part.startswith(("dps", "decore", "amplify")) for part in parts):
            given["heads"] = SETS[index % len(SETS)]
        if "cad" in parts or "dps-patch" in parts:
            given |= {"negative_prompts": bare, "alpha": 0.8}
        if "head_vector" in parts:
            values = torch.randn(2, model.cfg.d_head, generator=generator)
            given["vectors"] = dps.HeadVector(values, HeadSet([(0, 1), (2, 3)], shape=shape))
        if "vector" in parts:
            given["vectors"] = dps.SteeringVector(torch.randn(model.cfg.d_model, generator=generator), layer=1)
        if index % 3 == 1:
            given["sampling"] = dps.Sampling(temperature=0.9, top_p=0.95, seed=index)
        if index % 4 == 2 and rule in ("dps", "cad"):
            given["decode_config"] = dps.DecodeConfig(max_kl=0.3)
        yield given


def written(steps, text=0):
    return [int(token) for token in steps.columns["tokens"][text]]


def same(steps, alone, text=0):
    """The same tokens, and the same numbers up to rounding, as `generate` gives."""
    assert written(steps, text) == alone.tokens[0].tolist()
    for name, own in (("logprobs", alone.logprobs), ("shifts", alone.shifts), ("kl", alone.kl)):
        found = torch.stack(steps.columns[name][text])
        assert torch.allclose(found, own[0], atol=1e-4, rtol=1e-3, equal_nan=True)


def run(batch, asked, *, every=2):
    """Let requests join, one every few steps, and the batch run to its end."""
    writings, left = [], list(asked)
    for step in range(10_000):
        if left and step % every == 0:
            writings.append(Writing(plan_of(batch.model, **left.pop(0))))
            batch.add(writings[-1])
        batch.step()
        if not left and not len(batch):
            return writings
    raise AssertionError("the batch has no end")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_requests_that_come_and_go_write_what_they_write_alone(tinies, probe, short, architecture):
    model = tinies(architecture).hooked
    rules = RULES if architecture == "llama" else ["dps", "decore", "greedy", "cad", "dps", "head_vector"]
    asked = list(requests(model, probe, short, rules))
    alone = [dps.generate(model, **one) for one in asked]
    for writing, one in zip(run(ContinuousBatch(model, chunk=37), asked), alone, strict=True):
        assert writing.error is None
        same(writing.steps, one)
    assert no_hooks_left(model)


@pytest.mark.parametrize("every", [1, pytest.param(5, marks=pytest.mark.full)])
def test_many_requests_in_random_order(llama, probe, short, every):
    model = llama.hooked
    rules = random.Random(every).choices(["dps", "greedy", "cad", "amplify"], k=24)
    asked = list(requests(model, probe, short, rules, seed=every))
    alone = [dps.generate(model, **one) for one in asked]
    for writing, one in zip(run(ContinuousBatch(model, chunk=64), asked, every=every), alone, strict=True):
        same(writing.steps, one)


def test_several_texts_of_one_request_end_on_their_own(llama, probe, short):
    model, prompt = llama.hooked, dps.build_prompt(llama.hooked, probe[0].examples[0], config=short, response=False)
    samplings = [dps.Sampling(seed=seed) for seed in range(4)]
    options = {"heads": SETS[0], "max_new_tokens": 30}
    writing = Writing(plan_of(model, [prompt] * 4, sampling=samplings, **options))
    batch = ContinuousBatch(model)
    batch.add(writing)
    while len(batch):
        batch.step()
    for text, sampling in enumerate(samplings):
        same(writing.steps, dps.generate(model, prompt, sampling=sampling, **options), text)


def test_who_leaves_changes_nobody_else(llama, probe, short):
    model = llama.hooked
    asked = [{**one, "max_new_tokens": 12} for one in requests(model, probe, short, ["dps", "greedy", "dps", "cad"])]
    alone = [dps.generate(model, **one) for one in asked]
    batch, writings = ContinuousBatch(model), [Writing(plan_of(model, **one)) for one in asked]
    for one in writings:
        batch.add(one)
    batch.leave(writings[3])  # before its prompt was run
    for step in range(40):
        batch.step()
        if step == 6:
            batch.leave(writings[0])
    assert len(batch) == 0
    assert batch.rows == 0
    assert writings[3].steps.columns == {}
    same(writings[1].steps, alone[1])
    same(writings[2].steps, alone[2])
    assert written(writings[0].steps) == alone[0].tokens[0].tolist()[: len(written(writings[0].steps))]


def test_a_row_whose_numbers_overflow_ends_alone(llama, probe, short):
    model = llama.hooked
    good, bad = requests(model, probe, short, ["dps", "dps"])
    writings = [Writing(plan_of(model, **one)) for one in (good, {**bad, "gamma": 3.4e38})]
    batch = ContinuousBatch(model)
    for one in writings:
        batch.add(one)
    while len(batch):
        batch.step()
    assert isinstance(writings[1].error, SteeringError)
    same(writings[0].steps, dps.generate(model, **good))


def test_a_pass_that_fails_ends_those_that_were_in_it(llama, probe, short, monkeypatch):
    model = llama.hooked
    asked = [{**one, "max_new_tokens": 12} for one in requests(model, probe, short, ["dps", "greedy"])]
    batch, writings = ContinuousBatch(model), [Writing(plan_of(model, **one)) for one in asked]
    for one in writings:
        batch.add(one)
    for _ in range(3):
        batch.step()
    runner = type(runner_of(model))
    with monkeypatch.context() as patched:
        patched.setattr(runner, "step", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        batch.step()
    assert [str(one.error) for one in writings] == ["out of memory"] * 2
    assert len(batch) == 0
    assert no_hooks_left(model)
    again = Writing(plan_of(model, **asked[0]))
    batch.add(again)
    while len(batch):
        batch.step()
    same(again.steps, dps.generate(model, **asked[0]))


def test_a_join_that_fails_ends_those_who_would_share(llama, probe, short, monkeypatch):
    model = llama.hooked
    one, two, other = (
        {**each, "max_new_tokens": 12} for each in requests(model, probe, short, ["dps", "dps", "decore"])
    )
    batch, writings = (
        ContinuousBatch(model, chunk=10_000),
        [Writing(plan_of(model, **each)) for each in (one, other, two)],
    )
    batch.add(writings[0])
    batch.add(writings[1])
    batch.step()
    batch.add(writings[2])
    with monkeypatch.context() as patched:
        patched.setattr(type(runner_of(model)), "join", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        batch.step()
    assert [str(each.error) for each in writings] == ["out of memory", "None", "out of memory"]
    while len(batch):
        batch.step()
    same(writings[1].steps, dps.generate(model, **other))


def test_memory_is_that_of_who_is_here(llama, probe, short):
    """A batch that never empties forgets the positions of those that left."""
    model = llama.hooked
    batch = ContinuousBatch(model)
    longest = 0
    rng = random.Random(1)
    for _ in range(120):
        while len(batch) < 3:
            asked = next(requests(model, probe, short, ["dps"], seed=rng.randint(0, 99)))
            batch.add(Writing(plan_of(model, **asked)))
        batch.step()
        for lane in batch._lanes.values():
            longest = max(longest, lane.decoder.mask.shape[1])
            assert lane.decoder.mask[:, 0].any()
    assert longest < 2 * max(len(row.tokens) + 14 for lane in batch._lanes.values() for row in lane.decoder.rows)


@pytest.mark.parametrize("fast", [True, False])
def test_rows_of_two_caches_end_together(monkeypatch, fast):
    monkeypatch.setattr(caches, "is_fast", lambda: fast)
    generator = torch.Generator().manual_seed(0)

    def rows(n, length):
        return torch.randn(n, 2, length, 4, generator=generator)

    def grown(n, length):
        held = rows(n, length)
        return preallocated_cache([(held, held + 1)], torch.arange(n), room=3), held

    (cache, ours), (short, theirs), (long, longest) = grown(2, 5), grown(1, 3), grown(3, 9)
    join_rows(cache, short)
    join_rows(cache, long)
    layer = cache.layers[0]
    assert layer.keys.shape == (6, 2, 9, 4)
    for at, (of, held) in {0: (0, ours), 1: (1, ours), 2: (0, theirs), 3: (0, longest), 5: (2, longest)}.items():
        length = held.shape[2]
        assert torch.equal(layer.keys[at, :, 9 - length :], held[of])
        assert not layer.keys[at, :, : 9 - length].any()
        assert not layer.values[at, :, : 9 - length].any()
    new = rows(6, 1)
    layer.update(new, new)
    assert torch.equal(layer.keys[:, :, -1:], new)
    assert torch.equal(layer.values[2, :, 6:9], theirs[0] + 1)
    cache.batch_select_indices(torch.tensor([0, 5, 2, 1]))
    forget_first(cache, 2)
    assert torch.equal(layer.keys[1, :, :-1], longest[2][:, 2:])
    assert torch.equal(layer.keys[3, :, 2:7], ours[1])


def test_what_cannot_join_is_refused(llama, probe, short):
    model = llama.hooked
    asked = next(requests(model, probe, short, ["dps"]))
    with pytest.raises(SteeringError, match="positions='response'"):
        Writing(plan_of(model, **asked, positions="all"))
    with pytest.raises(SteeringError, match="leave compile out"):
        ContinuousBatch(model).add(Writing(plan_of(model, **asked, decode_config=dps.DecodeConfig(compile=True))))
