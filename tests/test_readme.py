"""What the README shows runs as written."""

import re
from pathlib import Path

import pytest

from dps_lens.cli import app

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.real
def test_the_notebook_session_runs(real, tmp_path, monkeypatch):
    import dps_lens as dps

    session = re.search(r"## In a notebook\n+```python\n(.*?)```", README, re.DOTALL)[1]
    assert len([line for line in session.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dps, "load_model", lambda: real, raising=False)
    names: dict = {}
    exec(compile(session, "README.md", "exec"), names)
    assert names["scores"].users == tuple(user.id for user in names["users"])
    assert (tmp_path / "runs" / "quick" / "scores.json").is_file()


def test_every_command_and_option_exists():
    import typer

    commands = typer.main.get_command(app).commands
    shown = re.findall(r"^dps-lens (\w+)(.*)$", README, re.MULTILINE)
    assert {name for name, _ in shown} == {*commands}
    for name, rest in shown:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"(--[\w-]+)", rest)) <= known
