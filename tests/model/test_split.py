"""Models that lie in several places: on devices, or partly on a disk, give the same values."""

import pytest
import torch
from pcs import score_pcs

import dps_lens as dps
from dps_lens.heads import HeadSet

SETS = [HeadSet.parse("L0H1,L2H3"), HeadSet.parse("L1H0")]
ENDS = {
    "llama": ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"),
    "gpt2": ("transformer.wte", "transformer.wpe", "transformer.drop", "transformer.ln_f", "lm_head"),
}
LAYERS = {"llama": "model.layers", "gpt2": "transformer.h"}


def places(architecture, layers, ends):
    """A device map: a place for each layer, and one for what comes before and after them."""
    return dict.fromkeys(ENDS[architecture], ends) | {
        f"{LAYERS[architecture]}.{number}": place for number, place in enumerate(layers)
    }


def load(folder, architecture, layers, ends, tmp_path):
    where = places(architecture, layers, ends)
    return dps.load_model(folder, dtype="float32", device_map=where, offload_folder=str(tmp_path))


CASES = {
    "llama, part on a disk": ("llama", ("cpu", "disk", "cpu"), "cpu"),
    "llama, all on a disk": ("llama", ("disk", "disk", "disk"), "disk"),
    "gpt2, part on a disk": ("gpt2", ("disk", "cpu", "disk"), "cpu"),
}


@pytest.fixture(params=CASES)
def pair(request, tinies, tmp_path):
    """A model in one place, and the same one with weights that wait on a disk."""
    architecture, layers, ends = CASES[request.param]
    tiny = tinies(architecture)
    found = load(tiny.folder, architecture, layers, ends, tmp_path)
    assert any(parameter.device.type == "meta" for parameter in found.parameters()), "something is offloaded"
    return tiny.hooked, found


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"positions": "all"},
        {"method": "attribution"},
        {"ablation": "mean"},
        {"ablation": "uniform"},
        {"ablation": "patch"},
        {"ablation": "patch", "method": "integrated", "against": "other_user"},
    ],
    ids=str,
)
def test_scores_are_the_same(pair, probe, short, setting):
    options = {"max_examples": 1, "prompt_config": short} | setting
    one, other = (score_pcs(model, probe[:2], **options) for model in pair)
    torch.testing.assert_close(other.values, one.values, rtol=0, atol=1e-5)
    assert one.values.abs().max() > 1e-3


@pytest.mark.parametrize("rule", ["dps", "dola", "amplify"])
def test_steered_texts_are_the_same(pair, probe, rule):
    prompts = [dps.build_prompt(pair[0], user.examples[0]) for user in probe[:2]]
    options = {"heads": SETS, "gamma": [0.7, 1.5], "rule": rule, "max_new_tokens": 6}
    one, other = (dps.generate(model, prompts, **options) for model in pair)
    for row in range(2):
        assert other.tokens[row].tolist() == one.tokens[row].tolist()


def test_checks_pass(pair):
    assert dps.check_model(pair[1])["restart"] < 1e-4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices; they are not here")
def test_two_gpus_give_the_same_scores_and_texts(llama, probe, short, tmp_path):
    split = load(llama.folder, "llama", (0, 1, 1), 0, tmp_path)
    assert {parameter.device.index for parameter in split.parameters()} == {0, 1}
    options = {"max_examples": 1, "prompt_config": short}
    integrated = {"ablation": "patch", "method": "integrated", "against": "other_user"}
    for setting in ({}, {"positions": "all"}, {"method": "attribution"}, {"ablation": "uniform"}, integrated):
        one, other = (score_pcs(m, probe[:2], **options, **setting) for m in (llama.hooked, split))
        torch.testing.assert_close(other.values.cpu(), one.values, rtol=0, atol=1e-3)
    prompts = [dps.build_prompt(llama.hooked, user.examples[0]) for user in probe[:2]]
    out = dps.generate(split, prompts, heads=SETS, gamma=[0.7, 1.5], max_new_tokens=6)
    assert all(bool(values.isfinite().all()) for values in out.logprobs)
