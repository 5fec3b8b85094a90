"""A user's LoRA: trained as by a plain loop over plain weights, and gone without a trace."""

import builtins

import pytest
import torch
from conftest import no_hooks_left
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import dps_lens as dps
from dps_lens.adapters.tuning import check_tunable, tune_lora
from dps_lens.errors import SteeringError
from dps_lens.evaluation.artifacts import Artifacts

PROMPT = dps.PromptConfig(items=2, profile_tokens=60, task_tokens=20, response_tokens=6)
OPTIONS = {"prompt_config": PROMPT, "rank": 2, "epochs": 2, "learning_rate": 0.02}


def weights(model):
    return {name: parameter.clone() for name, parameter in model.original_model.named_parameters()}


@pytest.fixture(scope="module")
def examples(probe):
    return probe[0].discovery_examples()[-3:]


def plainly_trained(tiny, examples):
    """PEFT's own model of the plain Hugging Face model, one step after the other."""
    prompts = [dps.build_prompt(tiny.hooked, example, "none", config=PROMPT) for example in examples]
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    tuned = get_peft_model(plain, LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM"))
    tuned.eval()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.02)
    from random import Random

    order = Random(0)
    for _ in range(2):
        for prompt in order.sample(prompts, len(prompts)):
            labels = prompt.tokens.clone()
            labels[: prompt.spans["response"][0]] = -100
            optimizer.zero_grad()
            tuned(input_ids=prompt.tokens[None], labels=labels[None]).loss.backward()
            optimizer.step()
    return tuned


def test_equals_plain_peft(tiny, examples):
    """On every architecture, GPT-2's transposed and fused projection too; Adam turns rounding into 1e-5 of a step."""
    before = weights(tiny.hooked)
    lora = tune_lora(tiny.hooked, examples, **OPTIONS)
    plain = plainly_trained(tiny, examples)
    tokens = dps.build_prompt(tiny.hooked, examples[0], "none", config=PROMPT).tokens[None]
    with torch.no_grad():
        expected, clean = plain(input_ids=tokens).logits, tiny.plain(input_ids=tokens).logits
        assert (expected - clean).abs().max() > 0.1, "training must do something"
        with lora.on(tiny.hooked), dps.model.native_attention(tiny.hooked):
            torch.testing.assert_close(tiny.hooked(tokens), expected, atol=2e-3, rtol=1e-3)
        with dps.model.native_attention(tiny.hooked):
            torch.testing.assert_close(tiny.hooked(tokens), clean, atol=1e-4, rtol=1e-4)
    for name, parameter in tiny.hooked.original_model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.requires_grad
    assert no_hooks_left(tiny.hooked)


def test_strength_scales_the_change(llama, examples):
    lora, before = tune_lora(llama.hooked, examples, **OPTIONS), weights(llama.hooked)
    changed = {}
    for strength in (0.5, 1.0):
        with lora.on(llama.hooked, strength):
            changed[strength] = weights(llama.hooked)
    touched = [name for name in before if not torch.equal(before[name], changed[1.0][name])]
    assert len(touched) == 6, "queries and values of three layers"
    for name in touched:
        half, whole = (changed[strength][name] - before[name] for strength in (0.5, 1.0))
        torch.testing.assert_close(2 * half, whole, atol=1e-6, rtol=1e-4)


def test_weights_come_back_after_an_error(llama, examples):
    lora, before = tune_lora(llama.hooked, examples, **OPTIONS), weights(llama.hooked)
    with pytest.raises(RuntimeError, match="inside"), lora.on(llama.hooked):
        raise RuntimeError("inside")
    assert all(torch.equal(before[name], now) for name, now in weights(llama.hooked).items())


def test_training_that_fails_leaves_the_model(llama, examples, monkeypatch):
    before = weights(llama.hooked)

    def fail(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("dps_lens.adapters.tuning.token_losses", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        tune_lora(llama.hooked, examples, **OPTIONS)
    assert {*weights(llama.hooked)} == {*before}


def test_the_same_seed_trains_the_same(llama, examples):
    state = torch.get_rng_state()
    one, two = (tune_lora(llama.hooked, examples, **OPTIONS).factors for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(state, torch.get_rng_state()), "the caller's random numbers are its own"
    other = tune_lora(llama.hooked, examples, **OPTIONS, seed=1).factors
    assert not torch.equal(one["model.layers.0.self_attn.q_proj.A"], other["model.layers.0.self_attn.q_proj.A"])


def test_evaluate_answers_with_the_adapter(llama, probe):
    """Rows of the table are what `generate` writes inside the adapter; both kinds of prompt, another user another."""
    methods = {"plain": "plain", "lora": "lora", "rag+lora": "rag+lora"}
    options = {"prompt_config": PROMPT, "max_new_tokens": 6, "max_examples": 1}
    table = dps.evaluate(
        llama.hooked,
        probe[:2],
        methods,
        strengths=(4.0,),
        evaluate_config=dps.EvaluateConfig(choose_on=0, vector_examples=3),
        **options,
    )
    for user in probe[:2]:
        adapter = tune_lora(llama.hooked, user.discovery_examples()[-3:], prompt_config=PROMPT)
        for name, shown in (("lora", "none"), ("rag+lora", "own")):
            prompt = dps.build_prompt(llama.hooked, user.examples[-1], shown, config=PROMPT)
            with adapter.on(llama.hooked, 4.0):
                text = dps.generate(llama.hooked, prompt, heads={}, gamma=0.0, max_new_tokens=6).texts[0].strip()
            found = table.rows[(table.rows["user"] == user.id) & (table.rows["method"] == name)]["text"].item()
            assert found == text
    texts = table.rows.groupby("method")["text"].agg(tuple)
    assert texts["lora"] != texts["plain"]


def test_choosing_leaves_out_the_examples_that_choose(llama, probe):
    user = probe[0]
    made = Artifacts(llama.hooked, [user], PROMPT, newest=2)
    found = made.adapter(user.id, leave_out=1).factors
    expected = tune_lora(llama.hooked, made._examples(user.id, 1), prompt_config=PROMPT).factors
    assert [one.id for one in made._examples(user.id, 1)] == [one.id for one in user.discovery_examples()[-3:-1]]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_needs_peft_and_a_bridge(llama, examples, monkeypatch):
    with pytest.raises(SteeringError, match="at least one example"):
        tune_lora(llama.hooked, [])
    with pytest.raises(SteeringError, match="transformer-lens>=4"):
        check_tunable("tune_lora", object())
    plain = builtins.__import__

    def missing(name, *arguments, **options):
        if name == "peft":
            raise ImportError(name)
        return plain(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(SteeringError, match="pip install peft"):
        tune_lora(llama.hooked, examples)
