"""What a live page can be asked, and how a request is read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dps_lens.checks import check_number, check_whole
from dps_lens.data import Document, Example, User
from dps_lens.data.tasks import TASKS
from dps_lens.errors import DPSLensError, SteeringError
from dps_lens.explorer.code import example_as_python
from dps_lens.heads import HeadSet
from dps_lens.model import ModelConfig
from dps_lens.steering.rules import RULES

ABLATED_BY = ("zero", "uniform")
STEERED_BY = tuple(
    name for name, rule in RULES.items() if rule.takes_gamma and not rule.needs_vectors and not rule.patched
)
ADDED_BY = ("head_vector", "head_vector+dps")
PASTED = "you"
"""The user whose documents were pasted."""

_MOST_LETTERS, _MOST_TOKENS, _MOST_GAMMA = 100_000, 512, 1000


class Refused(SteeringError):
    """A question that cannot be answered.

    Attributes:
        field: of the form, that is to be mended.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        users: as `ablation_cost` takes them: the asker with one evaluation example, the others with none.
        example: that is asked about; its reference is empty where no text is to be measured.
        heads: that are ablated, patched or steered with.
        ablation: what is done to them.
        rule: of `generate`, to write with.
        gamma: its strength.
        length: of a written text, in tokens.
        code: lines of Python that make `users`, `example` and `heads`.
        newest: of the page's users, who asks, where it is the user's newest evaluation example that is asked about.
    """

    users: tuple[User, ...]
    example: Example
    heads: HeadSet
    ablation: str
    rule: str
    gamma: float
    length: int
    code: str
    newest: User | None


def read_question(
    request: object, users: Sequence[User], cfg: ModelConfig, rules: Sequence[str] = STEERED_BY
) -> Question:
    """A request, checked.

    Args:
        request: what JSON gave.
        users: of the page.
        cfg: of the model.
        rules: that a text can be written by.

    Raises:
        Refused: names the field that is missing or wrong.
    """
    if not isinstance(request, dict):
        raise Refused("prompt", "send a JSON object")
    texts = {name: _text(request, name) for name in ("user", "prompt", "text", "documents", "heads")}
    heads = _heads(texts["heads"], cfg)
    ablation, rule = _one_of(request, "ablation", ABLATED_BY), _one_of(request, "rule", rules)
    gamma = _number(request, "gamma")
    length = request.get("length", 32)
    try:
        check_whole(SteeringError, "length", length, least=1, most=_MOST_TOKENS)
    except SteeringError as error:
        raise Refused("length", str(error).removeprefix("length ")) from error
    if not texts["prompt"].strip():
        raise Refused("prompt", "is empty; write what the model is asked")
    asked, example, code = _asked(texts, users)
    code += f"\nheads = dps.HeadSet.parse({str(heads)!r})"
    newest = next((one for one in users if one.examples and one.examples[-1] is example), None)
    return Question(asked, example, heads, ablation, rule, gamma, length, code, newest)


def _heads(names: str, cfg: ModelConfig) -> HeadSet:
    try:
        heads = HeadSet.parse(names)
        heads.mask(cfg)
    except DPSLensError as error:
        raise Refused("heads", str(error)) from error
    if not len(heads):
        raise Refused("heads", "none are named; click cells of the map, or write names such as L12H3,L4H0")
    return heads


def _asked(texts: Mapping[str, str], known: Sequence[User]) -> tuple[tuple[User, ...], Example, str]:
    """The users of a call, the example, and lines that make them."""
    prompt, text = texts["prompt"].strip(), texts["text"].strip()
    if texts["user"]:
        asker = next((one for one in known if one.id == texts["user"]), None)
        if asker is None:
            raise Refused("user", f"{texts['user']!r:.80} is not on this page")
        users = tuple(known)
        same = (one for one in asker.examples if (one.input.strip(), one.reference.strip()) == (prompt, text))
        example = next(same, None)
        if example is not None:
            code = example_as_python(asker.id, example.id)
        else:
            example = Example("asked", asker.id, asker.task, prompt, text, asker.history)
            code = (
                f"asker = next(one for one in users if one.id == {asker.id!r})\n"
                f'example = dps.Example("asked", asker.id, asker.task, {prompt!r}, {text!r}, asker.history)'
            )
    else:
        documents = [part.strip() for part in re.split(r"\n\s*\n", texts["documents"]) if part.strip()]
        history = tuple(Document(str(place), {"text": one}) for place, one in enumerate(documents))
        example = Example("asked", PASTED, TASKS["questions"], prompt, text, history)
        if not len(example.showable):
            raise Refused("documents", "hold nothing but what is asked; paste earlier texts, blank lines between them")
        users = (User(PASTED, TASKS["questions"], history, (example,)),)
        code = (
            "from dps_lens.data.tasks import TASKS\n\n"
            f"texts = {documents!r}\n"
            'history = tuple(dps.Document(str(place), {"text": one}) for place, one in enumerate(texts))\n'
            f'example = dps.Example("asked", {PASTED!r}, TASKS["questions"], {prompt!r}, {text!r}, history)\n'
            f'users = [dps.User({PASTED!r}, TASKS["questions"], history, (example,))]'
        )
    users = tuple(replace(one, examples=(example,) if one.id == example.user_id else ()) for one in users)
    code += "\nasked = [replace(one, examples=(example,) if one.id == example.user_id else ()) for one in users]"
    return users, example, code


def _text(request: Mapping[str, Any], name: str) -> str:
    value = request.get(name, "")
    if not isinstance(value, str):
        raise Refused(name, "is not a text")
    if len(value) > _MOST_LETTERS:
        raise Refused(name, f"has {len(value)} letters; at most {_MOST_LETTERS} are taken")
    return value


def _one_of(request: Mapping[str, Any], name: str, known: Sequence[str]) -> str:
    value = request.get(name, known[0])
    if value not in known:
        raise Refused(name, f"{value!r:.80} is unknown; use one of {', '.join(known)}")
    return str(value)


def _number(request: Mapping[str, Any], name: str) -> float:
    try:
        return check_number(SteeringError, name, request.get(name, 1.0), least=-1, most=_MOST_GAMMA)
    except SteeringError as error:
        raise Refused(name, str(error).removeprefix(f"{name} ")) from error
