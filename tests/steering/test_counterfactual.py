"""DPS against the run of another prompt: heads of the masked branch get the z that they have there, step by step."""

from contextlib import ExitStack

import pytest
import torch
from conftest import no_hooks_left
from oracles import attention_modules, columns_replaced, nll, output_projection, z_of

import dps_lens as dps
from dps_lens.errors import SteeringError
from dps_lens.heads import HeadSet

SETS = [HeadSet.parse("L0H1,L2H3"), HeadSet.parse("L1H0"), HeadSet.parse("L0H2,L1H1,L2H0")]
PROMPT = dps.PromptConfig(items=3, profile_tokens=60, task_tokens=20, response_tokens=6)
CONFIG = dps.DecodeConfig(stop_at_eos=False)
GAP = 1e-4


@torch.no_grad()
def patched(plain, own, other, heads, start, n_new, d_head):
    """Logits after `own`, the heads' z of the run of `other` in place of theirs where the answer is written."""
    found = {}

    def keep(layer):
        def hook(_, arguments):
            found[layer] = arguments[0][0].clone()

        return hook

    modules = attention_modules(plain)
    handles = [output_projection(modules[h.layer]).register_forward_pre_hook(keep(h.layer)) for h in heads]
    plain(input_ids=other[None])
    for handle in handles:
        handle.remove()
    with ExitStack() as stack:
        for layer, head in heads:
            z = found[layer][-n_new - 1 :, head * d_head : (head + 1) * d_head]
            stack.enter_context(columns_replaced(plain, layer, head, d_head, slice(start - 1, None), z))
        return plain(input_ids=own[None]).logits[0, -1]


@pytest.fixture(scope="module")
def prompts_of(probe):
    def build(model):
        users = (probe[0], probe[5], probe[10])
        return [[dps.build_prompt(model, one.examples[0], which, config=PROMPT) for which in ("own", "none")]
                for one in users]  # fmt: skip

    return build


def test_patched_branches_equal_runs_of_both_prompts(tiny, prompts_of):
    """Three users with heads, strengths and lengths of their own in one batch; γ = 0 runs the model alone."""
    model, plain, gammas = tiny.hooked, tiny.plain, [0.5, 2.0, 0.0]
    prompts = prompts_of(model)
    own, none = ([pair[index] for pair in prompts] for index in (0, 1))
    out = dps.generate(
        model, own, heads=SETS, gamma=gammas, rule="dps-patch", negative_prompts=none, max_new_tokens=5,
        decode_config=CONFIG,
    )  # fmt: skip
    moved = 0.0
    for row, (a, b) in enumerate(prompts):
        for step, token in enumerate(out.tokens[row].tolist()):
            new = out.tokens[row][:step]
            tokens, other = torch.cat([a.prompt_tokens, new]), torch.cat([b.prompt_tokens, new])
            with torch.no_grad():
                full = plain(input_ids=tokens[None]).logits[0, -1]
            masked = patched(plain, tokens, other, SETS[row], len(a.prompt_tokens), step, model.cfg.d_head)
            logits = (1 + gammas[row]) * full - gammas[row] * masked
            best = logits.topk(2).values
            assert float(best[0] - best[1]) > GAP, "the reference itself is undecided here; use another prompt"
            assert int(logits.argmax()) == token, (row, step)
            moved = max(moved, float((full - masked).abs().max()))
    assert moved > 0.01
    assert no_hooks_left(model)


def test_it_is_an_ablation_stacks_and_leaves_with_its_rows(llama, prompts_of):
    model = llama.hooked
    prompts = prompts_of(model)
    own, none = ([pair[index] for pair in prompts] for index in (0, 1))
    shared = {"heads": SETS, "negative_prompts": none, "gamma": 1.0, "decode_config": CONFIG}
    out = dps.generate(model, own, rule="dps-patch", max_new_tokens=6, **shared)
    as_ablation = dps.DecodeConfig(stop_at_eos=False, ablation="patch")
    again = dps.generate(model, own, max_new_tokens=6, **{**shared, "decode_config": as_ablation})
    assert [one.tolist() for one in again.tokens] == [one.tolist() for one in out.tokens]
    alone = [
        dps.generate(
            model, a, heads=heads, rule="dps-patch", negative_prompts=b, max_new_tokens=6, decode_config=CONFIG
        )
        for (a, b), heads in zip(prompts, SETS, strict=True)
    ]
    assert [one.tokens[0].tolist() for one in alone] == [one.tolist() for one in out.tokens]
    # A row that ends takes its branches along.
    config = model.original_model.generation_config
    before, config.eos_token_id = config.eos_token_id, int(out.tokens[0][1])
    try:
        ended = dps.generate(model, own, rule="dps-patch", max_new_tokens=6, **{**shared, "decode_config": None})
    finally:
        config.eos_token_id = before
    for short, whole in zip(ended.tokens, out.tokens, strict=True):
        assert short.tolist() == whole[: len(short)].tolist()
    assert len(ended.tokens[0]) <= 2
    stacked = dps.generate(model, own[0], heads=SETS[0], rule="dps-patch+cad", negative_prompts=none[0], gamma=0.5,
                           alpha=0.4, max_new_tokens=3, decode_config=CONFIG)  # fmt: skip
    a, b = prompts[0]
    for step, token in enumerate(stacked.tokens[0].tolist()):
        new = stacked.tokens[0][:step]
        tokens, other = torch.cat([a.prompt_tokens, new]), torch.cat([b.prompt_tokens, new])
        with torch.no_grad():
            full, negative = (llama.plain(input_ids=one[None]).logits[0, -1] for one in (tokens, other))
        masked = patched(llama.plain, tokens, other, SETS[0], len(a.prompt_tokens), step, model.cfg.d_head)
        assert int((full + 0.5 * (full - masked) + 0.4 * (full - negative)).argmax()) == token


def test_the_masked_model_and_the_sweep_are_those_of_a_patch(llama, probe, prompts_of):
    model, user = llama.hooked, probe[0]
    example = user.examples[-1]
    own, none = (dps.build_prompt(model, example, which, config=PROMPT) for which in ("own", "none"))
    heads, d_head = SETS[0], model.cfg.d_head
    start, stop = own.spans["response"]
    length = none.spans["response"]
    every = {head: z_of(llama.plain, none, head.layer)[length[0] - 1 : length[1] - 1] for head in heads}
    with ExitStack() as stack:
        for layer, head in heads:
            z = every[layer, head][:, head * d_head : (head + 1) * d_head]
            stack.enter_context(columns_replaced(llama.plain, layer, head, d_head, slice(start - 1, stop - 1), z))
        with torch.no_grad():
            masked = llama.plain(input_ids=own.tokens[None]).logits[0, start - 1 : stop - 1].double()
    with torch.no_grad():
        full = llama.plain(input_ids=own.tokens[None]).logits[0, start - 1 : stop - 1].double()
    steered = full + 0.5 * (full - masked)
    expected = torch.nn.functional.cross_entropy(steered, own.tokens[start:stop])
    sweep = dps.steering_sweep(
        model, [user, probe[1]], {"patch": ("dps-patch", heads)}, k=len(heads), strengths=(0.5,), n_random=0,
        max_examples=1, prompt_config=PROMPT,
    )  # fmt: skip
    place = sweep.example_ids.index(example.id)
    assert float(sweep.change["patch"][0, place]) == pytest.approx(float(expected) - nll(llama.plain, own), abs=1e-4)


def test_bad_input_says_what_to_do(llama, prompts_of):
    model = llama.hooked
    own, none = prompts_of(model)[0]
    asked = {"heads": SETS[0], "rule": "dps-patch", "max_new_tokens": 1}
    with pytest.raises(SteeringError, match="needs negative_prompts="):
        dps.generate(model, own, **asked)
    with pytest.raises(SteeringError, match="are the same"):
        dps.generate(model, own, negative_prompts=own, **asked)
    with pytest.raises(SteeringError, match="positions='response'"):
        dps.generate(model, own, negative_prompts=none, positions="all", **asked)
    config = dps.DecodeConfig(ablation=dps.Patch(z=torch.zeros(3, 1, 4, 8)))
    with pytest.raises(SteeringError, match="use Patch"):
        dps.generate(model, own, heads=SETS[0], negative_prompts=none, decode_config=config)
