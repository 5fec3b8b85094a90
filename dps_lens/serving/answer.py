"""What is told of a request while it is written."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from dps_lens.steering.continuous import Writing


@dataclass(frozen=True)
class Token:
    """A token that was written.

    Attributes:
        text: its own text.
        logprob: under the steered distribution, before temperature.
        shift: the same minus its log-probability under the full model; None where that did not run.
        kl: KL(steered ‖ full) at this step, nats; None likewise.
        likeliest: `(text, logprob)` of the likeliest tokens.
    """

    text: str
    logprob: float
    shift: float | None
    kl: float | None
    likeliest: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Started:
    """The request is in the batch; its prompt has so many tokens."""

    prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """More of a text.

    Attributes:
        index: which text of the request.
        text: what came in; empty while a character or a stop text is incomplete.
        tokens: that were written.
        finish: why it ended: `"stop"` or `"length"`; None while it goes on.
    """

    index: int
    text: str
    tokens: tuple[Token, ...]
    finish: str | None = None


@dataclass(frozen=True)
class Failed:
    """The request ended before its time."""

    error: Exception


@dataclass(frozen=True)
class Done:
    """Every text has ended."""


Event = Started | Piece | Failed | Done


@dataclass
class StopTexts:
    """Ends a text before the first stop text in it, and holds back what may be the beginning of one.

    >>> stop = StopTexts(["END"])
    >>> stop.feed("one E"), stop.feed("very"), stop.feed(" EN"), stop.feed("D two")
    (('one ', False), ('Every', False), (' ', False), ('', True))
    """

    stops: Sequence[str]
    _held: str = field(default="", init=False)

    def feed(self, text: str, *, last: bool = False) -> tuple[str, bool]:
        """What is certain to be in the text, and whether it has ended."""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        held = 0 if last else max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False


def _overlap(text: str, stop: str) -> int:
    """How much of the end of a text begins a stop text."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Reader:
    """Reads off a `Writing` what is new in it.

    Args:
        writing: in a batch.
        stops: texts that end each of its texts.
    """

    def __init__(self, writing: Writing, stops: Sequence[str]) -> None:
        self.writing = writing
        self._stops = [StopTexts(stops) for _ in range(writing.plan.n_requests)]
        self._read = [0] * writing.plan.n_requests
        self.ended = [False] * writing.plan.n_requests

    def pieces(self) -> list[Piece]:
        """What has been written since it was read before; texts that a stop text ends are in `ended`."""
        found = []
        for index, done in enumerate(self.ended):
            if not done and self.writing.steps.steps_of(index) > self._read[index]:
                found.append(self._piece(index))
        return found

    def _piece(self, index: int) -> Piece:
        steps, plan = self.writing.steps, self.writing.plan
        start, self._read[index] = self._read[index], steps.steps_of(index)
        last = index not in self.writing.running
        text, stopped = self._stops[index].feed(steps.more(index, last=last), last=last)
        ids = [int(one) for one in steps.columns["tokens"][index][start:]]
        tokens = tuple(
            self._token(index, start + offset, one) for offset, one in enumerate(ids) if one not in plan.ends
        )
        finish = None
        if stopped or last:
            finish = "stop" if stopped or ids[-1] in plan.ends else "length"
            self.ended[index] = True
        return Piece(index, text, tokens, finish)

    def _token(self, index: int, step: int, token: int) -> Token:
        steps = self.writing.steps
        decode = steps.tokenizer.decode
        logprob, shift, kl = (float(steps.columns[name][index][step]) for name in ("logprobs", "shifts", "kl"))
        likeliest: tuple[tuple[str, float], ...] = ()
        if steps.keep_likeliest:
            ids, values = (steps.columns[name][index][step] for name in ("likeliest", "likeliest_logprobs"))
            likeliest = tuple((decode([one]), value) for one, value in zip(ids.tolist(), values.tolist(), strict=True))
        return Token(decode([token]), logprob, _known(shift), _known(kl), likeliest)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
