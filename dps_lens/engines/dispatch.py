"""Hands units out to a pool of workers, takes them in, and gives those of dead workers to others."""

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dps_lens.engines.pool import Slot, WorkerPool
from dps_lens.engines.summary import Summary
from dps_lens.engines.worker import Done
from dps_lens.work import Failure, Unit, Work

_ATTEMPTS = 3


class Dispatcher:
    """One run of units.

    Args:
        pool: makes them.
        work: what they belong to.
        keys: which.
        in_flight: units that a worker has in hand.
        folder: where logs go.
    """

    def __init__(self, pool: WorkerPool, work: Work, keys: Sequence[str], in_flight: int, folder: Path | None) -> None:
        self.pool, self.work, self.in_flight, self.folder = pool, work, in_flight, folder
        self.todo = deque(keys)
        self.attempts: Counter[str] = Counter()
        self.handed: Counter[str] = Counter()
        self.summary = Summary()
        self._makers: set[int] = set()

    def units(self) -> Iterator[tuple[str, Unit]]:
        """Units as they come in."""
        if not self.todo:
            return
        self.pool.hand_work(self.work)
        begun = None
        try:
            while self.todo or any(slot.in_hand for slot in self.pool.slots):
                self._hand_out()
                begun = begun or (time.perf_counter() if self.handed else None)
                for slot, ref in self.pool.wait():
                    if ref == slot.ready:
                        self.pool.admit(slot)
                    else:
                        yield from self._receive(slot, ref)
                    slot.write(self.folder)
        finally:
            self.summary.seconds = time.perf_counter() - (begun or time.perf_counter())
            self.summary.again = sum(times > 1 for times in self.handed.values())
            self.summary.workers = len(self._makers)

    def _hand_out(self) -> None:
        for _ in range(self.in_flight):  # one each before anybody has a second
            for slot in self.pool.busy:
                if self.todo and len(slot.in_hand) < self.in_flight:
                    key = self.todo.popleft()
                    self.handed[key] += 1
                    slot.in_hand[slot.actor.make.remote(key, self.work.given(key))] = key

    def _receive(self, slot: Slot, ref: Any) -> Iterator[tuple[str, Unit]]:
        import ray

        try:
            answer = ray.get(ref)
        except ray.exceptions.RayError as error:
            yield from self._lost_worker(slot, str(error))
            return
        yield from self._answered(slot, slot.in_hand.pop(ref), answer)

    def _answered(self, slot: Slot, key: str, answer: Done | Failure) -> Iterator[tuple[str, Unit]]:
        if isinstance(answer, Failure):
            slot.note(f"{key}: failed\n{answer.error}")
            yield from self._failed(key, answer)
            return
        for text in answer.warned:
            slot.note(f"{key}: warned: {text}")
        slot.note(f"{key}: {answer.seconds:.3f} s")
        of = self.summary
        of.units, of.busy = of.units + 1, of.busy + answer.seconds
        of.idle += (answer.idle - of.idle) / of.units
        self._makers.add(slot.number)
        yield key, answer.unit

    def _failed(self, key: str, failure: Failure) -> Iterator[tuple[str, Unit]]:
        self.attempts[key] += 1
        if self.attempts[key] < _ATTEMPTS:
            self.todo.append(key)
        else:
            self.summary.quarantined += 1
            yield key, failure

    def _lost_worker(self, slot: Slot, error: str) -> Iterator[tuple[str, Unit]]:
        """A worker died: its finished units are taken in, the others go back; a new worker is hired."""
        import ray

        slot.note(f"died: {error}")
        self.summary.deaths += 1
        lost = []
        for ref, key in slot.in_hand.items():
            try:
                answer = ray.get(ref, timeout=0)
            except ray.exceptions.RayError:
                lost.append(key)
            else:
                yield from self._answered(slot, key, answer)
        slot.in_hand.clear()
        node_is_there = self.pool.has_node(slot.node)
        self.pool.replace(slot)
        if lost and node_is_there:  # the first was in work; where the whole node is gone, no unit is to blame
            yield from self._failed(lost.pop(0), Failure(f"{error}\nthe worker's process died in this unit"))
        self.todo.extendleft(reversed(lost))
