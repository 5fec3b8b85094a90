"""Style-modulation heads against a literal computation of the published score on a plain model."""

import math
import statistics

import pytest
import torch
from oracles import attention_modules, output_projection, z_of

import dps_lens as dps
from dps_lens.data.conditions import prompts_in
from dps_lens.errors import ScoreError

PROMPT = dps.PromptConfig(items=2, profile_tokens=40, task_tokens=16, response_tokens=6)


@torch.no_grad()
def attention_outputs(plain, prompt):
    """What the output projection of every layer gives, `[pos d_model]`."""
    found = []
    handles = [
        output_projection(one).register_forward_hook(lambda module, arguments, output: found.append(output[0]))
        for one in attention_modules(plain)
    ]
    plain(input_ids=prompt.tokens[None])
    for handle in handles:
        handle.remove()
    return found


def weight_of(projection):
    linear = isinstance(projection, torch.nn.Linear)
    return projection.weight.detach() if linear else projection.weight.detach().T


@pytest.mark.parametrize("against", ["other_user", "no_profile"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_scores_are_the_published_ones(tinies, probe, architecture, against):
    tiny, users = tinies(architecture), probe[:3]
    family = dps.StyleModulation(users, against=against, max_examples=2, prompt_config=PROMPT)
    scores = dps.reference_heads(tiny.hooked, [family], cache=False)["style_modulation"]
    assert scores.user_ids == tuple(user.id for user in users)
    cfg = tiny.hooked.cfg
    for row, user in enumerate(users):
        examples = user.discovery_examples()[-2:]
        for layer in range(cfg.n_layers):
            z, whole = torch.zeros(cfg.n_heads * cfg.d_head), torch.zeros(cfg.d_model)
            for example in examples:
                own = dps.build_prompt(tiny.hooked, example, config=PROMPT)
                others = prompts_in(tiny.hooked, example, against, users, n_donors=2, config=PROMPT)
                for prompt, weight in ((own, 1 / 2), *((other, -1 / 2 / len(others)) for other in others)):
                    start, stop = prompt.spans["response"]
                    z += weight * z_of(tiny.plain, prompt, layer)[start - 1 : stop - 1].mean(0)
                    whole += weight * attention_outputs(tiny.plain, prompt)[layer][start - 1 : stop - 1].mean(0)
            if float(whole.norm()) < 1e-5:
                assert architecture.startswith("gemma"), "a sliding window that does not reach the profile"
                continue
            w_o, logs = weight_of(output_projection(attention_modules(tiny.plain)[layer])), []
            for head in range(cfg.n_heads):
                alone = torch.zeros_like(z)
                columns = slice(head * cfg.d_head, (head + 1) * cfg.d_head)
                alone[columns] = z[columns]
                inner = float(w_o @ alone @ whole)
                logs.append(math.copysign(math.log1p(abs(inner)), inner))
            mean, spread = statistics.mean(logs), statistics.pstdev(logs)
            for head in range(cfg.n_heads):
                expected = (logs[head] - mean) / spread
                assert float(scores.values[row, layer, head]) == pytest.approx(expected, abs=2e-3), (layer, head)
    assert torch.equal(scores.values, scores.components["the user's style"])


def test_the_null_has_no_style_where_examples_share_none(tinies, probe):
    """Two examples with signs at random: half of the draws are the user's own score, and half that of a difference."""
    model = tinies("llama").hooked
    family = dps.StyleModulation(probe[:3], max_examples=2, prompt_config=PROMPT)
    scores = dps.reference_heads(model, [family], cache=False)["style_modulation"]
    null = scores.components["signs at random"]
    assert not torch.allclose(null, scores.values, atol=1e-3)
    assert torch.allclose(null.mean(-1), torch.zeros(3, model.cfg.n_layers), atol=1e-4)
    alone = dps.StyleModulation(probe[:3], max_examples=1, prompt_config=PROMPT)
    alone_scores = dps.reference_heads(model, [alone], cache=False)["style_modulation"]
    assert bool(alone_scores.components["signs at random"].isnan().all())
    assert alone_scores.defined


def test_a_planted_carrier_writes_the_style_of_its_layer(toy_model, toy_users):
    family = dps.StyleModulation(toy_users, max_examples=2)
    scores = dps.reference_heads(toy_model, [family], cache=False)["style_modulation"]
    of_layer = scores.mean()[1]
    assert int(of_layer.argmax()) == 2, "L1H2 copies the user's signature"
    # The most that one of four heads can stand out.
    assert float(of_layer.max()) == pytest.approx(3**0.5, abs=0.05)


def test_what_cannot_be_scored_is_refused(tinies, probe, unchecked):
    model = tinies("llama").hooked
    for family, match in (
        (dps.StyleModulation(probe[:1]), "at least two users"),
        (dps.StyleModulation(probe[:2], against="nobody"), "against 'nobody' is unknown"),
        (dps.StyleModulation(probe[:2], n_donors=0), "n_donors"),
    ):
        with pytest.raises(ScoreError, match=match):
            dps.reference_heads(model, [family], cache=False)
