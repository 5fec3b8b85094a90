"""A `HookedTransformer` of transformer-lens 3.9 goes into every function; run by `make test-tl3`."""

import pytest
import torch
from direct import SENDERS, Case, add_write, blocks_of, written_by_hand
from oracles import ablated_nll, attention_modules, nll, output_projection, uniform_z, z_of
from pcs import score_pcs

import dps_lens as dps
from dps_lens.data import build_prompt
from dps_lens.heads import Head, HeadSet
from dps_lens.model.runners import runner_of
from dps_lens.steering.continuous import ContinuousBatch, Writing
from dps_lens.steering.plan import plan_of

ARCHITECTURES = ["llama", "gpt_neox", "qwen2"]


@pytest.fixture(params=ARCHITECTURES)
def old(request, tinies):
    tiny = tinies(request.param)
    assert type(tiny.hooked).__name__ == "HookedTransformer"
    return tiny


def test_check_model(old):
    assert max(dps.check_model(old.hooked, reference=old.plain).values()) < 1e-3


@pytest.mark.parametrize("positions", ["response", "all", "profile"])
@pytest.mark.parametrize("ablation", ["zero", "uniform"])
def test_scores(old, probe, short, ablation, positions):
    model, cfg = old.hooked, old.hooked.cfg
    scores = score_pcs(model, probe[:2], ablation=ablation, positions=positions, max_examples=1, prompt_config=short)
    for row, user in enumerate(probe[:2]):
        prompt = build_prompt(model, user.discovery_examples()[-1], config=short)
        for layer, head in [(0, 0), (1, 3), (2, 1)]:
            new, handle = 0.0, None
            if ablation == "uniform":
                new, handle = uniform_z(old.plain, layer, head, cfg.d_head, cfg.n_heads)
            expected = ablated_nll(old.plain, prompt, layer, head, cfg.d_head, positions, new) - nll(old.plain, prompt)
            if handle:
                handle.remove()
            assert float(scores.components["own"][row, layer, head]) == pytest.approx(expected, abs=1e-4)


def test_mean_patch_and_run_folder(old, probe, short, tmp_path):
    options = {"max_examples": 1, "prompt_config": short}
    mean = score_pcs(old.hooked, probe[:2], ablation="mean", out=tmp_path, **options)
    assert torch.equal(dps.HeadScores.load(tmp_path).values, mean.values)
    patch = score_pcs(old.hooked, probe[:2], ablation="patch", **options)
    assert float(patch.values.abs().max()) > 1e-3


def test_generation(old, probe):
    prompts = [
        build_prompt(old.hooked, user.examples[0], config=dps.PromptConfig(items=n, profile_tokens=p, task_tokens=20))
        for user, n, p in ((probe[0], 3, 60), (probe[5], 2, 30))
    ]
    sets = [HeadSet.parse("L0H1,L2H3"), HeadSet.parse("L1H0")]
    for positions in ("response", "all", "profile"):
        batch = dps.generate(old.hooked, prompts, heads=sets, gamma=[1.0, 0.0], positions=positions, max_new_tokens=6)
        alone = dps.generate(old.hooked, prompts[0], heads=sets[0], gamma=1.0, positions=positions, max_new_tokens=6)
        assert batch.tokens[0].tolist() == alone.tokens[0].tolist()
    with torch.no_grad():
        greedy = old.plain.generate(prompts[1].prompt_tokens[None], max_new_tokens=6, do_sample=False, eos_token_id=3)
    assert batch.tokens[1].tolist() == greedy[0, len(prompts[1].prompt_tokens) :].tolist()


def test_requests_that_join_a_batch(old, probe, short):
    """Caches whose rows come and go are of another kind here."""
    model = old.hooked
    prompts = [build_prompt(model, user.examples[0], config=short, response=False) for user in probe[:3]]
    asked = [
        {"prompts": prompt, "heads": HeadSet.parse("L0H1,L2H3"), "max_new_tokens": 4 + 3 * index}
        for index, prompt in enumerate(prompts)
    ]
    batch, writings = ContinuousBatch(model, chunk=40), [Writing(plan_of(model, **one)) for one in asked]
    for one in reversed(writings):
        batch.add(one)
        for _ in range(2):
            batch.step()
    while len(batch):
        batch.step()
    for writing, one in zip(writings, asked, strict=True):
        written = [int(token) for token in writing.steps.columns["tokens"][0]]
        assert written == dps.generate(model, **one).tokens[0].tolist()


def test_steering_vectors_and_the_benchmark_table(old, probe, short):
    """What is added is what the plain model's own layer is given; the table runs from end to end."""
    model, layer = old.hooked, 1
    prompt = build_prompt(model, probe[0].examples[0], config=short)
    vector = dps.SteeringVector(torch.linspace(-1, 1, model.cfg.d_model), layer)
    out = dps.generate(
        model,
        prompt,
        rule="vector",
        vectors=vector,
        gamma=0.5,
        max_new_tokens=3,
        decode_config=dps.DecodeConfig(stop_at_eos=False),
    )
    start = len(prompt.prompt_tokens) - 1

    def add(module, inputs, output):
        states = (output[0] if isinstance(output, tuple) else output).clone()
        states[:, start:] += 0.5 * vector.values
        return (states, *output[1:]) if isinstance(output, tuple) else states

    (blocks,) = [m for m in old.plain.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == model.cfg.n_layers]
    handle = blocks[layer].register_forward_hook(add)
    for step, token in enumerate(out.tokens[0].tolist()):
        ids = torch.cat([prompt.prompt_tokens, out.tokens[0][:step]])
        logits = old.plain(input_ids=ids[None]).logits[0, -1]
        assert int(logits.argmax()) == token
        assert float(out.logprobs[0][step]) == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-3)
    handle.remove()
    methods = {"plain": "plain", "rag": "rag", "dps": ("dps", HeadSet.parse("L0H1")), "steerx": "steerx"}
    config = dps.EvaluateConfig(layers=(1,), choose_on=0, vector_examples=1)
    options = {"strengths": (0.5,), "ks": (1,), "evaluate_config": config}
    table = dps.evaluate(model, probe[:2], methods, max_examples=1, max_new_tokens=3, prompt_config=short, **options)
    assert table.methods == (*methods, "reference")
    assert bool(table.to_frame()["mean"].notna().all())


def test_ablation_cost_and_controls(old, probe, short):
    cost = dps.ablation_cost(old.hooked, probe[:3], HeadSet.parse("L0H1,L2H3"), n_random=2, prompt_config=short)
    assert len(cost.beside_random()) == 6 + 8 + 8 + 6, "full model, these heads, random sets, their difference"


def test_reference_families(old):
    from dps_lens.families import FunctionVector, Repeated, Retrieval, Task
    from dps_lens.families.repeated import repeated_tokens

    model, kind = old.hooked, Repeated("previous_token", n_prompts=1, length=8)
    got = kind.score(model).mean()
    old.plain.set_attn_implementation("eager")
    with torch.no_grad():
        patterns = old.plain(input_ids=repeated_tokens(model, 8, 0), output_attentions=True).attentions
    old.plain.set_attn_implementation("sdpa")
    expected = torch.stack([pattern[0].diagonal(-1, 1, 2).mean(-1) for pattern in patterns])
    assert torch.allclose(got.float(), expected, atol=1e-5)
    paragraphs = ("The river rises in spring. It falls again in late summer. Nobody minds.",) * 30
    needle = Retrieval().needles[0]
    assert not Retrieval(lengths=(300,), depths=(0.5,), needles=(needle,), haystack=paragraphs).score(model).defined
    task = Task("pairs", tuple((f"w{index}", f"v{index}") for index in range(8)))
    family = FunctionVector((task,), n_shots=3, n_trials=2)
    mean, _ = family.task_mean(model, task)
    assert family.effect(model, task, 0, mean).abs().max() > 0


def test_curves_vectors_and_attention(old, probe, short):
    options = {"ks": (2,), "n_random": 2, "max_examples": 1, "prompt_config": short}
    heads, users = HeadSet.parse("L0H1,L2H3"), probe[:3]
    for measure in (dps.ablation_curve, dps.patch_heads, dps.vector_recovery):
        frame = measure(old.hooked, users, {"chosen": heads}, **options).to_frame()
        assert frame[frame["family"] == "chosen"]["mean"].abs().max() > 1e-4
    vector = dps.preference_vector(old.hooked, users[0], HeadSet.parse("L1H2"), max_examples=1, prompt_config=short)
    prompt = build_prompt(old.hooked, users[0].discovery_examples()[-1], config=short)
    start, stop = prompt.spans["response"]
    z = z_of(old.plain, prompt, 1)[start - 1 : stop - 1, 16:24].mean(0)
    weight = output_projection(attention_modules(old.plain)[1]).weight[:, 16:24]
    assert torch.allclose(vector, (weight @ z).detach(), atol=1e-4)
    attention = dps.profile_attention(old.hooked, users[:1], heads, max_examples=1, prompt_config=short)
    assert attention.groupby("head")["attention"].sum().tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


@pytest.mark.real
def test_embedded_model_agrees_with_hugging_face(real, probe, short):
    import transformers

    from dps_lens.model.load import _resolve

    plain = transformers.AutoModelForCausalLM.from_pretrained(
        _resolve("smollm2-135m", torch.float32), dtype=torch.float32
    ).eval()
    assert dps.check_model(real, reference=plain)["parity"] < 1e-2
    prompt = build_prompt(real, probe[0].examples[0], config=short)
    from dps_lens.scoring import CleanRun

    branches = CleanRun(runner_of(real), prompt)
    got = branches.ablated(torch.stack([HeadSet.parse(name).mask(real.cfg) for name in ("L1H5", "L14H3")]))
    for value, (layer, head) in zip(got, [(1, 5), (14, 3)], strict=True):
        assert float(value) == pytest.approx(ablated_nll(plain, prompt, layer, head, 64, "response", 0.0), abs=1e-3)


def test_paths_and_dossiers(old, probe):
    """Writes and paths are those of the plain model; a dossier and the families run from end to end."""
    case, receiver = Case(old, probe[:2]), Head(2, 1)
    written = case.paths.writes(SENDERS, case.z)
    z = case.paths.received(receiver.layer, written, ["resid", "q", "k", "v"])
    block = blocks_of(old.plain)[receiver.layer]
    for place, sender in enumerate(SENDERS):
        expected = written_by_hand(case, sender)
        assert torch.allclose(written[place], expected, atol=1e-4)
        patched = case.z_with(receiver, [add_write(case, block, expected)])
        assert torch.allclose(z["resid"][place, :, receiver.head], patched, atol=1e-4)
        parts = [z[part][place, :, receiver.head] for part in "qkv"]
        assert all((part - case.run.z[receiver.layer, :, receiver.head]).norm() > 1e-5 for part in parts)
    dossier = dps.describe_head(old.hooked, probe[:2], receiver, n_random=1)
    assert bool(dossier.values.isfinite().all())
    kinds = ["copying", dps.ProfileRetrieval(probe[:2]), dps.StyleModulation(probe[:2], max_examples=1)]
    families = dps.reference_heads(old.hooked, kinds, cache=False)
    assert all(scores.defined for scores in families.values())
