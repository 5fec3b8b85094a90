"""Hands units out to a crew, takes them in, and gives those of dead workers to others."""

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dps_lens.cluster.crew import Crew, Seat
from dps_lens.cluster.summary import Summary
from dps_lens.cluster.worker import Done
from dps_lens.runs import Failure, Unit, Work

_ATTEMPTS = 3


class HandOut:
    """One run of units.

    Args:
        crew: makes them.
        work: what they belong to.
        keys: which.
        in_flight: units that a worker has in hand.
        folder: where logs go.
    """

    def __init__(self, crew: Crew, work: Work, keys: Sequence[str], in_flight: int, folder: Path | None) -> None:
        self.crew, self.work, self.in_flight, self.folder = crew, work, in_flight, folder
        self.todo = deque(keys)
        self.attempts: Counter[str] = Counter()
        self.handed: Counter[str] = Counter()
        self.summary = Summary()
        self._makers: set[int] = set()

    def units(self) -> Iterator[tuple[str, Unit]]:
        """Units as they come in."""
        if not self.todo:
            return
        self.crew.take(self.work)
        begun = None
        try:
            while self.todo or any(seat.flights for seat in self.crew.seats):
                self._feed()
                begun = begun or (time.perf_counter() if self.handed else None)
                for seat, ref in self.crew.wait():
                    if ref == seat.ready:
                        self.crew.welcome(seat)
                    else:
                        yield from self._take_in(seat, ref)
                    seat.write(self.folder)
        finally:
            self.summary.seconds = time.perf_counter() - (begun or time.perf_counter())
            self.summary.again = sum(times > 1 for times in self.handed.values())
            self.summary.workers = len(self._makers)

    def _feed(self) -> None:
        for _ in range(self.in_flight):  # one each before anybody has a second
            for seat in self.crew.at_work:
                if self.todo and len(seat.flights) < self.in_flight:
                    key = self.todo.popleft()
                    self.handed[key] += 1
                    seat.flights[seat.actor.make.remote(key, self.work.given(key))] = key

    def _take_in(self, seat: Seat, ref: Any) -> Iterator[tuple[str, Unit]]:
        import ray

        try:
            answer = ray.get(ref)
        except ray.exceptions.RayError as error:
            yield from self._lose(seat, str(error))
            return
        yield from self._answered(seat, seat.flights.pop(ref), answer)

    def _answered(self, seat: Seat, key: str, answer: Done | Failure) -> Iterator[tuple[str, Unit]]:
        if isinstance(answer, Failure):
            seat.note(f"{key}: failed\n{answer.error}")
            yield from self._failed(key, answer)
            return
        for text in answer.warned:
            seat.note(f"{key}: warned: {text}")
        seat.note(f"{key}: {answer.seconds:.3f} s")
        of = self.summary
        of.units, of.busy = of.units + 1, of.busy + answer.seconds
        of.idle += (answer.idle - of.idle) / of.units
        self._makers.add(seat.number)
        yield key, answer.unit

    def _failed(self, key: str, failure: Failure) -> Iterator[tuple[str, Unit]]:
        self.attempts[key] += 1
        if self.attempts[key] < _ATTEMPTS:
            self.todo.append(key)
        else:
            self.summary.quarantined += 1
            yield key, failure

    def _lose(self, seat: Seat, error: str) -> Iterator[tuple[str, Unit]]:
        """A worker died: its finished units are taken in, the others go back; a new worker is hired."""
        import ray

        seat.note(f"died: {error}")
        self.summary.deaths += 1
        lost = []
        for ref, key in seat.flights.items():
            try:
                answer = ray.get(ref, timeout=0)
            except ray.exceptions.RayError:
                lost.append(key)
            else:
                yield from self._answered(seat, key, answer)
        seat.flights.clear()
        stands = self.crew.stands(seat.node)
        self.crew.replace(seat)
        if lost and stands:  # the first was in work; where the whole node is gone, no unit is to blame
            yield from self._failed(lost.pop(0), Failure(f"{error}\nthe worker's process died in this unit"))
        self.todo.extendleft(reversed(lost))
