"""The engine that makes units on a Ray cluster (extra `[ray]`)."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dps_lens.data.tokenizer import tokenizer_digest
from dps_lens.engines.dispatch import Dispatcher
from dps_lens.engines.pool import WorkerPool, difference
from dps_lens.engines.summary import Summary
from dps_lens.engines.worker import TOKENIZER
from dps_lens.errors import RunError
from dps_lens.model import HookedModel, describe_model, described_as, has_hooks, has_weights, loader_of
from dps_lens.work import Engine, Unit, Work


@dataclass
class RayEngine(Engine):
    """Makes the units of a run in Ray actors that hold one model each.

    The calling process commits the results to its own run folder, so that a run may begin without an engine and end
    with one, or the reverse. It needs no weights: load its model with `device="meta"`.

    A worker that dies is replaced, if need be as soon as the cluster has room; what it had in hand is handed out again.
    A unit that fails, or takes its worker down, three times is put in quarantine with its traceback, and the run goes
    on. Workers keep their model until `close`, the end of a `with` block, or of the process.

    Results equal those of a run without an engine after `torch.set_num_threads(cpus)`, bit by bit.

    Args:
        address: of a running cluster, `"auto"` or `"ray://host:10001"`. By default the Ray that this process is
            connected to; else one that is started on this machine and ends with the engine.
        workers: how many.
        cpus: cores, and threads, of each.
        gpus: of each; a model is spread over several (`device_map="auto"`).
        in_flight: units that a worker has in hand. With two it need not wait for the next one; as many are made again
            when it dies.
        load: loads the model on a worker; by default as `load_model` loaded that of the call.

    Attributes:
        summary: of the last run.
    """

    address: str | None = None
    workers: int = 2
    cpus: int = 1
    gpus: int | float = 0
    in_flight: int = 2
    load: Callable[[], HookedModel] | None = None
    summary: Summary = field(default_factory=Summary, init=False)
    _pool: WorkerPool | None = field(default=None, init=False, repr=False)
    _load: Callable[[], HookedModel] | None = field(default=None, init=False, repr=False)
    _own: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.workers < 1 or self.cpus < 1 or self.gpus < 0 or self.in_flight < 1:
            raise RunError("RayEngine: workers, cpus and in_flight are at least 1, gpus is not negative")

    def __enter__(self) -> "RayEngine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def status(self) -> str:  # type: ignore[override]
        """How many workers are at work."""
        return f"{len(self._pool.busy) if self._pool else 0} of {self.workers} workers"

    def start(self, model: HookedModel) -> None:
        """Let workers load the model; returns when the first one has it.

        Raises:
            RunError: Ray is not installed or not reached, no worker can load the model, it is another one there, or has
                hooks here.
        """
        if has_hooks(model):
            raise RunError("RayEngine: the model has hooks, which the workers' models have not; remove them")
        load = self.load or self._loader(model)
        description = describe_model(model) if has_weights(model) else None
        if self._pool is None or not _same(load, self._load):
            self._stop()
            self._connect()
            self._pool, self._load = WorkerPool(load, self.workers, self.cpus, self.gpus), load
        with self._or_stop():
            theirs = self._pool.describe()
        tokenizer = {TOKENIZER: tokenizer_digest(model)}
        if description is None:
            description = {name: value for name, value in theirs.items() if name != TOKENIZER}
            described_as(model, description)
        if differs := difference(theirs, {**description, **tokenizer}):
            raise RunError(f"RayEngine: workers have another model: {differs}")

    def _loader(self, model: HookedModel) -> Callable[[], HookedModel]:
        load = loader_of(model)
        if load is None:
            raise RunError(
                "RayEngine: workers cannot load a model that load_model did not load; give load=, a function that does"
            )
        placed = {"device_map", "n_devices"} & load.keywords.keys()
        if self.gpus > 1 or placed:
            return partial(load, **(({} if placed else {"device_map": "auto"}) | load.keywords))
        return partial(load, device="cuda" if self.gpus else "cpu")

    def _connect(self) -> None:
        try:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            import ray
        except ImportError as error:
            raise RunError("RayEngine needs Ray: pip install 'ray>=2.60,<2.61'") from error
        if ray.is_initialized():
            return
        where: dict[str, Any] = {"address": self.address}
        if self.address is None:
            where = {"address": "local", "num_cpus": self.workers * self.cpus, "include_dashboard": False}
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **where)
        except (ConnectionError, RuntimeError) as error:
            raise RunError(f"RayEngine: no Ray cluster at {self.address!r}: {error}") from error
        self._own = True

    def make(self, work: Work, keys: Sequence[str], folder: Path | None) -> Iterator[tuple[str, Unit]]:
        """Units as they come in, each once.

        Raises:
            RunError: no worker is left.
        """
        self.start(work.model)
        assert self._pool is not None
        run = Dispatcher(self._pool, work, keys, self.in_flight, folder)
        self.summary = run.summary
        with self._or_stop():
            yield from run.units()

    @contextmanager
    def _or_stop(self) -> Iterator[None]:
        """After an error, the next run hires anew."""
        try:
            yield
        except BaseException:
            self._stop()
            raise

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.stop()
        self._pool = None

    def close(self) -> None:
        """Let the workers go, and the Ray that was started or connected to for them."""
        import ray

        self._stop()
        if self._own:
            ray.shutdown()
            self._own = False


def _same(one: Callable[[], HookedModel], other: object) -> bool:
    """Whether two functions load the same model."""
    if isinstance(one, partial) and isinstance(other, partial):
        return (one.func, one.args, one.keywords) == (other.func, other.args, other.keywords)
    return one is other
