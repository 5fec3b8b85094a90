"""The lines of Python, and of a shell, that answer what a live page was asked."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from dps_lens.data import PromptConfig, User
from dps_lens.digests import json_digest
from dps_lens.heads import HeadSet

_IMPORTS = "from dataclasses import replace\n\nimport torch\n\nimport dps_lens as dps"


@dataclass(frozen=True)
class Origin:
    """Where the model and the users of a page come from.

    Attributes:
        python: lines that make `model` and `users`, and `vectors` where there are some.
        options: of commands that load the same model and the same users; None where none does.
    """

    python: str = "# model and users: those that the page was made of"
    options: Sequence[str] | None = None


def as_python(origin: Origin, asked: str, call: str) -> str:
    """A whole program, of what makes the model and the users, what is asked, and the call that answers."""
    return f"{_IMPORTS}\n\n{origin.python}\n{asked}\n{call}\n"


def as_command(origin: Origin, name: str, user: User, options: Sequence[object], config: PromptConfig) -> str:
    """A command about a user's newest evaluation example; empty where none loads the same."""
    if origin.options is None or config != PromptConfig():
        return ""
    return shlex.join(["dps-lens", name, *map(str, options), "--only", user.id, *origin.options])


def config_as_python(config: PromptConfig) -> str:
    """The settings of prompts that are not the usual ones."""
    usual = PromptConfig()
    changed = {name: value for name, value in vars(config).items() if value != getattr(usual, name)}
    return f"dps.PromptConfig({', '.join(f'{name}={value!r}' for name, value in changed.items())})"


def generate_as_python(config: PromptConfig, rule: str, gamma: float, length: int, given: str) -> str:
    """The call that writes a text of `example`; `given` are arguments of it, each with its comma."""
    return (
        f"prompt = dps.build_prompt(model, example, config={config_as_python(config)}, response=False)\n"
        f"written = dps.generate(\n    model, prompt, {given}rule={rule!r}, gamma={gamma!r}, "
        f"max_new_tokens={length}\n)\n"
        "print(written.texts[0])"
    )


def run_folder(name: str, *asked: object) -> str:
    """Where a command keeps its run: another folder for each question."""
    return f"runs/{name}-{json_digest([*map(str, asked)])[:8]}"


def steer_options(heads: HeadSet, rule: str, gamma: float, length: int) -> tuple[object, ...]:
    """Of `dps-lens steer`, to write the same."""
    return ("--heads", heads, "--rule", rule, "--gamma", gamma, "--max-new-tokens", length)


def example_as_python(user: str, example: str) -> str:
    """Lines that look up a user of `users` as `asker`, and an example of the user."""
    return (
        f"asker = next(one for one in users if one.id == {user!r})\n"
        f"example = next(one for one in asker.examples if one.id == {example!r})"
    )
