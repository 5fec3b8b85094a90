"""Who waits for the model of a live page."""

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from dps_lens.errors import DPSLensError, SteeringError, reason
from dps_lens.explorer.question import Refused
from dps_lens.model import ModelThread

PATIENCE = 0.5
"""Seconds until whoever waits looks again."""


class BusyError(SteeringError):
    """Too many are waiting."""


class Line:
    """One is served at a time, in the order of asking, in the model's thread.

    Args:
        thread: where answers are made; one of its own by default.
        most: who may wait or be served.
    """

    def __init__(self, thread: ModelThread | None = None, most: int = 16) -> None:
        self._thread, self._own = thread or ModelThread(), thread is None
        self._tickets: list[object] = []
        self._most, self._changed = most, threading.Condition()

    def join(self) -> object:
        """A place in the line.

        Raises:
            BusyError: there is none.
        """
        with self._changed:
            if len(self._tickets) >= self._most:
                raise BusyError(f"{len(self._tickets)} questions are waiting; try again when some are answered")
            ticket = object()
            self._tickets.append(ticket)
        return ticket

    def leave(self, ticket: object) -> None:
        """Give a place up, served or not."""
        with self._changed:
            if ticket in self._tickets:
                self._tickets.remove(ticket)
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread, if it is the line's own; nobody is served any more."""
        if self._own:
            self._thread.close()

    @property
    def waited_for(self) -> bool:
        """Whether somebody waits for the one that is served."""
        return len(self._tickets) > 1

    def served(self, ticket: object, answer: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
        """`{"waiting": how many are before it}` down to 0, then the answer, or `{"error": …}`."""
        try:
            while place := self._place(ticket):
                yield {"waiting": place}
            yield {"waiting": 0}
            yield from self._stepped(answer)
        except Refused as error:
            yield {"error": error.reason, "field": error.field}
        except DPSLensError as error:
            yield {"error": str(error)}
        except Exception as error:
            # Whoever asked is told; the next one is served.
            logging.getLogger(__name__).exception("a question was not answered")
            yield {"error": f"{type(error).__name__}: {reason(error)}"}
        finally:
            self.leave(ticket)

    def _stepped(self, answer: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
        """Each step of an answer, and its end, in the model's thread."""
        steps: Iterator[dict[str, Any] | None] = self._thread.run(answer)
        try:
            while (one := self._thread.run(next, steps, None)) is not None:
                yield one
        finally:
            self._thread.run(steps.close)  # type: ignore[attr-defined]

    def _place(self, ticket: object) -> int:
        with self._changed:
            place = self._tickets.index(ticket)
            if place:
                self._changed.wait(PATIENCE)
                place = self._tickets.index(ticket)
            return place
