"""Objects by import path, and what fingerprints hold of them."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from pcs import score_pcs

import dps_lens as dps
from dps_lens.errors import ExtensionError, RunError, ScoreError
from dps_lens.evaluation.metrics import find_metrics
from dps_lens.extensions import is_path, load_object, loaded_files, settings_of
from dps_lens.steering.rules import find_rule

HALVE = """
from dataclasses import dataclass
from typing import ClassVar

import dps_lens as dps
from beside import HALF

@dataclass(frozen=True)
class Halve(dps.Ablation):
    name: ClassVar[str] = "halve"
    share: float = HALF

    def replace(self, activation, values):
        return self.share * activation
"""


@pytest.fixture
def halve(tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text("HALF = 0.5\n")
    file = tmp_path / "random.py"  # as a module of the standard library is called
    file.write_text(HALVE)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    return file


@dataclass(frozen=True)
class Weighed(dps.Objective):
    name: ClassVar[str] = "weighed"
    weight: float = 1.0

    def losses(self, logits, targets, clean):
        return -self.weight * logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


class Flat(dps.Objective):
    name = "flat"

    def losses(self, logits, targets, clean):
        return (logits - clean).square().sum(-1)


@dataclass(frozen=True)
class Powered(dps.Term):
    power: int = 1


def test_a_path_names_an_object(halve, tmp_path):
    found = load_object(f"{halve}:Halve(share=0.25)", dps.Ablation)
    assert (found.name, found.share) == ("halve", 0.25)
    assert load_object(f"{halve}:Halve").share == 0.5
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "random.py").write_text(HALVE.replace('"halve"', '"other"'))
    assert load_object(f"{tmp_path}/other/random.py:Halve").name == "other", "another file of the same name"
    assert len({module.__name__ for module in loaded_files()}) == len(loaded_files())
    assert load_object("dps_lens.intervene:Zero", dps.Ablation) == dps.Zero()


def test_paths_that_lead_nowhere_say_so(halve, tmp_path):
    (tmp_path / "broken.py").write_text("raise ValueError('out of luck')")
    for text, message in (
        ("nowhere.py:Halve", "there is no file nowhere.py"),
        (f"{halve}:Nothing", "cannot be loaded .AttributeError"),
        (f"{tmp_path}/broken.py:X", "out of luck"),
        (f"{halve}:Halve(3)", "no keyword arguments"),
        ("halve", "is no import path"),
    ):
        for _ in range(2):
            with pytest.raises(ExtensionError, match=message):
                load_object(text)
    with pytest.raises(ExtensionError, match="is a Halve, asked for is a Metric"):
        load_object(f"{halve}:Halve", dps.Metric)
    assert not is_path("dps+cad")
    assert not is_path("dps:induction")
    assert is_path("my files/a.py:Rule")


def test_settings_tell_objects_apart():
    assert settings_of("zero", dps.Zero()) == "zero"
    one, other = (dps.Mean(z=torch.full((1, 1, 2), value)).settings() for value in (0.0, 1.0))
    assert one["name"] == other["name"] == "mean"
    assert one != other
    assert dps.Mean().settings() == "mean"
    assert find_rule("dps+cad").settings() == "dps+cad"
    rules = [find_rule(term).settings() for term in (dps.Term("ablated"), Powered(), Powered(power=2))]
    assert all(one not in rules[:place] for place, one in enumerate(rules))


def test_a_run_of_another_objective_is_refused(llama, probe, short, tmp_path):
    options = {"max_examples": 1, "prompt_config": short}
    once = score_pcs(llama.hooked, probe[:1], objective=Weighed(1.0), out=tmp_path, **options)
    with pytest.raises(RunError, match="objective.weight was 1.0, now 7.0"):
        score_pcs(llama.hooked, probe[:1], objective=Weighed(7.0), out=tmp_path, **options)
    twice = score_pcs(llama.hooked, probe[:1], objective=Weighed(2.0), **options)
    assert torch.allclose(twice.values, 2 * once.values, atol=1e-5)


def test_heads_are_tested_by_the_objective_that_found_them(llama, probe, short):
    options = {"max_examples": 1, "prompt_config": short}
    # Users of other folds rank for the one that is tested.
    scores = score_pcs(llama.hooked, probe[:6], objective=Weighed(2.0), **options)
    test = {"ks": (1,), "n_random": 0, "max_examples": 1}
    with pytest.raises(ScoreError, match="scored with the objective .*weighed.*give that object"):
        dps.ablation_curve(llama.hooked, probe[:6], {"p": scores}, **test)
    asked = dps.HeldOutConfig(objective=Weighed(2.0))
    effects = dps.ablation_curve(llama.hooked, probe[:6], {"p": scores}, held_out_config=asked, **test)
    assert "weighed, own" in set(effects.to_frame()["measure"])
    assert "changes of 'weighed'" in effects.verdict()
    methods, short_texts = {"dps": ("dps", scores)}, {"ks": (1,), "max_examples": 1, "max_new_tokens": 2}
    fixed = dps.EvaluateConfig(choose_on=0)
    table = dps.evaluate(llama.hooked, probe[:6], methods, strengths=(1.0,), evaluate_config=fixed, **short_texts)
    assert table.manifest["prompt_config"] == short.to_dict(), "what is not measured there may be anything"
    heads = {"p": {user: sets for user, sets in effects.sets().items()}}
    usual = dps.ablation_curve(llama.hooked, probe[:6], heads, prompt_config=short, **test)
    assert torch.allclose(effects.chosen["own"], 2 * usual.chosen["own"], atol=1e-5)


def test_a_flat_objective_has_no_estimate(llama, probe, short):
    for method in ("attribution", "screened"):
        with pytest.raises(ScoreError, match="'flat' is flat at the full model"):
            score_pcs(llama.hooked, probe[:1], objective=Flat(), method=method, max_examples=1, prompt_config=short)


def test_a_metric_with_a_summary_is_registered():
    with pytest.raises(dps.DPSLensError, match="register it"):
        find_metrics([dps.Metric("median", None, summary=lambda rows, task: 0.0)])
