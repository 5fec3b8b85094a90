"""`dps-lens steer --chat`."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dps_lens.cli.requests import STRENGTHS

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
    from dps_lens.steering.rules import check_strength

    options, message = dict(options), ""
    turns: list[tuple[str, str]] = []
    answer_to = partial(_answer, model, chat_template_kwargs)
    typer.echo(HELP, err=True)
    while True:
        line = _read()
        if line is None:
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
            answer = answer_to(message, turns[:-1], unsteered)
            if answer is not None:
                _note(out, message, answer, unsteered)
        elif command.startswith("/"):
            typer.echo(HELP, err=True)
        elif line:
            answer = answer_to(line, turns, options)
            if answer is not None:
                message, turns = line, [*turns, (line, answer)]
                _note(out, line, answer, options)


def check_answers(out: Path) -> None:
    """Refuse to add answers to a file that holds anything else.

    Raises:
        RunError: names the line.
    """
    from dps_lens.errors import RunError

    lines = out.read_bytes().split(b"\n")[:-1] if out.exists() else []
    if out.exists() and out.stat().st_size != sum(len(line) + 1 for line in lines):
        raise RunError(f"{out} ends in the middle of a line; use another file")
    for number, line in enumerate(lines, start=1):
        try:
            known = {"prompt", "text"} <= {*json.loads(line)}
        except (ValueError, TypeError):
            known = False
        if not known:
            raise RunError(f"{out}, line {number} is no answer of --chat; use another file")


_UNSTEERED = {"rule": "greedy", "decode_config": None}


def _read() -> str | None:
    """The next line; None where the input ends."""
    try:
        return input("> ").strip()
    except EOFError:
        return None
    except UnicodeDecodeError:
        typer.echo("that was not UTF-8 text", err=True)
        return ""


def _answer(
    model: "HookedModel",
    chat_template_kwargs: Mapping[str, Any] | None,
    message: str,
    turns: Sequence[tuple[str, str]],
    options: Mapping[str, Any],
) -> str | None:
    """What is answered to a message after earlier turns, shown as it is written; None where that fails."""
    import dps_lens as dps
    from dps_lens.errors import DPSLensError

    try:
        prompt = dps.chat_prompt(model, message, turns, chat_template_kwargs=chat_template_kwargs)
        return _say(dps.generate(model, prompt, **options, stream=True))
    except DPSLensError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        return None


def _note(out: Path | None, message: str, answer: str, options: Mapping[str, Any]) -> None:
    from dps_lens.files import append_line

    if out is not None:
        line = {"prompt": message, "text": answer, **options}
        append_line(out, json.dumps(line, ensure_ascii=False, default=str))


def _say(stream: "TextStream") -> str:
    for _, text in stream:
        typer.echo(text, nl=False)
    typer.echo()
    return str(stream.generation.texts[0])
