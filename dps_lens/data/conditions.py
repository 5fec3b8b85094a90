"""The prompts that an example is read in: with the own profile, without one, with other users'."""

import random
from collections.abc import Sequence

import torch

from dps_lens.data.examples import unit_key
from dps_lens.data.prompts import Prompt, PromptConfig, build_prompt
from dps_lens.data.records import Example, User
from dps_lens.data.same import normalised
from dps_lens.data.tokenizer import PromptTokenizer
from dps_lens.errors import ScoreError
from dps_lens.model import HookedModel

DONORS = 2
"""Other users whose profiles stand in for the own one, where nobody asks for another number; see docs/finders.md."""

_NEUTRAL_PROMPT, _NEUTRAL_RESPONSE = 16, 48


def donors_of(example: Example, users: Sequence[User], n: int, seed: int) -> list[User]:
    """At most `n` other users whose profiles stand in for the example's own.

    The same for every run with this seed, in whatever order the users come. Where there is anybody else, none of them
    wrote what the example rejects: a profile by the same author would favour it.
    """
    others = sorted((user for user in users if user.id != example.user_id), key=lambda user: user.id)
    if example.rejected:
        rejected = {*map(normalised, example.rejected)}
        others = [user for user in others if not user.pool.held & rejected] or others
    return random.Random(f"{seed}|{unit_key(example)}").sample(others, min(n, len(others)))


def prompts_in(
    model: HookedModel,
    example: Example,
    condition: str,
    users: Sequence[User],
    *,
    n_donors: int = 1,
    seed: int = 0,
    config: PromptConfig | None = None,
) -> list[Prompt]:
    """The prompts of an example in a condition: one, or one a donor; none where there is no other user."""
    if condition == "own":
        return [build_prompt(model, example, "own", config=config)]
    if condition == "no_profile":
        return [build_prompt(model, example, "none", config=config)]
    return [build_prompt(model, example, donor, config=config) for donor in donors_of(example, users, n_donors, seed)]


def check_same_answers(prompts: Sequence[Prompt]) -> None:
    """Refuse prompts of one example whose answers are not the same tokens.

    Raises:
        ScoreError: names the example.
    """
    if len({tuple(tuple(one.response_tokens.tolist()) for one in prompt.answers) for prompt in prompts}) != 1:
        raise ScoreError(f"example {prompts[0].example_id!r}: the response differs between conditions")


def neutral_prompt(model: HookedModel, text: str) -> Prompt:
    """A text outside any chat: its first tokens as prompt, the next ones as response."""
    ids = PromptTokenizer(model).plain(text)
    if len(ids) < _NEUTRAL_PROMPT + 2:
        raise ScoreError(
            f"a neutral text needs more than {_NEUTRAL_PROMPT + 1} tokens, found {len(ids)}: {text[:40]!r}"
        )
    start, stop = _NEUTRAL_PROMPT, min(len(ids), _NEUTRAL_PROMPT + _NEUTRAL_RESPONSE)
    spans = {"profile": (0, 0), "task": (0, start), "response": (start, stop)}
    return Prompt(torch.tensor(ids[:stop]), spans, text, "none", text[:40], "", ())
