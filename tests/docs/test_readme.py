"""What the README shows runs as written."""

import re
from pathlib import Path

from dps_lens.cli import app

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_notebook_session_runs(llama, tmp_path, monkeypatch):
    """On a small model; the notebooks run on the one that the package brings."""
    import dps_lens as dps

    session = re.search(r"## In a notebook\n+```python\n(.*?)```", README, re.DOTALL)[1]
    assert len([line for line in session.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dps, "load_model", lambda: llama.hooked, raising=False)
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
        command = commands[name]
        if hasattr(command, "commands"):
            command = command.commands[rest.split()[0]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"(--[\w-]+)", rest)) <= known
