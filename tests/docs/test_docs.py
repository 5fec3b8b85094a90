"""The documentation names everything, and its figures are those of the library."""

import re
from importlib import import_module
from pathlib import Path

import dps_lens as dps

DOCS = Path(__file__).parents[2] / "docs"


def documented() -> set[int]:
    names = re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    return {id(getattr(import_module(name.rpartition(".")[0]), name.rpartition(".")[2])) for name in names}


def test_every_public_name_is_in_the_reference():
    found = documented()
    missing = [name for name in dps.__all__ if name != "plots" and id(getattr(dps, name)) not in found]
    missing += [name for name in dps.plots.__all__ if name != "TEMPLATE" and id(getattr(dps.plots, name)) not in found]
    assert not missing


def test_the_how_to_names_real_figures_commands_and_options():
    import typer

    from dps_lens.cli import app

    text = (DOCS / "howto.md").read_text(encoding="utf-8")
    for name in re.findall(r"plots\.(\w+)\(", text):
        assert name in dps.plots.__all__
    commands = typer.main.get_command(app).commands
    for name, rest in re.findall(r"^dps-lens (\w+)(.*)$", text, re.MULTILINE):
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"(--[\w-]+)", rest)) <= known
