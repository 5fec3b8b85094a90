"""The experiments: the control of published detectors against a plain model, and the tables."""

import pandas as pd
import pytest
import torch
from oracles import attention_modules, nll, output_projection

import dps_lens as dps
from dps_lens.analysis import SteeringSweep
from dps_lens.data import build_prompt
from dps_lens.heads import HeadSet
from dps_lens.model import Runner
from dps_lens.scoring import single_heads
from experiments import tables
from experiments.output_slices import SliceBranches, score_slices
from experiments.steering import at_equal_kl, at_strengths, variety, written_at_kl


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


def test_tables_show_what_the_effects_hold(llama, probe, short, tmp_path):
    families = {"a": HeadSet.parse("L1H2,L0H1"), "b": HeadSet.parse("L2H3,L1H0")}
    options = {"ks": (2,), "n_random": 20, "prompt": short, "progress": False, "max_examples": 1}
    effects = dps.ablation_curve(llama.hooked, probe[:3], families, out=tmp_path, **options)
    shown = tables.Effects(tmp_path)
    frame = effects.to_frame().set_index(["family", "k", "measure"])
    lines = shown.families().splitlines()
    assert len(lines) == 4
    row = frame.loc[("a", 2, "taken")]
    expected = f"{row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f})".replace("-", "−")
    assert expected in lines[2]
    assert f" {row['p']:.2f} " in lines[2]
    gain = frame.loc[("full model", 0, "gain")]
    assert f"{gain['mean']:.3f}".replace("-", "−") in shown.full()
    assert len(shown.other(2).splitlines()) == 4
    assert len(shown.copying(2).splitlines()) == 5
    assert tables.cell({"mean": -0.5}) == "−0.500"
    assert tables.cell({"mean": float("nan")}) == ""


def test_variety_counts_distinct_and_repeated_n_grams():
    found = variety([1, 2, 3, 1, 2, 3])
    assert found == {"distinct-1": 0.5, "distinct-2": 0.6, "repeated": 0.25, "tokens": 6.0}
    assert variety([7])["repeated"] == 0.0


def test_steering_is_shown_beside_its_control():
    change = {"dps": torch.tensor([[-0.1, -0.3]]).double(), "dps (random)": torch.tensor([[0.0, 0.1]]).double()}
    kl = {name: torch.full((1, 2), 0.4).double() for name in change}
    sweep = SteeringSweep((1.0,), ("a", "b"), ("a", "b"), torch.zeros(2).double(), change, kl)
    (line,) = at_equal_kl(sweep).splitlines()[2:]
    assert line.startswith("| dps | −0.045 ")
    assert "| −0.100 (−0.735 to 0.535) | −0.125 (" in line, (
        "a quarter of the KL is half of the way; then against random"
    )
    assert "−0.200 (" in at_strengths(sweep)


def test_written_texts_meet_at_equal_kl():
    rows = [("greedy", 0.0, 0.1, 0.0)]
    rows += [("dps, Preference Heads", s, 0.1 + 0.1 * s, 0.36 * s**2) for s in (0.5, 1.0, 2.0)]
    rows += [("dps, random", s, 0.1, 0.36 * s**2) for s in (0.5, 1.0, 2.0)]
    rows += [("dola", 1.0, 0.5, 0.1)]
    names = ("method", "strength", "ROUGE-L", "KL", "user", "example")
    frame = pd.DataFrame([(*row, user, f"{user}1") for row in rows for user in "ab"], columns=names)
    first, random = written_at_kl(frame).splitlines()[2:], "dps, random"
    assert len(first) == 1, "random heads are the control, and one strength alone is not compared"
    assert random not in first[0]
    # KL 0.1 lies at strength 0.527, where ROUGE-L is up by 0.053.
    assert "0.053 (0.053 to 0.053) | 0.053 (" in first[0]
