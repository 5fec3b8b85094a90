"""Steering of the users' own text against plain Hugging Face models, and on a model of known answer."""

from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
import toy
from oracles import columns_replaced
from pcs import score_pcs
from torch.nn.functional import cross_entropy

import dps_lens as dps
from dps_lens.errors import RunError, ScoreError, SteeringError
from dps_lens.evaluation.steered import SweepWork
from dps_lens.evaluation.sweep import SteeringSweep
from dps_lens.heads import Head, HeadSet
from dps_lens.plots import steering
from dps_lens.scores import HeadScores
from dps_lens.selection import draw_seed, random_heads
from dps_lens.steering.layout import layers_to_contrast
from dps_lens.vectors.style import SteeringVector

HEADS = HeadSet.parse("L1H2,L0H1")
STRENGTHS = (0.5, 2.0)
PROMPT = dps.PromptConfig(items=2, profile_tokens=60, task_tokens=20, response_tokens=6)
METHODS = {
    "dps": ("dps", HEADS),
    "entropy": ("dps-entropy", HEADS),
    "cad": "cad",
    "both": ("dps+cad", HEADS),
    "amplify": ("amplify", HEADS),
}
OPTIONS = {"k": 2, "strengths": STRENGTHS, "prompt_config": PROMPT, "max_examples": 1}


@torch.no_grad()
def logits_of(plain, prompt, d_head, heads=(), factor=0.0, positions="response"):
    """Of the response, float64, the heads' z multiplied at these positions; one factor, or one a head."""
    start, stop = prompt.spans["response"]
    positions = {"response": slice(start - 1, None), "all": slice(None), "profile": slice(*prompt.spans["profile"])}[
        positions
    ]
    with ExitStack() as stack:
        for layer, head in heads:
            columns, times = slice(head * d_head, (head + 1) * d_head), factor
            if isinstance(heads, dict):
                times = factor[heads[layer, head]]
            new = lambda z, columns=columns, times=times: times * z[:, :, columns]  # noqa: E731
            stack.enter_context(columns_replaced(plain, layer, head, d_head, positions, new))
        return plain(input_ids=prompt.tokens[None]).logits[0, start - 1 : stop - 1].double()


def by_hand(name, strength, heads, plain, own, none, d_head):
    """Change of the NLL and KL from probabilities, term by term."""
    full = logits_of(plain, own, d_head)
    p = full.softmax(-1)
    if name == "amplify":
        mixed = logits_of(plain, own, d_head, heads, 1 + strength)
    else:
        masked, without = logits_of(plain, own, d_head, heads), logits_of(plain, none, d_head)
        gamma = {"cad": 0.0}.get(name, strength)
        if name == "entropy":
            gamma = (-(p * p.log()).sum(-1)).clamp(max=strength)[:, None]
        alpha = strength if name in ("cad", "both") else 0.0
        mixed = full + gamma * (full - masked) + alpha * (full - without)
    q = mixed.softmax(-1)
    targets = own.response_tokens
    change = cross_entropy(mixed, targets) - cross_entropy(full, targets)
    return float(change), float((q * (q / p).log()).sum(-1).mean())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_changes_and_kl_equal_the_plain_model(tinies, architecture, probe):
    tiny, users = tinies(architecture), [probe[0], probe[5]]
    sweep = dps.steering_sweep(tiny.hooked, users, METHODS, n_random=2, **OPTIONS)
    d_head = tiny.hooked.cfg.d_head
    for index, user in enumerate(users):
        own, none = (
            dps.build_prompt(tiny.hooked, user.examples[-1], which, config=PROMPT) for which in ("own", "none")
        )
        assert float(sweep.nll[index]) == pytest.approx(
            float(cross_entropy(logits_of(tiny.plain, own, d_head), own.response_tokens)), abs=1e-4
        )
        drawn = [random_heads(tiny.hooked, HEADS, match="nearest", seed=draw_seed(0, draw)) for draw in range(2)]
        for name in METHODS:
            for row, strength in enumerate(STRENGTHS):
                expected = by_hand(name, strength, HEADS, tiny.plain, own, none, d_head)
                assert float(sweep.change[name][row, index]) == pytest.approx(expected[0], abs=1e-4)
                assert float(sweep.kl[name][row, index]) == pytest.approx(expected[1], abs=1e-4)
                if name == "cad":
                    continue
                controls = [by_hand(name, strength, heads, tiny.plain, own, none, d_head) for heads in drawn]
                label = f"{name} (random)"
                assert float(sweep.change[label][row, index]) == pytest.approx(np.mean(controls, 0)[0], abs=1e-4)
                assert float(sweep.kl[label][row, index]) == pytest.approx(np.mean(controls, 0)[1], abs=1e-4)
    assert "cad (random)" not in sweep.methods


@torch.no_grad()
def early_logits(plain, prompt, layer):
    """Float64, of the response, read off the residual stream that enters a layer."""
    start, stop = prompt.spans["response"]
    states = plain(input_ids=prompt.tokens[None], output_hidden_states=True).hidden_states
    return plain.lm_head(plain.model.norm(states[layer]))[0, start - 1 : stop - 1].double()


@torch.no_grad()
def logits_with(plain, prompt, layer, values):
    """Float64, of the response, a vector added to what leaves a layer from the last prompt token on."""
    start, stop = prompt.spans["response"]

    def add(module, arguments, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, start - 1 :] += values
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = plain.model.layers[layer].register_forward_hook(add)
    logits = plain(input_ids=prompt.tokens[None]).logits[0, start - 1 : stop - 1].double()
    handle.remove()
    return logits


def test_rivals_without_heads_equal_the_plain_model(llama, probe):
    """DoLa, with nothing ruled out, and vectors of the users, alone and with CAD."""
    users = [probe[0], probe[5]]
    vectors = {
        user.id: dps.style_vector(llama.hooked, user, layer=1, max_examples=1, max_new_tokens=4, prompt_config=PROMPT)
        for user in users
    }
    methods = {"dola": "dola", "style": ("vector", vectors), "both": ("vector+cad", vectors)}
    sweep = dps.steering_sweep(llama.hooked, users, methods, **OPTIONS)
    assert sweep.methods == tuple(methods), "random heads are no control of these"
    assert layers_to_contrast(llama.hooked) == [1], "of 3 layers, one can be contrasted with"
    for index, user in enumerate(users):
        own, none = (dps.build_prompt(llama.hooked, user.examples[-1], of, config=PROMPT) for of in ("own", "none"))
        full, without = (logits_of(llama.plain, of, 8) for of in (own, none))
        early = early_logits(llama.plain, own, 1).log_softmax(-1)
        vector = vectors[user.id].values
        for row, strength in enumerate(STRENGTHS):
            added = logits_with(llama.plain, own, 1, strength * vector)
            mixed = {
                "dola": full.log_softmax(-1) - strength * early,
                "style": added,
                "both": added + strength * (added - without),
            }
            for name, logits in mixed.items():
                change = cross_entropy(logits, own.response_tokens) - cross_entropy(full, own.response_tokens)
                p, q = (values.log_softmax(-1) for values in (logits, full))
                assert float(sweep.change[name][row, index]) == pytest.approx(float(change), abs=1e-4)
                kl = float((p.exp() * (p - q)).sum(-1).mean())
                assert float(sweep.kl[name][row, index]) == pytest.approx(kl, abs=1e-4)


def test_other_vectors_are_another_run(llama, probe, tmp_path):
    values = torch.linspace(-1, 1, llama.hooked.cfg.d_model)
    options = OPTIONS | {"out": tmp_path}
    dps.steering_sweep(llama.hooked, probe[:1], {"v": ("vector", {probe[0].id: SteeringVector(values, 1)})}, **options)
    other = {"v": ("vector", {probe[0].id: SteeringVector(2 * values, 1)})}
    with pytest.raises(RunError, match="vectors"):
        dps.steering_sweep(llama.hooked, probe[:1], other, **options)


def test_only_the_carrier_steers(toy_model, toy_users):
    carrier, other = HeadSet([Head(*toy.CARRIER)]), HeadSet.parse("L0H1")
    methods = {"carrier": ("dps", carrier), "other": ("dps", other), "cad": "cad"}
    options = {"k": 1, "strengths": (0.5, 1.0), "n_random": 3}
    sweep = dps.steering_sweep(toy_model, toy_users, methods, **options)
    frame = sweep.to_frame().set_index(["method", "strength"])
    # The signature is a text's first word; on the words after it the carrier only gets in the way.
    assert frame.loc[("carrier", 1.0), "low"] > 1
    assert frame.loc[("carrier", 1.0), "difference_low"] > 1
    for name in ("other", "carrier (random)"):
        assert abs(frame.loc[(name, 1.0), "mean"]) < 0.05
    first = dps.steering_sweep(
        toy_model, toy_users, methods, prompt_config=dps.PromptConfig(response_tokens=1), **options
    )
    assert bool((first.change["carrier"] < 0).all())
    assert bool((first.change["cad"] < 0).all())
    figure = steering(sweep)
    assert {trace.name for trace in figure.data} == {*sweep.methods}
    assert sweep.plot() == figure


def sweep_of(change, kl):
    """Two users, one example each."""
    users = ("a", "b")
    as_tensors = [
        {name: torch.tensor(rows, dtype=torch.float64) for name, rows in part.items()} for part in (change, kl)
    ]
    return SteeringSweep((1.0, 2.0), users, users, torch.zeros(2, dtype=torch.float64), *as_tensors)


def test_methods_meet_at_equal_kl():
    sweep = sweep_of(
        {"x": [[-0.1, -0.3], [0.4, 0.2]], "x (random)": [[0.0, 0.1], [0.2, 0.3]], "weak": [[0.0, 0.0], [0.1, 0.1]]},
        {"x": [[0.08, 0.24], [0.5, 0.78]], "x (random)": [[0.16] * 2, [0.12, 0.6]], "weak": [[0.0] * 2, [0.1] * 2]},
    )
    at = sweep.at_kl(0.36).set_index("method")
    # x: roots 0.4 and 0.8 of the mean KL, half way; random: 0.4 and 0.6, its last strength; weak never gets there.
    assert at.loc["x", "strength"] == pytest.approx(1.5)
    assert at.loc["x", "mean"] == pytest.approx((0.15 - 0.05) / 2)
    assert at.loc["x (random)", "strength"] == pytest.approx(2.0)
    assert at.loc["x", "difference"] == pytest.approx(((0.15 - 0.2) + (-0.05 - 0.3)) / 2)
    assert np.isnan(at.loc["weak", "mean"])
    low = sweep.at_kl(0.04).set_index("method")
    assert low.loc["x", "strength"] == pytest.approx(0.5), "half the strength, a quarter of the KL"
    assert low.loc["x", "mean"] == pytest.approx(-0.1)
    for kl in (0.0, -1.0, float("nan")):
        with pytest.raises(SteeringError, match="above 0"):
            sweep.at_kl(kl)


def test_a_run_resumes(llama, probe, tmp_path, monkeypatch):
    methods, users = {"dps": ("dps", HEADS)}, list(probe[:2])
    whole = dps.steering_sweep(llama.hooked, users, methods, n_random=0, **OPTIONS)
    make, calls = SweepWork.make, []

    def stops(self, key, given=None):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(list(self.by_key).index(key))
        return make(self, key, given)

    monkeypatch.setattr(SweepWork, "make", stops)
    with pytest.raises(KeyboardInterrupt):
        dps.steering_sweep(llama.hooked, users, methods, n_random=0, out=tmp_path, **OPTIONS)
    calls[:] = []
    resumed = dps.steering_sweep(llama.hooked, users, methods, n_random=0, out=tmp_path, **OPTIONS)
    assert calls == [1], "only the example that was missing"
    assert torch.equal(resumed.change["dps"], whole.change["dps"])


@pytest.mark.parametrize("positions", ["all", "profile"])
def test_heads_are_edited_where_it_is_asked_for(llama, probe, positions):
    methods, user = {"dps": ("dps", HEADS), "decore": ("decore", HEADS), "amplify": ("amplify", HEADS)}, probe[0]
    sweep = dps.steering_sweep(
        llama.hooked, [user], methods, n_random=0, held_out_config=dps.HeldOutConfig(positions=positions), **OPTIONS
    )
    own, d_head = dps.build_prompt(llama.hooked, user.examples[-1], config=PROMPT), llama.hooked.cfg.d_head
    full = logits_of(llama.plain, own, d_head)
    nll = float(cross_entropy(full, own.response_tokens))
    masked = logits_of(llama.plain, own, d_head, HEADS, positions=positions)
    for row, strength in enumerate(STRENGTHS):
        found = float(cross_entropy(full + strength * (full - masked), own.response_tokens)) - nll
        assert float(sweep.change["dps"][row, 0]) == pytest.approx(found, abs=1e-4)
        amplified = logits_of(llama.plain, own, d_head, HEADS, 1 + strength, positions)
        found = float(cross_entropy(amplified, own.response_tokens)) - nll
        assert float(sweep.change["amplify"][row, 0]) == pytest.approx(found, abs=1e-4)
    config = dps.DecodeConfig(max_gamma=0.5, keep_delta_logits=True)
    options = {"positions": positions, "max_new_tokens": 1, "decode_config": config}
    by_generation = dps.generate(llama.hooked, own, rule="decore", heads=HEADS, **options)
    steered = full[0] + by_generation.delta_logits[0][0].double()
    first = dps.PromptConfig(**{**PROMPT.to_dict(), "response_tokens": 1})
    options = {**OPTIONS, "prompt_config": first, "strengths": (0.5,)}
    options["held_out_config"] = dps.HeldOutConfig(positions=positions)
    once = dps.steering_sweep(llama.hooked, [user], {"decore": methods["decore"]}, n_random=0, **options)
    target = own.response_tokens[:1]
    expected = cross_entropy(steered[None], target) - cross_entropy(full[:1], target)
    assert float(once.change["decore"][0, 0]) == pytest.approx(float(expected), abs=1e-3)


def test_heads_weigh_what_other_users_say(llama, probe):
    """Weights of a user come from the scores of the others; a random head takes those of the head it stands for."""
    users = list(probe[:2])
    values = torch.zeros(2, llama.hooked.cfg.n_layers, llama.hooked.cfg.n_heads)
    values[0, 1, 2], values[0, 0, 1] = 0.2, 0.1
    values[1, 1, 2], values[1, 0, 1] = 0.3, 0.4
    scores = HeadScores(values, example_ids=["x", "y"], user_ids=[user.id for user in users])
    methods = {"weighted": ("dps", scores), "flat": ("dps", scores)}
    sweep = dps.steering_sweep(
        llama.hooked, users, methods, n_random=1, held_out_config=dps.HeldOutConfig(weighted=("weighted",)), **OPTIONS
    )
    d_head, shares = llama.hooked.cfg.d_head, [{(0, 1): 1.0, (1, 2): 0.75}, {(0, 1): 0.5, (1, 2): 1.0}]
    for index, (user, weights) in enumerate(zip(users, shares, strict=True)):
        own = dps.build_prompt(llama.hooked, user.examples[-1], config=PROMPT)
        full, target = logits_of(llama.plain, own, d_head), own.response_tokens
        drawn = sorted(random_heads(llama.hooked, HEADS, match="nearest", seed=draw_seed(0, 0)))
        controls = dict(zip(drawn, [weights[0, 1], weights[1, 2]], strict=True))
        for label, heads in (
            ("weighted", weights),
            ("weighted (random)", controls),
            ("flat", dict.fromkeys(weights, 1.0)),
        ):
            masked = logits_of(llama.plain, own, d_head, heads, {w: 1 - w for w in heads.values()})
            for row, strength in enumerate(STRENGTHS):
                steered = full + strength * (full - masked)
                expected = cross_entropy(steered, target) - cross_entropy(full, target)
                assert float(sweep.change[label][row, index]) == pytest.approx(float(expected), abs=1e-4)
    for method in (("dps", HEADS), ("decore", scores), "cad"):
        with pytest.raises(SteeringError, match="cannot be weighted"):
            dps.steering_sweep(
                llama.hooked, users, {"x": method}, held_out_config=dps.HeldOutConfig(weighted=("x",)), **OPTIONS
            )


def test_users_with_more_examples_than_draws(llama, probe):
    """Every example has a control."""
    options = OPTIONS | {"max_examples": 2}
    assert len(probe[0].examples) >= 2
    sweep = dps.steering_sweep(llama.hooked, probe[:2], {"dps": ("dps", HEADS)}, n_random=1, **options)
    assert sweep.change["dps (random)"].shape == (2, 4)
    assert bool(sweep.change["dps (random)"].isfinite().all())


def test_rules_without_heads_need_no_family(llama, probe):
    alone = dps.steering_sweep(llama.hooked, probe[:2], {"cad": "cad"}, **OPTIONS)
    beside = dps.steering_sweep(llama.hooked, probe[:2], {"cad": "cad", "dps": ("dps", HEADS)}, **OPTIONS)
    assert alone.methods == ("cad",)
    assert torch.equal(alone.change["cad"], beside.change["cad"])


def test_bad_input_says_what_to_do(llama, probe):
    users = list(probe[:2])

    def sweep(methods, **changes):
        return dps.steering_sweep(llama.hooked, users, methods, **{**OPTIONS, **changes})

    with pytest.raises(SteeringError, match="needs a vector a user"):
        sweep({"style": "vector"})
    vectors = {user.id: SteeringVector(torch.zeros(llama.hooked.cfg.d_model), 1) for user in users}
    with pytest.raises(SteeringError, match=f"'style' has no vector of user '{users[1].id}'"):
        sweep({"style": ("vector", {users[0].id: vectors[users[0].id]})})
    with pytest.raises(SteeringError, match="last prompt token"):
        sweep({"style": ("vector", vectors)}, held_out_config=dps.HeldOutConfig(positions="all"))
    with pytest.raises(SteeringError, match=r"a vector \[3\] at layer 1 is not of this model"):
        sweep({"style": ("vector", vectors | {users[1].id: SteeringVector(torch.zeros(3), 1)})})
    with pytest.raises(SteeringError, match=r"needs heads, such as \('dps', scores\)"):
        sweep({"dps": "dps"})
    with pytest.raises(SteeringError, match="takes no heads"):
        sweep({"cad": ("cad", HEADS)})
    with pytest.raises(SteeringError, match="'nonsense' is unknown"):
        sweep({"x": ("nonsense", HEADS)})
    for strengths in ((), (0.0, 1.0), (2.0, 1.0), (1.0, 1.0)):
        with pytest.raises(SteeringError, match="positive and ascending"):
            sweep({"dps": ("dps", HEADS)}, strengths=strengths)
    scores = score_pcs(llama.hooked, users, positions="all", max_examples=1, prompt_config=PROMPT)
    with pytest.raises(ScoreError, match="positions"):
        sweep({"dps": ("dps", scores)})


def test_pairs_under_steering_are_the_difference_of_their_answers(llama, probe):
    users = dps.make_pairs(probe[:3])
    swapped = [
        replace(
            user,
            examples=tuple(replace(one, reference=one.rejected[0], rejected=(one.reference,)) for one in user.examples),
        )
        for user in users
    ]
    heads = dps.HeadSet.parse("L0H1,L1H2")
    methods = {"cad": "cad", "dps": ("dps", heads), "dps-patch": ("dps-patch", heads), "dola": "dola"}
    options = {
        "k": 2,
        "strengths": (0.5, 2.0),
        "n_random": 2,
        "max_examples": 1,
        "run_config": dps.RunConfig(progress=False),
    }

    def of(who, objective):
        return dps.steering_sweep(
            llama.hooked, who, methods, held_out_config=dps.HeldOutConfig(objective=objective), **options
        )

    pair, own, lost = of(users, "pair"), of(users, "nll"), of(swapped, "nll")
    torch.testing.assert_close(pair.nll, own.nll - lost.nll, atol=1e-6, rtol=1e-5)
    for name in pair.methods:
        torch.testing.assert_close(pair.change[name], own.change[name] - lost.change[name], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(pair.kl[name], (own.kl[name] + lost.kl[name]) / 2, atol=1e-6, rtol=1e-5)
    assert pair.loss == "pair"
    assert "pair" in pair.plot().layout.title.text
    with pytest.raises(SteeringError, match="nll, pair or choice"):
        of(users, Mine())


class Mine(dps.Objective):
    name = "mine"

    def losses(self, logits, targets, clean):
        return logits[:, 0]
