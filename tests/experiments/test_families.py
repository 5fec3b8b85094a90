"""The experiments: the control of published detectors against a plain model, and the tables."""

import pandas as pd
import pytest
import torch
from oracles import attention_modules, nll, output_projection
from pcs import score_pcs

import dps_lens as dps
from dps_lens.data import build_prompt
from dps_lens.heads import HeadSet
from dps_lens.model.runners import runner_of
from dps_lens.scoring import single_heads
from experiments.lib.held_out import copying, full, shown
from experiments.lib.output_slices import SliceRun, score_slices
from experiments.lib.tables import cell, markdown
from experiments.q10_steering import at_kls
from experiments.q12_rules import variety, written_at_kl


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
    branches = SliceRun(runner_of(tiny.hooked), prompt)
    got = branches.ablated(single_heads(3, 4))
    expected = [slice_oracle(tiny.plain, prompt, layer, number, 8) for layer in range(3) for number in range(4)]
    assert torch.allclose(got, torch.tensor(expected, dtype=torch.float64), atol=1e-4)
    heads = score_pcs(tiny.hooked, probe[:1], max_examples=1, prompt_config=short)
    slices = score_slices(tiny.hooked, probe[:1], prompt_config=short, max_examples=1)
    assert not torch.allclose(slices.values, heads.values, atol=1e-2), "slices of the output are not heads"


def test_tables_show_what_the_effects_hold(llama, probe, short, tmp_path):
    families = {"a": HeadSet.parse("L1H2,L0H1"), "b": HeadSet.parse("L2H3,L1H0")}
    options = {"ks": (2,), "n_random": 39, "prompt_config": short, "max_examples": 1}
    dps.ablation_curve(llama.hooked, probe[:3], families, out=tmp_path, **options)
    effects = dps.SetEffects.load(tmp_path)
    frame = effects.to_frame().set_index(["family", "k", "measure"])
    lines = markdown(shown(effects)).splitlines()
    assert len(lines) == 2 + 2 * 4, "two families, four measures"
    row = frame.loc[("a", 2, "gain_removed")]
    for name, ends in (("mean", ("low", "high")), ("control", ("control_low", "control_high"))):
        expected = "{:.3f} ({:.3f} to {:.3f})".format(row[name], *(row[end] for end in ends)).replace("-", "−")
        assert f"| {expected} |" in lines[2]
    assert f" {row['p']:.4f} " in lines[2]
    gain = frame.loc[("full model", 0, "gain")]
    assert f"{gain['mean']:.3f}".replace("-", "−") in markdown(full(effects)).splitlines()[-2]
    assert len(shown(effects, ("gain_removed_other",))) == 2
    parts = copying(effects).set_index(["tokens", "family", "measure"])["mean"].unstack("tokens")
    assert len(parts) == 3, "the full model's gain, and what each family takes"
    for family, measure in parts.index:
        (whole,) = effects.to_frame().query("family == @family and measure == @measure")["mean"]
        assert parts.loc[(family, measure)].sum() == pytest.approx(whole), "copied + rest = all"
    assert cell({"mean": -0.5}) == "−0.500"
    assert cell({"mean": float("nan")}) == ""


def test_variety_counts_distinct_and_repeated_n_grams():
    found = variety([1, 2, 3, 1, 2, 3])
    assert found == {"distinct-1": 0.5, "distinct-2": 0.6, "repeated": 0.25, "tokens": 6.0}
    assert variety([7])["repeated"] == 0.0


def test_steering_is_shown_beside_its_control():
    change = {"dps": torch.tensor([[-0.1, -0.3]]).double(), "dps (random)": torch.tensor([[0.0, 0.1]]).double()}
    kl = {name: torch.full((1, 2), 0.4).double() for name in change}
    sweep = dps.SteeringSweep((1.0,), ("a", "b"), ("a", "b"), torch.zeros(2).double(), change, kl)
    lines = [line for line in markdown(at_kls(sweep, (0.02, 0.1))).splitlines() if line.startswith("| dps |")]
    assert lines[0].startswith("| dps | 0.020 | 0.224 | −0.045 ")
    assert "| −0.100 (−0.735 to 0.535) | −0.125 (" in lines[1], (
        "a quarter of the KL is half of the way; then against random"
    )
    assert "−0.200 (" in markdown(sweep.to_frame())


def test_written_texts_meet_at_equal_kl():
    rows = [("greedy", 0.0, 0.1, 0.0)]
    rows += [("dps, Preference Heads", s, 0.1 + 0.1 * s, 0.36 * s**2) for s in (0.5, 1.0, 2.0)]
    rows += [("dps, random", s, 0.1, 0.36 * s**2) for s in (0.5, 1.0, 2.0)]
    rows += [("dola", 1.0, 0.5, 0.1)]
    names = ("method", "strength", "ROUGE-L", "KL", "user", "example")
    frame = pd.DataFrame([(*row, user, f"{user}1") for row in rows for user in "ab"], columns=names)
    found = written_at_kl(frame, (0.1,))
    ours = "dps, Preference Heads"
    assert found["method"].tolist() == [ours, f"{ours} (random)"], (
        "random heads are the control, and one strength alone is not compared"
    )
    # KL 0.1 lies at strength 0.527, where ROUGE-L is up by 0.053.
    assert "0.053 (0.053 to 0.053) | 0.053 (" in markdown(found).splitlines()[2]
