"""benchmarks/gpu.py, shown on a CPU with a tiny shape: every section answers, one that fails stops no other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def ran(tmp_path, *options):
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--shape", "tiny", "--prompt", "48"]
    command += ["--tokens", "4", "--users", "1", "2", "--repeats", "1", "--out", str(tmp_path / "gpu.json"), *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return ended, json.loads((tmp_path / "gpu.json").read_text())


@pytest.mark.full
def test_every_section_answers(tmp_path):
    ended, report = ran(tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert list(report["sections"]) == ["tests", "floors", "decoding", "compiled decoding", "sweeps"]
    assert not [one["error"] for one in report["sections"].values() if "error" in one]
    rows = {row["name"]: row for one in report["sections"].values() for row in one["rows"]}
    for name in ("dps, 1 user", "dps, 2 users, compiled", "exact PCS, all heads", "integrated scores"):
        assert rows[name]["value"] > 0
        assert f"| {name} |" in ended.stdout
    assert rows["exact PCS, all heads"]["of the floor"] > 1
    assert rows["dps, 2 users, compiled"]["tokens as uncompiled"] == 1


@pytest.mark.full
def test_a_section_that_fails_is_named(tmp_path):
    ended, report = ran(tmp_path, "--only", "floors", "sweeps", "--tokenizer", "no such model")
    assert ended.returncode == 1, "what failed is not hidden"
    assert "rows" in report["sections"]["floors"]
    assert "no such model" in report["sections"]["sweeps"]["error"]
    assert "| sweeps | failed: " in ended.stdout
