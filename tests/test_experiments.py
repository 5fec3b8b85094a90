"""The control of published detectors against a plain model whose output projections lose coordinates."""

import pytest
import torch
from oracles import attention_modules, nll, output_projection

import dps_lens as dps
from dps_lens.data import build_prompt
from dps_lens.model import Runner
from dps_lens.scoring import single_heads
from experiments.output_slices import SliceBranches, score_slices


def slice_oracle(plain, prompt, layer, number, width):
    """NLL with a slice of the projection's output zeroed from the last prompt token on."""
    start = prompt.spans["response"][0]

    def cut(module, arguments, output):
        output = output.clone()
        output[:, start - 1 :, number * width : (number + 1) * width] = 0
        return output

    handle = output_projection(attention_modules(plain)[layer]).register_forward_hook(cut)
    value = nll(plain, prompt)
    handle.remove()
    return value


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_output_slices_equal_the_plain_model(tinies, architecture, probe, short):
    tiny = tinies(architecture)
    prompt = build_prompt(tiny.hooked, probe[0].examples[-1], config=short)
    branches = SliceBranches(Runner.of(tiny.hooked), prompt)
    got = branches.ablated(single_heads(3, 4))
    expected = [slice_oracle(tiny.plain, prompt, layer, number, 8) for layer in range(3) for number in range(4)]
    assert torch.allclose(got, torch.tensor(expected, dtype=torch.float64), atol=1e-4)
    heads = dps.score_heads(tiny.hooked, probe[:1], max_examples=1, prompt=short, progress=False)
    slices = score_slices(tiny.hooked, probe[:1], prompt=short, max_examples=1, out=None)
    assert not torch.allclose(slices.values, heads.values, atol=1e-2), "slices of the output are not heads"
