"""Steered texts that a live page writes, piece by piece."""

import math
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from dps_lens.checks import check_number, check_whole
from dps_lens.data import Example, Prompt, PromptConfig, User, build_prompt
from dps_lens.data.examples import unit_key
from dps_lens.errors import SteeringError
from dps_lens.explorer.code import (
    Origin,
    as_command,
    as_python,
    example_as_python,
    generate_as_python,
    steer_options,
)
from dps_lens.explorer.content import ranked_for
from dps_lens.explorer.page import Exploration
from dps_lens.heads import HeadSet
from dps_lens.model import HookedModel
from dps_lens.steering import DecodeConfig, Generation, generate

_ALTERNATIVES = 3


class Writer:
    """Writes texts of the page's examples, one at a time."""

    def __init__(
        self, model: HookedModel, users: Sequence[User], found: Exploration, origin: Origin | None = None
    ) -> None:
        self.model, self.grid, self.origin = model, found.grid, origin or Origin()
        self._users = {user.id: user for user in users}
        assert self.grid is not None
        asked = {one.key for one in self.grid.texts}
        shown = [one for user in users for one in user.examples if unit_key(one) in asked]
        self.examples = {(one.user_id, one.id): one for one in shown}
        owners = {one.user_id for one in self.examples.values()}
        self._heads = ranked_for(found, [user for user in users if user.id in owners])
        self.config = PromptConfig(**self.grid.manifest["prompt_config"])

    @property
    def most(self) -> dict[str, int]:
        """Heads that there are for each user."""
        return {user: len(heads) for user, heads in self._heads.items()}

    def asked(self, request: object) -> tuple[Example, HeadSet, float]:
        """Example, heads and γ of a request.

        Raises:
            SteeringError: a field is missing or wrong; names it.
        """
        if not isinstance(request, dict):
            raise SteeringError("steer: send a JSON object with user, example, gamma and k")
        user, name, gamma, k = (request.get(field) for field in ("user", "example", "gamma", "k"))
        example = self.examples.get((str(user), str(name)))
        if example is None:
            raise SteeringError(f"steer: example {name!r:.80} of user {user!r:.80} is not on this page")
        strength = check_number(SteeringError, "steer: gamma", gamma, least=-1, most=1000)
        heads = self._heads[example.user_id]
        return example, heads[: check_whole(SteeringError, "steer: k", k, least=1, most=len(heads))], strength

    def write(self, example: Example, heads: HeadSet, gamma: float) -> Iterator[dict[str, Any]]:
        """`{"heads": …}`, `{"text": …}` piece by piece, then `{"done": …}`; closing it ends the text.

        Between pieces the model is free for other calls of this thread; where another thread is using it, an error is
        raised.
        """
        assert self.grid is not None
        yield {"heads": str(heads) if gamma else ""}
        prompt = build_prompt(self.model, example, config=self.config)
        rule, length = self.grid.manifest["rule"], self.grid.manifest["max_new_tokens"]
        written = yield from streamed(self.model, prompt, heads=heads, gamma=gamma, rule=rule, max_new_tokens=length)
        asked = f"{example_as_python(example.user_id, example.id)}\nheads = dps.HeadSet.parse({str(heads)!r})"
        call = generate_as_python(self.config, rule, gamma, length, "heads=heads, ")
        options, user = steer_options(heads, rule, gamma, length), self._users[example.user_id]
        command = as_command(self.origin, "steer", user, options, self.config) if user.examples[-1] is example else ""
        yield {
            "done": {"gamma": gamma, "k": len(heads), **written_tokens(written)},
            "python": as_python(self.origin, asked, call),
            "command": command,
        }


def streamed(model: HookedModel, prompt: Prompt, **options: Any) -> Generator[dict[str, Any], None, Generation]:
    """`{"text": …}` piece by piece, as `generate` writes it; returns the whole."""
    stream = generate(
        model, prompt, decode_config=DecodeConfig(keep_alternatives=_ALTERNATIVES), stream=True, **options
    )
    for _, text in stream:
        yield {"text": text}
    return stream.generation


def written_tokens(written: Generation) -> dict[str, Any]:
    """The tokens of the first text, what steering did to each, and what it moved there."""
    return {
        "pieces": written.pieces[0],
        "shifts": _numbers(written.shifts[0].tolist()),
        "kl": _numbers(written.kl[0].tolist()),
        "alternatives": written.alternatives[0] if written.alternatives else [],
        "scores": {},
    }


def _numbers(values: Sequence[float]) -> list[float | None]:
    """JSON knows no NaN."""
    return [None if math.isnan(value) else value for value in values]
