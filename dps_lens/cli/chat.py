"""`dps-lens steer --chat`."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dps_lens.cli.requests import STRENGTHS, append_line

if TYPE_CHECKING:
    from dps_lens.model import HookedModel
    from dps_lens.steering import TextStream

HELP = "/plain answers the last message unsteered, /gamma 2 and /alpha 1 set strengths, /new starts over, /quit ends."


def chat(
    model: "HookedModel",
    options: Mapping[str, Any],
    out: Path | None = None,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Read messages until the input ends; answers come as they are written.

    Args:
        model: a hooked model.
        options: of `dps_lens.generate`.
        out: gets a JSON line for every answer, with its settings.
        chat_template_kwargs: for the chat template.
    """
    import dps_lens as dps
    from dps_lens.errors import DPSLensError
    from dps_lens.steering.rules import check_strength

    options, message = dict(options), ""
    turns: list[tuple[str, str]] = []
    ask = partial(dps.chat_prompt, model, chat_template_kwargs=chat_template_kwargs)
    typer.echo(HELP, err=True)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        command, _, value = line.partition(" ")
        name = command.removeprefix("/")
        if command == "/quit":
            return
        if command == "/new":
            turns, message = [], ""
        elif command.startswith("/") and name in STRENGTHS:
            try:
                check_strength(name, float(value))
                options[name] = float(value)
            except ValueError:  # SteeringError is one
                typer.echo(f"{command} needs a number, such as {command} 1.5", err=True)
        elif command == "/plain":
            if not message:
                typer.echo("there is no message yet", err=True)
                continue
            unsteered = options | _UNSTEERED
            stream = dps.generate(model, ask(message, turns[:-1]), **unsteered, stream=True)
            _note(out, message, _say(stream), unsteered)
        elif command.startswith("/"):
            typer.echo(HELP, err=True)
        elif line:
            try:
                stream = dps.generate(model, ask(line, turns), **options, stream=True)
            except DPSLensError as error:
                typer.secho(f"error: {error}", fg="red", err=True)
                continue
            message = line
            turns = [*turns, (line, _say(stream))]
            _note(out, line, turns[-1][1], options)


_UNSTEERED = {"rule": "greedy", "decode_config": None}


def _note(out: Path | None, message: str, answer: str, options: Mapping[str, Any]) -> None:
    if out is not None:
        line = {"prompt": message, "text": answer, **options}
        append_line(out, json.dumps(line, ensure_ascii=False, default=str))


def _say(stream: "TextStream") -> str:
    for _, text in stream:
        typer.echo(text, nl=False)
    typer.echo()
    return str(stream.generation.texts[0])
