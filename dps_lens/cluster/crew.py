"""Workers and their replacements: who is there, who has to be waited for, who died."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from warnings import warn

from dps_lens.cluster.worker import Ready, Worker
from dps_lens.errors import RunError
from dps_lens.model import HookedModel
from dps_lens.runs import Failure

_FALLS = 3
_PATIENCE = 60.0


@dataclass
class Seat:
    """A worker's place; when the worker dies, another one takes it.

    Attributes:
        number: of the place.
        actor: the worker in it.
        ready: its answer that is waited for; None where it is at work.
        flights: units it was handed, in order.
        node: where it runs.
        nodes: that were there when the worker was hired.
        falls: workers in a row that died here before they answered, while no node was lost.
        log: lines that are not written yet.
    """

    number: int
    actor: Any
    ready: Any
    flights: dict[Any, str] = field(default_factory=dict)
    node: str = ""
    nodes: frozenset[str] = frozenset()
    falls: int = 0
    log: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a line to the worker's log."""
        self.log.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def write(self, folder: Path | None) -> None:
        """Write the lines to the log in a run folder."""
        if folder is not None and self.log:
            (folder / "logs").mkdir(parents=True, exist_ok=True)
            with (folder / "logs" / f"worker-{self.number}.log").open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in self.log)
        self.log.clear()


class Crew:
    """The workers of one model.

    Args:
        load: loads the model on a worker.
        workers: how many.
        cpus: cores and threads of each.
        gpus: of each.
    """

    def __init__(self, load: Callable[[], HookedModel], workers: int, cpus: int, gpus: int | float) -> None:
        import ray

        self._load, self._cpus, self._gpus = load, cpus, gpus
        self._description: dict[str, Any] | None = None
        self._box: list[Any] = []
        # Ray's own restarts would take calls before the model is back, and wait for room that may never come.
        self._actor = ray.remote(Worker).options(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)
        self.seats = [self._hire(number) for number in range(workers)]
        self._warned = False

    def _hire(self, number: int) -> Seat:
        actor: Any = self._actor.remote(self._load, self._cpus)
        return Seat(number, actor, actor.ready.remote(self._box), nodes=self._nodes())

    @property
    def at_work(self) -> list[Seat]:
        """Those that have answered."""
        return [seat for seat in self.seats if seat.ready is None]

    def describe(self) -> dict[str, Any]:
        """The workers' model; waits for the first answer.

        Raises:
            RunError: no worker can work.
        """
        while self._description is None:
            for seat, _ in self.wait():
                self.welcome(seat)
        return self._description

    def take(self, work: Any) -> None:
        """Hand work to everybody."""
        import ray

        self._box = [ray.put(work)]
        for seat in self.seats:
            seat.flights.clear()
            seat.ready = seat.actor.ready.remote(self._box)

    def wait(self) -> list[tuple[Seat, Any]]:
        """What came in; waits for it."""
        import ray

        waited: dict[Any, Seat] = {}
        for seat in self.seats:
            waited |= {ref: seat for ref in ([seat.ready] if seat.ready is not None else seat.flights)}
        came, _ = ray.wait(list(waited), timeout=_PATIENCE)
        if not came and not self.at_work and not self._warned:
            self._warned = True
            warn(
                f"no worker has the model yet; each wants {self._cpus} CPUs and {self._gpus:g} GPUs, the cluster has "
                f"{ray.cluster_resources()}",
                stacklevel=2,
            )
        return [(waited[ref], ref) for ref in came]

    def welcome(self, seat: Seat) -> None:
        """Take in the answer of a new worker; one that cannot work leaves its seat.

        Raises:
            RunError: it was the last one.
        """
        import ray

        try:
            answer: Ready | Failure = ray.get(seat.ready)
        except ray.exceptions.RayError as error:
            seat.falls += seat.nodes <= self._nodes()
            seat.note(f"died before it answered: {error}")
            if seat.falls < _FALLS:
                self.replace(seat)
                return
            answer = Failure(f"{_FALLS} workers in a row died while they loaded the model: {error}")
        if isinstance(answer, Ready):
            answer = self._checked(answer)
        if isinstance(answer, Failure):
            seat.note(f"cannot work:\n{answer.error}")
            self.seats.remove(seat)
            ray.kill(seat.actor)
            if not self.seats:
                raise RunError(f"RayEngine: no worker can work; the last one said: {answer.error.strip()}")
            warn(f"worker {seat.number} cannot work: {answer.reason}", stacklevel=2)
            return
        seat.note(f"ready on {answer.place}")
        seat.ready, seat.node, seat.falls = None, answer.node, 0

    def _checked(self, answer: Ready) -> Ready | Failure:
        if self._description is None:
            self._description = answer.description
        differs = difference(answer.description, self._description)
        return Failure(f"it has another model than the first worker: {differs}") if differs else answer

    def replace(self, seat: Seat) -> None:
        """Put a new worker into the seat of one that died or cannot be reached."""
        import ray

        ray.kill(seat.actor)
        hired = self._hire(seat.number)
        seat.actor, seat.ready, seat.nodes = hired.actor, hired.ready, hired.nodes

    def stands(self, node: str) -> bool:
        """Whether a node is there."""
        return node in self._nodes()

    def _nodes(self) -> frozenset[str]:
        import ray

        return frozenset(one["NodeID"] for one in ray.nodes() if one["Alive"])

    def dismiss(self) -> None:
        """Let everybody go."""
        import ray

        for seat in self.seats:
            ray.kill(seat.actor)
        self.seats = []


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What differs between two models' descriptions, if anything."""
    names = [name for name in wanted if found.get(name) != wanted[name]]
    if not names:
        return ""
    return (
        f"{names[0]} is {found.get(names[0])!r} there, {wanted[names[0]]!r} here; load the model here with "
        "device='meta' to leave weights, dtype and device to the workers"
    )
