"""Every ablation, by name and as an object: what heads are scored with, they are tested, steered and exported with."""

from dataclasses import replace

import pytest
import torch
from oracles import edited_positions, z_of
from pcs import score_pcs

import dps_lens as dps
from dps_lens.errors import InterventionError, RunError, ScoreError, SteeringError
from dps_lens.heads import HeadSet

HEADS = HeadSet.parse("L1H2,L0H1")
TEST = {"ks": (2,), "n_random": 1, "max_examples": 1}


def means(tiny, users, short, condition, positions="response"):
    """Mean z `[layer head d_head]` over the edited positions of the newest discovery example of each user, by hand."""
    cfg = tiny.hooked.cfg
    prompts = [dps.build_prompt(tiny.hooked, user.discovery_examples()[-1], condition, config=short) for user in users]
    return torch.stack(
        [
            torch.cat([z_of(tiny.plain, p, layer)[edited_positions(p, positions)] for p in prompts]).mean(0)
            for layer in range(cfg.n_layers)
        ]
    ).reshape(cfg.n_layers, cfg.n_heads, cfg.d_head)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("mean", dps.Mean),
        pytest.param("zero", dps.Zero, marks=pytest.mark.full),
        pytest.param("uniform", dps.Uniform, marks=pytest.mark.full),
    ],
)
def test_a_name_is_short_for_an_object(llama, probe, short, name, made):
    users, options = probe[:6], {"max_examples": 1, "prompt_config": short}
    by_name, by_object = (score_pcs(llama.hooked, users, ablation=one, **options) for one in (name, made()))
    assert torch.equal(by_name.values, by_object.values)
    tested = [
        dps.ablation_curve(llama.hooked, users, {"p": by_name}, ablation=one, **TEST) for one in (None, name, made())
    ]
    for effects in tested:
        assert effects.manifest["ablation"] == name
        assert torch.equal(effects.chosen["own"], tested[0].chosen["own"])


def test_heads_scored_by_their_mean_are_tested_with_it(tinies, probe, short):
    tiny, users = tinies("llama"), list(probe[:6])
    scores = score_pcs(tiny.hooked, users, ablation="mean", max_examples=1, prompt_config=short)
    own = means(tiny, users, short, "own")
    assert torch.allclose(scores.tensors["mean.own"], own, atol=1e-5)
    effects = dps.ablation_curve(tiny.hooked, users, {"p": scores}, **TEST)
    sets = effects.sets()
    for row, user in enumerate(users):
        prompt = dps.build_prompt(tiny.hooked, user.examples[-1], config=short)
        with dps.ablate(tiny.hooked, sets[user.id], ablation=dps.Mean(z=own), prompt=prompt), torch.no_grad():
            logits = tiny.hooked(prompt.tokens[None, :-1])[0]
        start, stop = prompt.spans["response"]
        logp = logits[start - 1 :].double().log_softmax(-1).gather(-1, prompt.tokens[start:stop, None])
        changed = -float(logp.mean()) - float(effects.full["own"][row, 0])
        assert float(effects.chosen["own"][row, 0, 0, 0]) == pytest.approx(changed, abs=1e-4)
    written = dps.ablated_generation(
        tiny.hooked, users[:1], {"p": scores}, k=2, n_random=0, max_new_tokens=4, max_examples=1
    )
    prompt = dps.build_prompt(tiny.hooked, users[0].examples[-1], config=short)
    config = dps.DecodeConfig(ablation=dps.Mean(z=own))
    by_hand = dps.generate(
        tiny.hooked, prompt, heads=sets[users[0].id], gamma=-1.0, max_new_tokens=4, decode_config=config
    )
    assert written.texts["text"].tolist()[-1] == by_hand.texts[0].strip()
    cost = dps.ablation_cost(tiny.hooked, users, scores, k=2, n_random=0, max_examples=1)
    assert cost.manifest["ablation"] == "mean"
    assert cost.manifest["prompt_config"] == short.to_dict(), "settings of the scores"


def test_means_that_differ_are_not_mixed(llama, probe, short, tmp_path):
    users, options = probe[:6], {"ablation": "mean", "prompt_config": short}
    few, many = (score_pcs(llama.hooked, users, max_examples=n, **options) for n in (1, 2))
    with pytest.raises(ScoreError, match="'many' holds other means"):
        dps.ablation_curve(llama.hooked, users, {"few": few, "many": many}, **TEST)
    dps.ablation_curve(llama.hooked, users, {"p": few}, out=tmp_path, **TEST)
    moved = replace(few, tensors={name: 2 * mean for name, mean in few.tensors.items()})
    with pytest.raises(RunError, match="means.*was"):
        dps.ablation_curve(llama.hooked, users, {"p": moved}, out=tmp_path, **TEST)


def test_heads_are_steered_with_their_mean(tinies, probe, short):
    tiny, gamma = tinies("llama"), 0.8
    own = means(tiny, probe[:2], short, "own")
    prompt = dps.build_prompt(tiny.hooked, probe[0].examples[-1], config=short)
    config = dps.DecodeConfig(ablation=dps.Mean(z=own), stop_at_eos=False)
    options = {"heads": HEADS, "gamma": gamma, "max_new_tokens": 5}
    out = dps.generate(tiny.hooked, prompt, decode_config=config, **options)
    ids = prompt.prompt_tokens
    for token in out.tokens[0].tolist():
        with torch.no_grad():
            full = tiny.hooked(ids[None])[0, -1]
            with dps.ablate(tiny.hooked, HEADS, ablation=dps.Mean(z=own), prompt=prompt):
                masked = tiny.hooked(ids[None])[0, -1]
        assert int(((1 + gamma) * full - gamma * masked).argmax()) == token
        ids = torch.cat([ids, torch.tensor([token])])
    processor = dps.logits_processor(tiny.hooked, HEADS, gamma, ablation=dps.Mean(z=own))
    start = prompt.prompt_tokens[None]
    written = tiny.hooked.original_model.generate(
        start, logits_processor=[processor], max_new_tokens=5, do_sample=False
    )
    assert written[0, start.shape[1] :].tolist() == out.tokens[0].tolist()[: written.shape[1] - start.shape[1]]


def test_what_cannot_be_done_says_why_in_one_place(llama, probe, short):
    prompt = dps.build_prompt(llama.hooked, probe[0].examples[-1], config=short)
    config = dps.DecodeConfig(ablation="mean")
    with pytest.raises(InterventionError, match="needs the means"):
        dps.generate(llama.hooked, prompt, heads=HEADS, decode_config=config)
    for ablation, message in (("mean", "needs the means"), ("patch", "z of another run of the same tokens")):
        with pytest.raises(InterventionError, match=message):
            dps.logits_processor(llama.hooked, HEADS, ablation=ablation)
    with pytest.raises(SteeringError, match="needs negative_prompts="):
        dps.generate(llama.hooked, prompt, heads=HEADS, decode_config=dps.DecodeConfig(ablation="patch"))
