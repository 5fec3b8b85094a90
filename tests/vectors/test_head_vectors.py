"""Head vectors against plain Hugging Face models: how they are made, and what they do to what is written."""

from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy
from conftest import ARCHITECTURES, no_hooks_left
from oracles import attention_modules, columns_replaced, nll, output_projection, z_of
from scipy.optimize import minimize

import dps_lens as dps
from dps_lens.data.conditions import donors_of, prompts_in
from dps_lens.data.tokenizer import PromptTokenizer
from dps_lens.errors import HeadError, ScoreError, SteeringError
from dps_lens.heads import Head, HeadSet
from dps_lens.steering.layout import layers_to_contrast
from dps_lens.steering.rules import RULES

PROMPT = dps.PromptConfig(items=2, profile_tokens=40, task_tokens=16, response_tokens=6)
HEADS = HeadSet.parse("L1H2,L0H1,L1H0")
DISCOVERY = dps.HeldOutConfig(on="discovery")
GAP = 1e-4


def response_z(plain, prompt, head, d_head):
    """z of a head where response tokens are predicted from, `[pos d_head]`."""
    start, stop = prompt.spans["response"]
    return z_of(plain, prompt, head.layer)[start - 1 : stop - 1, head.head * d_head : (head.head + 1) * d_head]


def prompts_of(model, users, example, against, generic):
    if against == "generic":
        prompt = dps.build_prompt(model, example, "none", config=PROMPT)
        answer = torch.tensor(PromptTokenizer(model).answer(generic[example.id], PROMPT.response_tokens))
        tokens = torch.cat([prompt.prompt_tokens, answer])
        spans = {**prompt.spans, "response": (len(prompt.prompt_tokens), len(tokens))}
        other = dps.Prompt(tokens, spans, prompt.text, "none", prompt.example_id, prompt.user_id, ())
        return prompt, [other]
    own = dps.build_prompt(model, example, config=PROMPT)
    return own, prompts_in(model, example, against, users, n_donors=2, config=PROMPT)


def z_by_hand(tiny, users, user, against, generic):
    """Own and counterfactual z of each of the user's two newest discovery examples, by head."""
    found = []
    for example in user.discovery_examples()[-2:]:
        own, others = prompts_of(tiny.hooked, users, example, against, generic)
        d_head = tiny.hooked.cfg.d_head
        found.append(
            {
                head: (
                    response_z(tiny.plain, own, head, d_head),
                    [response_z(tiny.plain, other, head, d_head) for other in others],
                )
                for head in HEADS
            }
        )
    return found


@pytest.fixture(scope="module")
def users(probe):
    return probe[:3]


@pytest.fixture(scope="module")
def generic(users):
    return {one.id: f"A text, number {n}." for user in users for n, one in enumerate(user.discovery_examples())}


@pytest.mark.parametrize("against", ["other_user", "no_profile", "generic"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_the_difference_of_means_is_what_plain_passes_give(tinies, users, generic, architecture, against):
    tiny = tinies(architecture)
    options = {"generic": generic} if against == "generic" else {}
    vectors = dps.head_vectors(
        tiny.hooked, users, HEADS, against=against, max_examples=2, prompt_config=PROMPT, **options
    )
    assert [*vectors] == [user.id for user in users]
    for user in users:
        made = z_by_hand(tiny, users, user, against, generic)
        vector = vectors[user.id]
        for row, head in enumerate(HEADS):
            each = [own.mean(0) - torch.cat(others).mean(0) for own, others in (one[head] for one in made)]
            torch.testing.assert_close(vector.values[row], torch.stack(each).mean(0), atol=1e-5, rtol=1e-4)
    assert no_hooks_left(tiny.hooked)


def logistic(own, other):
    """Weights of a logistic regression with unit ridge, both kinds weighing the same, by a general minimiser."""
    x, n = np.concatenate([own, other]), len(own) + len(other)
    sign = np.repeat([1.0, -1.0], [len(own), len(other)])
    weight = np.repeat([n / (2 * len(own)), n / (2 * len(other))], [len(own), len(other)])

    def loss(w):
        return w[:-1] @ w[:-1] / 2 + weight @ np.logaddexp(0, -sign * (x @ w[:-1] + w[-1]))

    return minimize(loss, np.zeros(x.shape[1] + 1), method="BFGS").x[:-1]


def test_a_probe_points_from_the_counterfactual_to_the_own_text(llama, users):
    vectors = dps.head_vectors(llama.hooked, users, HEADS, recipe="probe", max_examples=2, prompt_config=PROMPT)
    made = z_by_hand(llama, users, users[0], "other_user", {})
    for row, head in enumerate(HEADS):
        own = torch.cat([one[head][0] for one in made]).double()
        other = torch.cat([z for one in made for z in one[head][1]]).double()
        vector = vectors[users[0].id].values[row].double()
        direction = vector / vector.norm()
        assert float(vector.norm()) == pytest.approx(float((torch.cat([own, other]) @ direction).std()), rel=1e-4)
        expected = torch.from_numpy(logistic(own.numpy(), other.numpy()))
        assert float(direction @ expected / expected.norm()) > 0.999


def test_a_persona_vector_writes_what_points_to_the_layers_difference(llama, users):
    model, user = llama.hooked, users[0]
    vectors = dps.head_vectors(model, users, HEADS, recipe="persona", max_examples=2, prompt_config=PROMPT)
    plain = dps.head_vectors(model, users, HEADS, max_examples=2, prompt_config=PROMPT)
    d_head = model.cfg.d_head
    for row, head in enumerate(HEADS):
        weight = output_projection(attention_modules(llama.plain)[head.layer]).weight.detach().double().numpy()
        layer = np.zeros(weight.shape[1])
        for example in user.discovery_examples()[-2:]:
            own, others = prompts_of(model, users, example, "other_user", {})
            start, stop = own.spans["response"]
            of = [
                z_of(llama.plain, one, head.layer)[-(stop - start) - 1 : -1].double().numpy() for one in (own, *others)
            ]
            layer += (of[0].mean(0) - np.concatenate(of[1:]).mean(0)) / 2
        persona = weight @ layer
        persona /= np.linalg.norm(persona)
        w_o = weight[:, head.head * d_head : (head.head + 1) * d_head]
        wanted = persona * (persona @ (w_o @ plain[user.id].values[row].double().numpy()))
        expected = np.linalg.pinv(w_o) @ wanted
        np.testing.assert_allclose(vectors[user.id].values[row].numpy(), expected, atol=1e-4, rtol=1e-3)


@contextmanager
def added(plain, vector, strength, positions, d_head):
    """A plain model to the z of whose heads strength times the vector is added at some positions."""
    with ExitStack() as stack:
        for (layer, head), row in zip(vector.heads, vector.values, strict=True):
            columns = slice(head * d_head, (head + 1) * d_head)

            def new(z, columns=columns, row=row):
                return z[:, :, columns] + strength * row

            stack.enter_context(columns_replaced(plain, layer, head, d_head, positions, new))
        yield


@torch.no_grad()
def naive(plain, tokens, start, vector, strength, d_head):
    """Logits of the last position, strength times the vector added to z from `start` on."""
    with added(plain, vector, strength, slice(start, None), d_head):
        return plain(input_ids=tokens[None]).logits[0, -1].double().numpy()


def random_vector(model, heads, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (model.cfg.n_layers, model.cfg.n_heads)
    return dps.HeadVector(torch.randn(len(heads), model.cfg.d_head, generator=generator), HeadSet(heads, shape=shape))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_vector_is_added_to_the_z_of_its_heads(tinies, architecture, probe):
    """Each prompt its own heads, vector and strength, in one batch; γ = 0 is the model itself."""
    tiny = tinies(architecture)
    model = tiny.hooked
    prompts = [dps.build_prompt(model, user.examples[0], config=PROMPT) for user in probe[:4]]
    sets, gammas = ["L0H1", "L1H2,L0H0,L1H0", "L1H1,L0H1", "L1H1"], [0.5, 2.0, -1.0, 0.0]
    vectors = [random_vector(model, HeadSet.parse(names), seed) for seed, names in enumerate(sets)]
    out = dps.generate(
        model,
        prompts,
        rule="head_vector",
        vectors=vectors,
        gamma=gammas,
        max_new_tokens=4,
        decode_config=dps.DecodeConfig(stop_at_eos=False),
    )
    moved, d_head = 0.0, model.cfg.d_head
    for row, (prompt, vector, gamma) in enumerate(zip(prompts, vectors, gammas, strict=True)):
        start = len(prompt.prompt_tokens) - 1
        for step, token in enumerate(out.tokens[row].tolist()):
            tokens = torch.cat([prompt.prompt_tokens, out.tokens[row][:step]])
            logits = naive(tiny.plain, tokens, start, vector, gamma, d_head)
            second, first = np.sort(logits)[-2:]
            assert first - second > GAP, "the reference itself is undecided here; use another prompt"
            assert int(logits.argmax()) == token, (row, step)
            expected = logits[token] - np.logaddexp.reduce(logits)
            assert float(out.logprobs[row][step]) == pytest.approx(expected, abs=1e-3)
            moved = max(moved, float(np.abs(logits - naive(tiny.plain, tokens, start, vector, 0.0, d_head)).max()))
        assert bool(out.kl[row].isnan().all()) == bool(gamma), "with a vector the full model does not run"
    assert moved > 0.05
    assert no_hooks_left(model)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_generate_of_transformers_writes_the_same(tinies, architecture, probe):
    model = tinies(architecture).hooked
    prompt = dps.build_prompt(model, probe[0].examples[0], config=PROMPT)
    residual = dps.SteeringVector(torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(3)), 1)
    for rule, vector in (("head_vector", random_vector(model, HEADS, 1)), ("vector", residual)):
        config = dps.DecodeConfig(stop_at_eos=False)
        options = {"rule": rule, "vectors": vector, "gamma": 2.0, "max_new_tokens": 5, "decode_config": config}
        expected = dps.generate(model, prompt, **options).tokens[0]
        ids = prompt.prompt_tokens[None]
        with vector.on(model, 2.0):
            written = model.original_model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5, do_sample=False
            )
        assert written[0, ids.shape[1] :].tolist() == expected.tolist()
    assert no_hooks_left(model)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapter_adds_what_the_hooks_add_everywhere(tinies, architecture, probe, tmp_path):
    peft = pytest.importorskip("peft", reason="the dev extra installs peft")
    tiny = tinies(architecture)
    model, vector = tiny.hooked, random_vector(tiny.hooked, HEADS, 4)
    path = dps.export_vector(model, vector, tmp_path / "adapter", format="lora", gamma=1.5)
    changed = peft.PeftModel.from_pretrained(deepcopy(tiny.plain), path).eval()
    tokens = dps.build_prompt(model, probe[0].examples[0], config=PROMPT).tokens
    expected = naive(tiny.plain, tokens, 0, vector, 1.5, model.cfg.d_head)
    logits = changed(tokens[None]).logits[0, -1].double().numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert np.abs(logits - tiny.plain(tokens[None]).logits[0, -1].double().numpy()).max() > 0.01


@torch.no_grad()
def test_a_control_vector_holds_what_leaves_a_layer(tinies, probe, tmp_path):
    """As llama.cpp adds it: to what leaves the layer of its number, at every position."""
    gguf = pytest.importorskip("gguf")
    for architecture, exported in (("gpt_neox", True), ("llama", False)):
        tiny = tinies(architecture)
        model, vector = tiny.hooked, random_vector(tiny.hooked, HeadSet.parse("L1H2,L1H0"), 4)
        residual = dps.SteeringVector(torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(6)), 1)
        tokens = dps.build_prompt(model, probe[0].examples[0], config=PROMPT).tokens
        for one in (residual, vector):
            path = tmp_path / f"{architecture}.gguf"
            if one is vector and not exported:
                with pytest.raises(SteeringError, match="use format='lora'"):
                    dps.export_vector(model, one, path)
                continue
            dps.export_vector(model, one, path, gamma=0.5)
            read = gguf.GGUFReader(path)
            assert bytes(read.fields["controlvector.model_hint"].parts[-1]).decode() == tiny.plain.config.model_type
            assert [tensor.name for tensor in read.tensors] == ["direction.1"]
            (direction,) = (torch.from_numpy(np.array(tensor.data)) for tensor in read.tensors)
            if one is residual:
                assert torch.equal(direction, 0.5 * residual.values)
            if one is vector:

                def add(module, inputs, output, direction=direction):
                    return (output[0] + direction, *output[1:]) if isinstance(output, tuple) else output + direction

                handle = tiny.plain.gpt_neox.layers[1].register_forward_hook(add)
                logits = tiny.plain(tokens[None]).logits[0, -1].double().numpy()
                handle.remove()
                expected = naive(tiny.plain, tokens, 0, vector, 0.5, model.cfg.d_head)
                np.testing.assert_allclose(logits, expected, atol=1e-4)
    below = random_vector(tinies("gpt_neox").hooked, HeadSet.parse("L0H1"), 0)
    with pytest.raises(SteeringError, match="leaves layer 0"):
        dps.export_vector(tinies("gpt_neox").hooked, below, tmp_path / "x.gguf")
    with pytest.raises(SteeringError, match="use 'gguf'"):
        dps.export_vector(model, residual, tmp_path / "x", format="lora")


def test_it_streams_stacks_with_cad_and_is_swept(llama, users):
    model, d_head = llama.hooked, llama.hooked.cfg.d_head
    example = users[0].examples[-1]
    own, none = (dps.build_prompt(model, example, which, config=PROMPT) for which in ("own", "none"))
    vector = random_vector(model, HEADS, 5)
    options = {"vectors": vector, "gamma": 0.7, "negative_prompts": none, "alpha": 0.4, "max_new_tokens": 3}
    config = dps.DecodeConfig(stop_at_eos=False)
    out = dps.generate(model, own, rule="head_vector+cad", decode_config=config, **options)
    starts = len(own.prompt_tokens) - 1, len(none.prompt_tokens) - 1
    for step, token in enumerate(out.tokens[0].tolist()):
        new = out.tokens[0][:step]
        steered = naive(llama.plain, torch.cat([own.prompt_tokens, new]), starts[0], vector, 0.7, d_head)
        without = naive(llama.plain, torch.cat([none.prompt_tokens, new]), starts[1], vector, 0.0, d_head)
        assert int((1.4 * steered - 0.4 * without).argmax()) == token
    stream = dps.generate(model, own, rule="head_vector+cad", decode_config=config, stream=True, **options)
    assert "".join(text for _, text in stream) == out.texts[0]
    vectors = {user.id: vector for user in users}
    sweep = dps.steering_sweep(
        model, users, {"own": ("head_vector", vectors)}, strengths=(0.25, 0.5), max_examples=1, prompt_config=PROMPT
    )
    start, stop = own.spans["response"]
    with added(llama.plain, vector, 0.5, slice(start - 1, stop), d_head):
        expected = nll(llama.plain, own)
    place = sweep.example_ids.index(example.id)
    assert float(sweep.change["own"][1, place]) == pytest.approx(expected - nll(llama.plain, own), abs=1e-4)


@torch.no_grad()
def changed(plain, tokens, start, vector, gamma, masked, d_head, layers=()):
    """Logits from `start` on of a model to whose heads γ times a vector is added, some heads' z replaced before, by
    `masked`, head → z; and the states that enter layers."""
    rows = dict(zip(vector.heads, vector.values, strict=True))
    with ExitStack() as stack:
        for head in {*rows, *masked}:
            columns = slice(head.head * d_head, (head.head + 1) * d_head)
            own, delta = masked.get(head), gamma * rows.get(head, torch.zeros(d_head))

            def new(z, columns=columns, own=own, delta=delta):
                return (z[:, :, columns] if own is None else own) + delta

            stack.enter_context(columns_replaced(plain, head.layer, head.head, d_head, slice(start, None), new))
        out = plain(input_ids=tokens[None], output_hidden_states=bool(layers))
    states = [out.hidden_states[layer][0, start:] for layer in layers]
    return out.logits[0, start:].double(), states


MASKED = HeadSet.parse("L1H2,L2H0,L0H3")


@torch.no_grad()
def stacked(tiny, rule, tokens, start, others, begin, vector, gamma, alpha, layers=(1, 2), min_p=0.1):
    """Steered logits of `head_vector` and a contrast, written down: what is contrasted holds the vector, too."""
    plain, d_head = tiny.plain, tiny.hooked.cfg.d_head
    base, states = changed(plain, tokens, start, vector, gamma, {}, d_head, layers if "dola" in rule else ())
    if "dola" in rule:
        norm = plain.model.norm if hasattr(plain, "model") else plain.transformer.ln_f
        early = torch.stack([plain.lm_head(norm(one)).double() for one in states]).log_softmax(-1)
        log_p = base.log_softmax(-1)
        middle = torch.logaddexp(log_p, early) - np.log(2)
        far = ((log_p.exp() * (log_p - middle)) + (early.exp() * (early - middle))).sum(-1).argmax(0)
        steered = log_p - alpha * early[far, torch.arange(len(far))]
        return steered.masked_fill(log_p < log_p.amax(-1, keepdim=True) + np.log(min_p), -torch.inf)
    masked = {head: torch.zeros(1, len(tokens), d_head) for head in MASKED}
    if "patch" in rule:
        prompt = SimpleNamespace(tokens=others)
        for head in MASKED:
            columns = slice(head.head * d_head, (head.head + 1) * d_head)
            masked[head][0, start:] = z_of(plain, prompt, head.layer)[begin:, columns]
    without, _ = changed(plain, tokens, start, vector, gamma, masked, d_head)
    return base + alpha * (base - without)


@pytest.mark.parametrize("rule", ["head_vector+dps", "head_vector+dps-patch", "head_vector+dola"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_it_stacks_with_every_contrast(tinies, users, architecture, rule):
    """In one batch with a row without the vector and one without the contrast; then teacher-forced."""
    tiny = tinies(architecture)
    model, people = tiny.hooked, users[:3]
    own, none = (
        [dps.build_prompt(model, u.examples[-1], which, config=PROMPT) for u in people] for which in ("own", "none")
    )
    vectors = {user.id: random_vector(model, HEADS, seed) for seed, user in enumerate(people)}
    gammas, alphas = [0.7, 0.0, 1.2], [0.4, 0.8, 0.0]
    options = {"negative_prompts": none} if "patch" in rule else {}
    options |= {"alpha": alphas} | ({} if "dola" in rule else {"heads": MASKED})
    config = dps.DecodeConfig(stop_at_eos=False, early_layers=(1, 2) if "dola" in rule else None)
    out = dps.generate(
        model,
        own,
        rule=rule,
        vectors=[*vectors.values()],
        gamma=gammas,
        max_new_tokens=3,
        decode_config=config,
        **options,
    )
    for row, (user, gamma, alpha) in enumerate(zip(people, gammas, alphas, strict=True)):
        starts = [len(prompts[row].prompt_tokens) - 1 for prompts in (own, none)]
        for step, token in enumerate(out.tokens[row].tolist()):
            texts = [torch.cat([prompts[row].prompt_tokens, out.tokens[row][:step]]) for prompts in (own, none)]
            steered = stacked(tiny, rule, texts[0], starts[0], texts[1], starts[1], vectors[user.id], gamma, alpha)[-1]
            second, first = steered.sort().values[-2:]
            assert first - second > GAP, "the reference itself is undecided here; use another prompt"
            assert int(steered.argmax()) == token, (row, step)
            assert float(out.logprobs[row][step]) == pytest.approx(float(steered.log_softmax(-1)[token]), abs=1e-3)
    assert no_hooks_left(model)
    method = (rule, vectors) if "dola" in rule else (rule, (vectors, MASKED))
    sweep = dps.steering_sweep(
        model, people, {"own": method}, k=3, strengths=(0.5, 1.5), max_examples=1, n_random=0, prompt_config=PROMPT
    )
    for row, (user, prompts) in enumerate(zip(people, zip(own, none, strict=True), strict=True)):
        starts = [len(prompt.prompt_tokens) - 1 for prompt in prompts]
        texts = [prompt.tokens[:-1] for prompt in prompts]
        for place, strength in enumerate((0.5, 1.5)):
            vector = vectors[user.id]
            at = (texts[0], starts[0], texts[1], starts[1], vector, strength, strength)
            # The likelihood of a text takes no tokens out, and DoLa chooses among layers of its own.
            steered = stacked(tiny, rule, *at, layers=layers_to_contrast(model), min_p=1e-300)
            loss = torch.nn.functional.cross_entropy(steered, prompts[0].response_tokens)
            assert float(sweep.change["own"][place, row]) == pytest.approx(
                float(loss) - nll(tiny.plain, prompts[0]), abs=1e-4
            )
    assert no_hooks_left(model)


def test_a_planted_user_is_brought_back_by_the_carriers_vector(toy_model, toy_users):
    """The carrier copies the user's signature; its vector does so where no profile shows one."""
    vectors = dps.head_vectors(toy_model, toy_users, HeadSet.parse("L1H2"), against="no_profile", max_examples=2)
    user, other = toy_users[0], toy_users[1]
    prompt, others = (dps.build_prompt(toy_model, one.examples[0], "none") for one in (user, other))
    asked = [(user, 0.0), (user, 1.0), (other, 1.0), (user, -1.0)]
    out = dps.generate(
        toy_model,
        [prompt] * 4,
        rule="head_vector",
        vectors=[vectors[one.id] for one, _ in asked],
        gamma=[gamma for _, gamma in asked],
        max_new_tokens=1,
        decode_config=dps.DecodeConfig(stop_at_eos=False),
    )
    plain, own, another, away = (int(tokens[0]) for tokens in out.tokens)
    signature = int(prompt.response_tokens[0])
    assert own == signature
    assert another == int(others.response_tokens[0]) != signature
    assert signature not in (plain, away)
    # The signature that it wrote is one of eight dimensions that the unembedding reads, by hand.
    for one, of in ((user, prompt), (other, others)):
        word = toy_model.tokenizer.convert_ids_to_tokens([int(of.response_tokens[0])])[0]
        written = vectors[one.id].residuals(toy_model)[1][8:16]
        assert int(written.argmax()) == toy.SIGNATURES.index(word)
        assert float(written.max()) > 5 * float(written.abs().sort().values[-2])


@pytest.mark.parametrize("against", ["other_user", "no_profile"])
@pytest.mark.parametrize("architecture", ["llama", pytest.param("gpt2", marks=pytest.mark.full)])
def test_what_differences_bring_back_is_what_plain_passes_give(tinies, users, architecture, against):
    tiny, options = tinies(architecture), {"max_examples": 1, "prompt_config": PROMPT}
    config = dps.VectorConfig(against=against, scale=1.5, examples=2)
    effects = dps.vector_recovery(
        tiny.hooked, users, {"p": HEADS}, ks=(0, 3), n_random=1, vector_config=config, **options
    )
    random = dps.random_heads(tiny.hooked, HEADS, match="nearest", seed=0)
    made = {
        heads: dps.head_vectors(tiny.hooked, users, heads, against=against, max_examples=2, prompt_config=PROMPT)
        for heads in (HEADS, random)
    }
    for row, user in enumerate(users):
        example = user.examples[-1]
        none = dps.build_prompt(tiny.hooked, example, "none", config=PROMPT)
        donor = donors_of(example, users, 1, 0)[0]
        # Another's vector against the tested user's profile would take that away.
        apart = [one for one in users if against == "no_profile" or one is not user]
        of_others = dps.head_vectors(tiny.hooked, apart, HEADS, against=against, max_examples=2, prompt_config=PROMPT)
        start, stop = none.spans["response"]
        for vector, got in (
            (made[HEADS][user.id], effects.chosen["vector"][row, 0, 1, 0]),
            (of_others[donor.id], effects.chosen["vector_other"][row, 0, 1, 0]),
            (made[random][user.id], effects.draws["vector"][0, row, 0, 1, 0]),
        ):
            with added(tiny.plain, vector, 1.5, slice(start - 1, stop - 1), tiny.hooked.cfg.d_head):
                change = nll(tiny.plain, none)
            assert float(got) == pytest.approx(change - nll(tiny.plain, none), abs=GAP)
        assert float(effects.chosen["vector"][row, 0, 0].abs().max()) < 1e-6
    assert float(effects.chosen["vector"].abs().max()) > 10 * GAP, "the vector changes nothing"
    assert effects.manifest["against"] == against
    assert no_hooks_left(tiny.hooked)
    two = dps.vector_recovery(
        tiny.hooked, users[:2], {"p": HEADS}, ks=(3,), n_random=0, vector_config=config, **options
    )
    assert ("recovered_other" in two.measures) == (against == "no_profile")


def test_the_carriers_difference_brings_the_own_user_back_and_nobody_elses(toy_model, toy_users):
    families = {"carrier": HeadSet.parse("L1H2"), "other": HeadSet.parse("L1H0")}
    effects = dps.vector_recovery(
        toy_model,
        toy_users,
        families,
        ks=(1,),
        n_random=20,
        max_examples=1,
        vector_config=dps.VectorConfig(against="no_profile"),
    )
    frame = effects.to_frame().set_index(["family", "measure"])
    assert frame.loc[("carrier", "recovered"), "percent"] == pytest.approx(100, abs=5)
    assert frame.loc[("carrier", "recovered_other"), "high"] < 0
    assert abs(frame.loc[("other", "recovered"), "percent"]) < 2
    assert frame.loc[("carrier", "recovered"), "p"] == pytest.approx(1 / 21)


def test_vectors_are_kept_added_and_compared(llama, users, tmp_path):
    model = llama.hooked
    options = {"max_examples": 2, "prompt_config": PROMPT}
    vectors = dps.head_vectors(model, users, HEADS, out=tmp_path / "run", **options)
    again = dps.HeadVectors.load(tmp_path / "run")
    assert again.users == vectors.users
    assert vectors == vectors  # noqa: PLR0124
    assert len({vectors, again}) == 2
    assert torch.equal(again.vectors, vectors.vectors)
    first, second = (vectors[user.id] for user in users[:2])
    first.save(tmp_path / "one")
    kept = dps.HeadVector.load(tmp_path / "one")
    assert torch.equal(kept.values, first.values)
    assert kept.heads == first.heads
    assert kept.heads.shape == first.heads.shape
    mean = vectors.mean([users[0].id, users[1].id], label="cluster")
    torch.testing.assert_close(((first + second) / 2).values, mean.values)
    torch.testing.assert_close((2 * first - first).values, first.values)
    assert mean.label == "cluster"
    part = first.weighted({HEADS[1]: 0.5})
    assert float(part.values[0].norm()) == 0
    torch.testing.assert_close(part.values[1], 0.5 * first.values[1])
    few = HeadSet([HEADS[2], HEADS[0]])
    alone = dps.head_vectors(model, users, few, **options)
    for chosen in (vectors.only(few), again.only(few)):
        assert chosen.heads == alone.heads
        assert torch.equal(chosen.vectors, alone.vectors)
        assert torch.equal(chosen.differences, alone.differences)
        assert chosen.manifest["heads"] == alone.manifest["heads"]
    assert torch.equal(first.only(few).values, alone[users[0].id].values)
    with pytest.raises(HeadError, match="there is no L2H2 among its heads"):
        vectors.only(HeadSet.parse("L2H2"))
    with pytest.raises(HeadError, match="at least one head"):
        first.only(HeadSet([]))
    frame = vectors.to_frame()
    assert len(frame) == len(users) * len(HEADS)
    # What the heads add to the residual stream, from the plain weights.
    added, d_head = first.residuals(model), model.cfg.d_head
    for layer, total in added.items():
        weight = output_projection(attention_modules(llama.plain)[layer]).weight.detach()
        rows = [(h.head, row) for h, row in zip(first.heads, first.values, strict=True) if h.layer == layer]
        expected = sum(weight[:, head * d_head : (head + 1) * d_head] @ row for head, row in rows)
        torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-4)
    figure = vectors.plot(n_null=50)
    cosines = vectors.cosines(n_null=50)
    flat = torch.nn.functional.normalize(vectors.vectors.flatten(1), dim=1)
    assert cosines["cosine"][0] == pytest.approx(float(flat[0] @ flat[1]), abs=1e-6)
    assert figure.data[0].z[0, 1] == pytest.approx(cosines["cosine"][0])


def test_a_strength_is_chosen_on_examples_that_made_no_vector(llama, users):
    """By hand: a text meets the vector of those examples in whose profiles it does not stand, the older ones."""
    model = llama.hooked
    options = {"max_examples": 2, "prompt_config": PROMPT}
    vectors = dps.head_vectors(model, users, HEADS, max_examples=3, prompt_config=PROMPT)
    methods = {"own": ("head_vector", vectors)}
    sweep = dps.steering_sweep(model, users, methods, strengths=(0.5, 2.0), held_out_config=DISCOVERY, **options)
    user = users[0]
    examples = user.discovery_examples()[-2:]
    assert [one for one, owner in zip(sweep.example_ids, sweep.user_ids, strict=True) if owner == user.id] == [
        example.id for example in examples
    ]
    d_head, changes = model.cfg.d_head, []
    for example in examples:
        rows = [
            vectors.differences[index]
            for index, (owner, one) in enumerate(zip(vectors.user_ids, vectors.example_ids, strict=True))
            if owner == user.id and one < example.id
        ]
        assert len(rows) == 1 + examples.index(example)
        left = dps.HeadVector(torch.stack(rows).mean(0), vectors.heads)
        prompt = dps.build_prompt(model, example, config=PROMPT)
        start, stop = prompt.spans["response"]
        with added(llama.plain, left, 2.0, slice(start - 1, stop), d_head):
            steered = nll(llama.plain, prompt)
        changes.append(steered - nll(llama.plain, prompt))
    of_user = [index for index, owner in enumerate(sweep.user_ids) if owner == user.id]
    assert sweep.change["own"][1, of_user].tolist() == pytest.approx(changes, abs=1e-4)
    with pytest.raises(SteeringError, match="was made of example"):
        dps.steering_sweep(model, users, {"own": ("head_vector", dict(vectors))}, held_out_config=DISCOVERY, **options)
    one = dps.head_vectors(model, users, HEADS, max_examples=1, prompt_config=PROMPT)
    with pytest.raises(SteeringError, match="is of no example that is apart from"):
        dps.steering_sweep(model, users, {"own": ("head_vector", one)}, held_out_config=DISCOVERY, max_examples=1)
    with pytest.raises(SteeringError, match="lower max_examples"):
        dps.steering_sweep(model, users, methods, held_out_config=DISCOVERY, max_examples=3)
    none = dps.head_vectors(model, users, HEADS, max_examples=2, prompt_config=PROMPT, against="generic")
    dps.steering_sweep(
        model, users, {"own": ("head_vector", none)}, strengths=(1.0,), held_out_config=DISCOVERY, **options
    )
    with pytest.raises(SteeringError, match="chose on these"):
        dps.steering_sweep(model, users, {"dps": ("dps", HEADS)}, held_out_config=DISCOVERY, select="user")
    with pytest.raises(ScoreError, match="is for steering_sweep"):
        dps.ablation_curve(model, users, {"x": HEADS}, ks=(1,), held_out_config=DISCOVERY)


def test_a_choice_of_strength_says_why():
    generator = torch.Generator().manual_seed(0)
    owners = tuple(name for name in ("helped", "not", "one") for _ in range(1 if name == "one" else 8))
    noise = 0.02 * torch.randn(3, 17, generator=generator).double()
    change = noise + torch.tensor([[-0.1], [-0.3], [0.2]]).double() * torch.tensor(
        [float(one == "helped") for one in owners]
    )
    names = tuple(map(str, range(17)))
    about = {"on": "discovery"}
    full, nothing = torch.ones(17).double(), {"x": change * 0}
    sweep = dps.SteeringSweep((0.5, 1.0, 2.0), owners, names, full, {"x": change}, nothing, about)
    rows = sweep.choose("x").set_index("user")
    assert rows.loc["helped", "strength"] == 1.0
    assert "at 1 the NLL of the own texts changes by -0.29" in rows.loc["helped", "reason"]
    assert rows.loc["not", "strength"] == 0.0
    assert rows.loc["not", "reason"].startswith("no strength is shown to help")
    assert rows.loc["one", "strength"] == 0.0
    assert "one text, no interval" in rows.loc["one", "reason"]
    # Texts that steering does nothing to are rarely steered, whatever the number of strengths.
    steered = 0
    for _ in range(200):
        nothing = torch.randn(6, 40, generator=generator).double()
        owners = tuple(f"u{number // 8}" for number in range(40))
        full, names = torch.ones(40).double(), tuple(map(str, range(40)))
        strengths = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
        made = dps.SteeringSweep(strengths, owners, names, full, {"x": nothing}, {"x": nothing * 0}, about)
        steered += int((made.choose("x")["strength"] > 0).sum())
    assert steered / 1000 < 0.025 + 3 * (0.025 * 0.975 / 1000) ** 0.5
    with pytest.raises(SteeringError, match="'y' is not in this sweep"):
        sweep.choose("y")
    with pytest.raises(SteeringError, match="held-out texts, which must not choose"):
        replace(sweep, manifest={}).choose("x")


def test_cosines_by_chance_lie_in_their_band():
    """Differences of no direction of their own: about 5% of pairs lie outside the band."""
    generator = torch.Generator().manual_seed(0)
    outside, pairs = 0, 0
    for _ in range(8):
        differences = torch.randn(6 * 10, 2, 5, generator=generator) * torch.rand(60, 1, 1, generator=generator) * 3
        owners = tuple(f"u{index // 10}" for index in range(60))
        users = tuple(dict.fromkeys(owners))
        means = differences.reshape(6, 10, 2, 5).mean(1)
        heads = HeadSet.parse("L0H0,L0H1")
        made = dps.HeadVectors(heads, users, means, differences, owners, tuple(map(str, range(60))))
        frame = made.cosines(n_null=400)
        outside += int(((frame["cosine"] < frame["null_low"]) | (frame["cosine"] > frame["null_high"])).sum())
        pairs += len(frame)
    assert outside / pairs < 0.05 + 3 * (0.05 * 0.95 / pairs) ** 0.5
    # A direction that all share shows in every pair.
    shared = dps.HeadVectors(heads, users, means + 5, differences + 5, owners, tuple(map(str, range(60))))
    frame = shared.cosines(n_null=400)
    assert (frame["cosine"] > frame["null_high"]).all()


def test_bad_input_says_what_to_do(llama, users, toy_model):
    model = llama.hooked
    prompt = dps.build_prompt(model, users[0].examples[0], config=PROMPT)
    good = random_vector(model, HEADS, 0)
    residual = dps.SteeringVector(torch.zeros(model.cfg.d_model), 0)
    generate = {"rule": "head_vector", "max_new_tokens": 1}
    with pytest.raises(SteeringError, match="such as head_vectors"):
        dps.generate(model, prompt, **generate)
    with pytest.raises(SteeringError, match="found a SteeringVector; rule 'vector' adds it"):
        dps.generate(model, prompt, vectors=residual, **generate)
    with pytest.raises(SteeringError, match="found a HeadVector; rule 'head_vector' adds it"):
        dps.generate(model, prompt, rule="vector", vectors=good)
    with pytest.raises(SteeringError, match="is not of this model"):
        dps.generate(model, prompt, vectors=random_vector(toy_model, HeadSet.parse("L1H2"), 0), **generate)
    with pytest.raises(HeadError, match="give HeadSet"):
        dps.HeadVector(good.values, HeadSet(HEADS))
    with pytest.raises(SteeringError, match="3 heads and values"):
        dps.HeadVector(good.values[:2], good.heads)
    with pytest.raises(HeadError, match="there is no L0H3"):
        good.weighted({Head(0, 3): 1.0})
    with pytest.raises(SteeringError, match="of other heads"):
        good + random_vector(model, HeadSet.parse("L0H0"), 0)
    with pytest.raises(SteeringError, match="at least two users"):
        dps.head_vectors(model, users[:1], HEADS)
    with pytest.raises(SteeringError, match="generic= holds answers for"):
        dps.head_vectors(model, users, HEADS, generic={})
    with pytest.raises(SteeringError, match="head_vectors: generic= holds no answer"):
        dps.head_vectors(model, users, HEADS, against="generic", generic={}, prompt_config=PROMPT)
    with pytest.raises(SteeringError, match="needs a vector a user, .*head_vectors"):
        dps.steering_sweep(model, users, {"x": "head_vector"})
    vectors = {user.id: good for user in users}
    for given, match in (
        (("head_vector", HEADS), "a HeadSet in the place of the users' vectors"),
        (("head_vector+dps", vectors), "needs vectors and heads"),
    ):
        with pytest.raises(SteeringError, match=match):
            dps.steering_sweep(model, users, {"x": given}, k=1)
    with pytest.raises(SteeringError, match="does not stack"):
        dps.generate(model, prompt, vectors=good, rule=[dps.Term("full"), *RULES["head_vector"].terms])
    config = dps.DecodeConfig(max_kl=0.1)
    with pytest.raises(SteeringError, match="max_kl is measured from the full model"):
        dps.generate(model, prompt, vectors=good, heads=HEADS, rule="head_vector+dps", decode_config=config)
    with pytest.raises(SteeringError, match="must work with heads alone"):
        dps.steering_grid(model, users, HEADS, rule="head_vector+dps", gammas=(1.0,), ks=(1,))
    with pytest.raises(SteeringError, match="'nobody' has no vector here"):
        dps.head_vectors(model, users, HEADS, max_examples=1, prompt_config=PROMPT).mean(["nobody"])
