"""A contrast that holds the whole context is greedy decoding."""

import numpy as np
import yaml

from experiments.lib.harness import Lab
from experiments.q07_artefact import Artefact, leaking


def test_a_leaking_contrast_changes_nothing(tiny_folders, probe, tmp_path):
    prompt = {"items": 2, "profile_tokens": 60, "task_tokens": 20, "response_tokens": 4}
    config = Artefact(**yaml.safe_load(yaml.safe_dump({"model": str(tiny_folders["llama"]), "prompt": prompt})))
    found = leaking(probe[:3], config, Lab(config, tmp_path))
    change, kl = found["all", 1.0]
    assert np.allclose(change, 0)
    assert np.allclose(kl, 0)
    assert (found["none", 1.0][1] > found["half", 1.0][1]).mean() > 0.5
    assert (found["none", 1.0][1] > 1e-3).all()
