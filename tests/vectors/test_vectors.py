"""Steering vectors against plain Hugging Face models: how they are made, and what they do to what is written."""

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, no_hooks_left
from torch.nn import ModuleList

import dps_lens as dps
from dps_lens.data import Note
from dps_lens.data.tokenizer import PromptTokenizer
from dps_lens.errors import HeadError, SteeringError
from dps_lens.vectors.style import style_differences

PROMPT = dps.PromptConfig(items=2, profile_tokens=40, task_tokens=16, response_tokens=6)
GAP = 1e-4


def block(plain, layer):
    """A layer of the plain model: in the only list of modules that is as long as the model is deep."""
    depth = plain.config.num_hidden_layers
    (found,) = [m for m in plain.modules() if isinstance(m, ModuleList) and len(m) == depth]
    return found[layer]


@torch.no_grad()
def last_states(plain, tokens):
    """What leaves every layer at the last token, layer by layer."""
    found, handles = {}, []
    for layer in range(plain.config.num_hidden_layers):

        def keep(module, inputs, output, layer=layer):
            output = output[0] if isinstance(output, tuple) else output
            found[layer] = output.reshape(-1, output.shape[-1])[-1].clone()

        handles.append(block(plain, layer).register_forward_hook(keep))
    plain(input_ids=tokens[None])
    for handle in handles:
        handle.remove()
    return [found[layer] for layer in sorted(found)]


@torch.no_grad()
def greedy(plain, tokens, n_new):
    for _ in range(n_new):
        tokens = torch.cat([tokens, plain(input_ids=tokens[None]).logits[0, -1].argmax()[None]])
    return tokens


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_style_vectors_follow_the_formula(tinies, architecture, probe):
    """Mean over the history of h(x, own text) − h(x, generic text) at the last token, one plain pass at a time."""
    tiny, user = tinies(architecture), probe[0]
    generic = {example.id: f"A text, number {index}." for index, example in enumerate(user.discovery_examples())}
    differences = []
    for example in user.discovery_examples()[-3:]:
        prompt = dps.build_prompt(tiny.hooked, example, "none", config=PROMPT)
        dull = PromptTokenizer(tiny.hooked).answer(generic[example.id], PROMPT.response_tokens)
        own = last_states(tiny.plain, prompt.tokens)
        other = last_states(tiny.plain, torch.cat([prompt.prompt_tokens, torch.tensor(dull)]))
        differences.append(torch.stack(own) - torch.stack(other))
    expected = torch.stack(differences).mean(0)
    for layer in range(tiny.hooked.cfg.n_layers):
        found = dps.style_vector(tiny.hooked, user, layer=layer, generic=generic, max_examples=3, prompt_config=PROMPT)
        assert found.layer == layer
        torch.testing.assert_close(found.values, expected[layer], atol=1e-4, rtol=1e-4)
    assert no_hooks_left(tiny.hooked)


def test_the_generic_answer_is_the_models_own(llama, probe):
    user = probe[0]
    example = user.discovery_examples()[-1]
    prompt = dps.build_prompt(llama.hooked, example, "none", config=PROMPT)
    written = greedy(llama.plain, prompt.prompt_tokens, 4)
    special = set(llama.hooked.tokenizer.all_special_ids)
    assert not special & set(written[-4:].tolist()), "choose another example: its answer ends early"
    expected = last_states(llama.plain, prompt.tokens)[1] - last_states(llama.plain, written)[1]
    found = dps.style_vector(llama.hooked, user, layer=1, max_examples=1, max_new_tokens=4, prompt_config=PROMPT)
    torch.testing.assert_close(found.values, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def naive(plain, prompt, new, layer, values):
    """Logits after `new`, with `values` added to what leaves a layer from the last prompt token on."""
    start = len(prompt) - 1

    def add(module, inputs, output):
        states = output[0] if isinstance(output, tuple) else output
        states = states.clone()
        states[:, start:] += values
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = block(plain, layer).register_forward_hook(add)
    try:
        return plain(input_ids=torch.cat([prompt, new])[None]).logits[0, -1].double().numpy()
    finally:
        handle.remove()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_vector_is_added_to_what_leaves_its_layer(tinies, architecture, probe):
    """Each prompt its own vector, layer and strength, in one batch; γ = 0 is the model itself."""
    tiny = tinies(architecture)
    model, generator = tiny.hooked, torch.Generator().manual_seed(0)
    prompts = [dps.build_prompt(model, user.examples[0], config=PROMPT) for user in probe[:4]]
    layers, gammas = [0, model.cfg.n_layers - 1, 1, 1], [0.5, 2.0, -1.0, 0.0]
    vectors = [dps.SteeringVector(torch.randn(model.cfg.d_model, generator=generator), layer) for layer in layers]
    out = dps.generate(
        model,
        prompts,
        rule="vector",
        vectors=vectors,
        gamma=gammas,
        max_new_tokens=4,
        decode_config=dps.DecodeConfig(stop_at_eos=False),
    )
    moved = 0.0
    for row, (prompt, vector, gamma) in enumerate(zip(prompts, vectors, gammas, strict=True)):
        for step, token in enumerate(out.tokens[row].tolist()):
            logits = naive(
                tiny.plain, prompt.prompt_tokens, out.tokens[row][:step], vector.layer, gamma * vector.values
            )
            second, first = np.sort(logits)[-2:]
            assert first - second > GAP, "the reference itself is undecided here; use another prompt"
            assert int(logits.argmax()) == token, (row, step)
            expected = logits[token] - np.logaddexp.reduce(logits)
            assert float(out.logprobs[row][step]) == pytest.approx(expected, abs=1e-3)
            plain = naive(tiny.plain, prompt.prompt_tokens, out.tokens[row][:step], vector.layer, 0 * vector.values)
            moved = max(moved, float(np.abs(logits - plain).max()))
        assert bool(out.kl[row].isnan().all()) == bool(gamma), "with a vector the full model does not run"
    assert moved > 0.05
    assert no_hooks_left(model)


def test_vectors_leave_with_their_rows(llama, probe):
    """A row that ends takes its vector along; the others are written as if alone."""
    prompts = [dps.build_prompt(llama.hooked, user.examples[0], config=PROMPT) for user in probe[:3]]
    generator = torch.Generator().manual_seed(1)
    vectors = [dps.SteeringVector(torch.randn(llama.hooked.cfg.d_model, generator=generator), row) for row in (0, 1, 1)]
    alone = [
        dps.generate(
            llama.hooked,
            prompt,
            rule="vector",
            vectors=vector,
            max_new_tokens=6,
            decode_config=dps.DecodeConfig(stop_at_eos=False),
        ).tokens[0]
        for prompt, vector in zip(prompts, vectors, strict=True)
    ]
    end = int(alone[0][1])
    config = llama.hooked.original_model.generation_config
    before, config.eos_token_id = config.eos_token_id, end
    try:
        out = dps.generate(llama.hooked, prompts, rule="vector", vectors=vectors, max_new_tokens=6)
    finally:
        config.eos_token_id = before
    for row, expected in enumerate(alone):
        stop = expected.tolist().index(end) + 1 if end in expected.tolist() else 6
        assert out.tokens[row].tolist() == expected[:stop].tolist()
    assert len(out.tokens[0]) <= 2


def test_a_vector_stacks_with_cad(llama, probe):
    own, none = (
        dps.build_prompt(llama.hooked, probe[0].examples[0], which, config=PROMPT) for which in ("own", "none")
    )
    vector = dps.SteeringVector(torch.randn(llama.hooked.cfg.d_model, generator=torch.Generator().manual_seed(2)), 0)
    options = {"vectors": vector, "gamma": 0.7, "negative_prompts": none, "alpha": 0.4}
    out = dps.generate(
        llama.hooked,
        own,
        rule="vector+cad",
        max_new_tokens=3,
        decode_config=dps.DecodeConfig(stop_at_eos=False),
        **options,
    )
    for step, token in enumerate(out.tokens[0].tolist()):
        new = out.tokens[0][:step]
        steered = naive(llama.plain, own.prompt_tokens, new, 0, 0.7 * vector.values)
        without = naive(llama.plain, none.prompt_tokens, new, 0, 0 * vector.values)
        assert int((1.4 * steered - 0.4 * without).argmax()) == token


def test_bad_input_says_what_to_do(llama, probe):
    prompt = dps.build_prompt(llama.hooked, probe[0].examples[0], config=PROMPT)
    good = dps.SteeringVector(torch.zeros(llama.hooked.cfg.d_model), 0)
    with pytest.raises(SteeringError, match="needs vectors="):
        dps.generate(llama.hooked, prompt, rule="vector")
    with pytest.raises(SteeringError, match="1 prompts and 2 vectors"):
        dps.generate(llama.hooked, prompt, rule="vector", vectors=[good, good])
    with pytest.raises(SteeringError, match="is not of this model"):
        dps.generate(llama.hooked, prompt, rule="vector", vectors=dps.SteeringVector(good.values[:-1], 0))
    with pytest.raises(SteeringError, match="is not of this model"):
        dps.generate(llama.hooked, prompt, rule="vector", vectors=dps.SteeringVector(good.values, 99))
    with pytest.raises(SteeringError, match="positions='response'"):
        dps.generate(llama.hooked, prompt, rule="vector", vectors=good, positions="all")
    with pytest.raises(HeadError, match="layer 99 is not in this model"):
        dps.style_vector(llama.hooked, probe[0], layer=99)
    with pytest.raises(SteeringError, match="holds no answer to example"):
        dps.style_vector(llama.hooked, probe[0], generic={}, prompt_config=PROMPT)
    with pytest.raises(SteeringError, match="needs a vector a user"):
        dps.steering_sweep(llama.hooked, probe[:2], {"x": "vector"})


@torch.no_grad()
def states_and_losses(plain, prompt, layer):
    """Token by token: −log p, and what leaves a layer where the token is predicted from."""
    found = []

    def keep(module, inputs, output):
        output = output[0] if isinstance(output, tuple) else output
        found.append(output.reshape(-1, output.shape[-1]))

    handle = block(plain, layer).register_forward_hook(keep)
    logits = plain(input_ids=prompt.tokens[None]).logits[0]
    handle.remove()
    start, stop = prompt.spans["response"]
    losses = [-float(logits[at - 1].log_softmax(-1)[prompt.tokens[at]]) for at in range(start, stop)]
    return losses, [found[0][at - 1] for at in range(start, stop)]


@pytest.mark.parametrize("backbone", ["means", "style"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_steerx_follows_its_formula(tinies, architecture, probe, backbone):
    tiny, user, layer, threshold = tinies(architecture), probe[0], 1, 0.05
    text = "This person likes short sentences."
    chosen, halves, weights, pieces = [], [], [], 0
    examples = user.discovery_examples()[-3:]
    for example in examples:
        read = {}
        for name, profile in (("own", "own"), ("none", "none"), ("note", Note(text))):
            prompt = dps.build_prompt(tiny.hooked, example, profile, config=PROMPT)
            read[name] = states_and_losses(tiny.plain, prompt, layer)
        deltas = [none - own for none, own in zip(read["none"][0], read["own"][0], strict=True)]
        assert min(abs(delta - threshold) for delta in deltas) > 1e-4
        driven = [at for at, delta in enumerate(deltas) if delta > threshold]
        weights.append(len(driven))
        pieces += len(driven)
        for at in driven:
            none = read["none"][1][at]
            halves.append(read["own"][1][at] - none)
            chosen.append(read["note"][1][at] - none)
    assert 0 < len(chosen) < 3 * PROMPT.response_tokens
    first = torch.stack(halves).mean(0)
    if backbone == "style":
        differences = style_differences(tiny.hooked, examples, prompt_config=PROMPT)[:, layer]
        first = sum(weight * one for weight, one in zip(weights, differences, strict=True)) / sum(weights)
    expected = 0.5 * first + 0.5 * torch.stack(chosen).mean(0)
    options = {"layer": layer, "backbone": backbone, "threshold": threshold, "max_examples": 3, "prompt_config": PROMPT}
    found = dps.steerx_vector(tiny.hooked, user, description=text, **options)
    torch.testing.assert_close(found.values, expected, atol=1e-4, rtol=1e-4)
    assert found.manifest["description"] == text
    assert found.manifest["share"] == pytest.approx(len(chosen) / (3 * PROMPT.response_tokens))
    assert no_hooks_left(tiny.hooked)
    # The description may be made of the pieces of text that the user prefers.
    seen = []
    again = dps.steerx_vector(tiny.hooked, user, description=lambda of: seen.extend(of) or text, **options)
    assert torch.equal(again.values, found.values)
    written = " ".join(example.reference for example in examples)
    assert seen
    assert all(piece in written for piece in seen)


def test_steerx_describes_by_itself_and_says_what_is_missing(llama, probe, unchecked):
    options = {"max_examples": 1, "prompt_config": PROMPT}
    found = dps.steerx_vector(llama.hooked, probe[0], threshold=-50.0, **options)
    assert found.manifest["share"] == 1.0
    assert found.manifest["description"]
    with pytest.raises(SteeringError, match="lower threshold="):
        dps.steerx_vector(llama.hooked, probe[0], threshold=50.0, **options)
    with pytest.raises(SteeringError, match="backbone 'mean' is unknown"):
        dps.steerx_vector(llama.hooked, probe[0], backbone="mean", **options)
    with pytest.raises(HeadError, match="layer 99"):
        dps.steerx_vector(llama.hooked, probe[0], layer=99)
