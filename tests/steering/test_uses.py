"""Several uses of one model: none touches another, or it is refused."""

import asyncio
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import no_hooks_left
from flat import generate

import dps_lens as dps
from dps_lens.data import build_prompt
from dps_lens.errors import ModelBusyError
from dps_lens.heads import HeadSet
from dps_lens.model import in_use, runs_native
from dps_lens.steering import decoder as decoding

SETS = [HeadSet.parse("L1H2,L0H1"), HeadSet.parse("L2H0,L1H0")]
OPTIONS = {"gamma": 2.0, "max_new_tokens": 6, "stop_at_eos": False}


@pytest.fixture(scope="module")
def prompts(tinies, probe, short):
    return [build_prompt(tinies("llama").hooked, user.examples[-1], config=short) for user in probe[:2]]


def same(one, other):
    return [row.tolist() for row in one.tokens] == [row.tolist() for row in other.tokens] and all(
        torch.equal(a, b) for a, b in zip(one.logprobs, other.logprobs, strict=True)
    )


def alone(model, prompts, **options):
    return [generate(model, p, heads=h, **{**OPTIONS, **options}) for p, h in zip(prompts, SETS, strict=True)]


@pytest.mark.parametrize("options", [{}, {"ablation": "uniform"}, {"rule": "amplify"}, {"positions": "profile"}])
def test_interleaved_streams_equal_lone_runs(llama, prompts, options):
    expected = alone(llama.hooked, prompts, **options)
    streams = [
        generate(llama.hooked, p, heads=h, stream=True, **OPTIONS, **options)
        for p, h in zip(prompts, SETS, strict=True)
    ]
    left = [iter(stream) for stream in streams]
    while left:
        left = [one for one in left if next(one, None) is not None]
    for stream, one in zip(streams, expected, strict=True):
        assert same(stream.generation, one)


def test_whatever_runs_beside_a_stream_is_untouched(llama, prompts, probe, short):
    model, ids = llama.hooked, prompts[0].tokens[None].repeat(3, 1)
    expected = alone(model, prompts)
    with torch.no_grad():
        plain = llama.plain(ids).logits
    cost = dps.ablation_cost(model, probe[:1], SETS[1], n_random=0, prompt_config=short, max_examples=1)
    stream = generate(model, prompts[0], heads=SETS[0], stream=True, **OPTIONS)
    for _ in stream:
        assert no_hooks_left(model)
        with torch.no_grad():
            assert float((model(ids) - plain).abs().max()) < 1e-4
        beside = dps.ablation_cost(model, probe[:1], SETS[1], n_random=0, prompt_config=short, max_examples=1)
        assert beside.to_frame().equals(cost.to_frame())
        assert same(generate(model, prompts[1], heads=SETS[1], **OPTIONS), expected[1])
    assert same(stream.generation, expected[0])


def test_tasks_of_asyncio_take_turns(llama, prompts):
    async def serve(prompt, heads):
        stream = generate(llama.hooked, prompt, heads=heads, stream=True, **OPTIONS)
        for _ in stream:
            await asyncio.sleep(0)
        return stream.generation

    async def both():
        return await asyncio.gather(*(serve(p, h) for p, h in zip(prompts, SETS, strict=True)))

    # In a thread of its own: the browser tests leave a running event loop in this one, where `run` is refused.
    with ThreadPoolExecutor(1) as pool:
        streams = pool.submit(lambda: asyncio.run(both())).result()
    for got, expected in zip(streams, alone(llama.hooked, prompts), strict=True):
        assert same(got, expected)


def test_a_deleted_stream_is_gone_without_the_collector(llama, prompts, monkeypatch):
    made = []

    class Watched(decoding.Decoder):
        def __enter__(self):
            made.append(weakref.ref(self))
            return super().__enter__()

    monkeypatch.setattr("dps_lens.steering.decoders.Decoder", Watched)
    gc.collect()
    gc.disable()
    try:
        stream = generate(llama.hooked, prompts[0], heads=SETS[0], stream=True, **OPTIONS)
        for _ in stream:
            break
        assert made[0]() is not None
        cache = weakref.ref(made[0]()._cache)
        del stream
        assert made[0]() is None
        assert cache() is None
    finally:
        gc.enable()
    assert no_hooks_left(llama.hooked)
    assert not runs_native(llama.hooked)


def test_hooks_that_come_in_the_middle_of_a_stream_act(llama, prompts):
    """Components that stand aside in a step come back when somebody hangs a hook on one."""
    model, seen = llama.hooked, []
    stream = iter(generate(model, prompts[0], heads=SETS[0], stream=True, **OPTIONS))
    next(stream)
    for hook in ("blocks.1.hook_resid_post", "blocks.2.attn.hook_z"):
        seen.clear()
        with model.hooks(fwd_hooks=[(hook, lambda value, hook: seen.append(tuple(value.shape)))]):
            next(stream)
        assert [shape[:2] for shape in seen] == [(2, 1)]
    seen.clear()
    next(stream)
    assert not seen


def test_an_ablation_that_is_held_open_acts_on_streams_too(llama, prompts):
    options = {**OPTIONS, "gamma": 0.0}
    with dps.ablate(llama.hooked, SETS[1], positions="all"):
        expected = generate(llama.hooked, prompts[0], heads=SETS[0], **options)
        stream = generate(llama.hooked, prompts[0], heads=SETS[0], stream=True, **options)
        assert "".join(text for _, text in stream) == expected.texts[0]
    assert not same(expected, generate(llama.hooked, prompts[0], heads=SETS[0], **options))


def in_a_thread(call):
    """What a call in another thread returns or raises."""
    found = []

    def run():
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_another_thread_is_refused_or_exact(llama, prompts, probe, short):
    model = llama.hooked
    calls = {
        "generate": lambda: generate(model, prompts[0], heads=SETS[0], **OPTIONS),
        "ablation_cost": lambda: dps.ablation_cost(model, probe[:1], SETS[1], n_random=0, prompt_config=short),
        "record_z": lambda: dps.record_z(model, prompts[0]),
        "ablate": lambda: dps.ablate(model, SETS[0], positions="all").__enter__(),
        "check_model": lambda: dps.check_model(model),
        "attention_pattern": lambda: dps.attention_pattern(model, prompts[0], SETS[0]),
        "logits_processor": lambda: dps.logits_processor(model, SETS[0])(
            prompts[0].prompt_tokens[None], torch.zeros(1, model.cfg.d_vocab)
        ),
    }
    with dps.ablate(model, SETS[1], positions="all"):
        for name, call in calls.items():
            error = in_a_thread(call)
            assert isinstance(error, ModelBusyError), (name, error)
            assert "one thread at a time" in str(error)
    expected = calls["generate"]()
    stream = generate(model, prompts[0], heads=SETS[0], stream=True, **OPTIONS)
    for _ in stream:
        assert same(in_a_thread(calls["generate"]), expected)
    assert same(stream.generation, expected)
    assert no_hooks_left(model)


def test_uses_nest_in_one_thread_and_models_are_apart(llama, tinies):
    def use(model):
        with in_use(model):
            return "used"

    with in_use(llama.hooked), in_use(llama.hooked):
        assert isinstance(in_a_thread(lambda: use(llama.hooked)), ModelBusyError)
        assert in_a_thread(lambda: use(tinies("qwen2").hooked)) == "used"
    assert in_a_thread(lambda: use(llama.hooked)) == "used"


def test_a_context_that_its_thread_left_open_keeps_others_out_until_it_is_closed(llama):
    model, left = llama.hooked, []

    def leave():
        left.append(dps.ablate(model, SETS[0], positions="all"))
        left[0].__enter__()

    in_a_thread(leave)
    with pytest.raises(ModelBusyError), in_use(model):
        pass
    left.clear()
    gc.collect()
    assert no_hooks_left(model)
    with in_use(model):
        pass
