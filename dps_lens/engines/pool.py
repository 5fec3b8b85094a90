"""Workers and their replacements: who is there, who has to be waited for, who died."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from warnings import warn

from dps_lens.engines.worker import Ready, Worker
from dps_lens.errors import RunError
from dps_lens.extensions import loaded_files
from dps_lens.files import append_line
from dps_lens.model import HookedModel
from dps_lens.runs import changes
from dps_lens.work import Failure

_DEATHS = 3
_TIMEOUT = 60.0


@dataclass
class Slot:
    """A worker's place; when the worker dies, another one takes it.

    Attributes:
        number: of the place.
        actor: the worker in it.
        ready: its answer that is waited for; None where it is at work.
        in_hand: units it was handed, in order.
        node: where it runs.
        nodes: that were there when the worker was started.
        deaths: workers in a row that died here before they answered, while no node was lost.
        log: lines that are not written yet.
    """

    number: int
    actor: Any
    ready: Any
    in_hand: dict[Any, str] = field(default_factory=dict)
    node: str = ""
    nodes: frozenset[str] = frozenset()
    deaths: int = 0
    log: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a line to the worker's log."""
        self.log.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def write(self, folder: Path | None) -> None:
        """Write the lines to the log in a run folder."""
        if folder is not None and self.log:
            append_line(folder / "logs" / f"worker-{self.number}.log", "\n".join(self.log))
        self.log.clear()


class WorkerPool:
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
        self._work: list[Any] = []
        # Ray's own restarts would take calls before the model is back, and wait for room that may never come.
        self._actor = ray.remote(Worker).options(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)
        self.slots = [self._start_worker(number) for number in range(workers)]
        self._warned = False

    def _start_worker(self, number: int) -> Slot:
        actor: Any = self._actor.remote(self._load, self._cpus)
        return Slot(number, actor, actor.ready.remote(self._work), nodes=self._nodes())

    @property
    def busy(self) -> list[Slot]:
        """Those that have answered."""
        return [slot for slot in self.slots if slot.ready is None]

    def describe(self) -> dict[str, Any]:
        """The workers' model; waits for the first answer.

        Raises:
            RunError: no worker can work.
        """
        while self._description is None:
            for slot, _ in self.wait():
                self.admit(slot)
        return self._description

    def hand_work(self, work: object) -> None:
        """Hand work to everybody."""
        import ray

        for module in loaded_files():
            ray.cloudpickle.register_pickle_by_value(module)
        self._work = [ray.put(work)]
        for slot in self.slots:
            slot.in_hand.clear()
            slot.ready = slot.actor.ready.remote(self._work)

    def wait(self) -> list[tuple[Slot, Any]]:
        """What came in; waits for it."""
        import ray

        waited: dict[Any, Slot] = {}
        for slot in self.slots:
            waited |= {ref: slot for ref in ([slot.ready] if slot.ready is not None else slot.in_hand)}
        came, _ = ray.wait(list(waited), timeout=_TIMEOUT)
        if not came and not self.busy and not self._warned:
            self._warned = True
            warn(
                f"no worker has the model yet; each wants {self._cpus} CPUs and {self._gpus:g} GPUs, the cluster has "
                f"{ray.cluster_resources()}",
                stacklevel=2,
            )
        return [(waited[ref], ref) for ref in came]

    def admit(self, slot: Slot) -> None:
        """Take in the answer of a new worker; one that cannot work leaves its slot.

        Raises:
            RunError: it was the last one.
        """
        import ray

        try:
            answer: Ready | Failure = ray.get(slot.ready)
        except ray.exceptions.RayError as error:
            slot.deaths += slot.nodes <= self._nodes()
            slot.note(f"died before it answered: {error}")
            if slot.deaths < _DEATHS:
                self.replace(slot)
                return
            answer = Failure(f"{_DEATHS} workers in a row died while they loaded the model: {error}")
        if isinstance(answer, Ready):
            answer = self._checked(answer)
        if isinstance(answer, Failure):
            slot.note(f"cannot work:\n{answer.error}")
            self.slots.remove(slot)
            ray.kill(slot.actor)
            if not self.slots:
                raise RunError(f"RayEngine: no worker can work; the last one said: {answer.error.strip()}")
            warn(f"worker {slot.number} cannot work: {answer.reason}", stacklevel=2)
            return
        slot.note(f"ready on {answer.place}")
        slot.ready, slot.node, slot.deaths = None, answer.node, 0

    def _checked(self, answer: Ready) -> Ready | Failure:
        if self._description is None:
            self._description = answer.description
        differs = difference(answer.description, self._description)
        return Failure(f"it has another model than the first worker: {differs}") if differs else answer

    def replace(self, slot: Slot) -> None:
        """Put a new worker into the slot of one that died or cannot be reached."""
        import ray

        ray.kill(slot.actor)
        started = self._start_worker(slot.number)
        slot.actor, slot.ready, slot.nodes = started.actor, started.ready, started.nodes

    def has_node(self, node: str) -> bool:
        """Whether a node is there."""
        return node in self._nodes()

    def _nodes(self) -> frozenset[str]:
        import ray

        return frozenset(one["NodeID"] for one in ray.nodes() if one["Alive"])

    def stop(self) -> None:
        """Let everybody go."""
        import ray

        for slot in self.slots:
            ray.kill(slot.actor)
        self.slots = []


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What differs between two models' descriptions, if anything."""
    for name, there, here in changes(found, wanted):
        return (
            f"{name} is {there!r} there, {here!r} here; load the model here with device='meta' to leave weights, dtype "
            "and device to the workers"
        )
    return ""
