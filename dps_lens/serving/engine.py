"""The thread that runs the model: requests come from any thread, are batched, and are told of as they are written."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field

import psutil
import torch

from dps_lens.errors import PromptError, SteeringError
from dps_lens.model import HookedModel, ModelThread, runner_of
from dps_lens.serving.answer import Done, Event, Failed, Reader, Started
from dps_lens.serving.failures import note_failure
from dps_lens.serving.limits import Limits
from dps_lens.serving.metrics import Metrics
from dps_lens.steering.continuous import ContinuousBatch, Writing

_NEWCOMERS = 8
_SHARE = 0.5  # of free memory: caches are copied when they grow


class BusyError(SteeringError):
    """Too many requests wait.

    Attributes:
        seconds: after which it may be worth to ask again.
    """

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message)
        self.seconds = seconds


class TimedOutError(SteeringError):
    """A request took longer than it may."""


class StoppingError(SteeringError):
    """The server is being stopped."""


@dataclass(eq=False)
class Job:
    """A request in the engine.

    Attributes:
        make: makes what is to be written; called in the thread that runs the model, which owns its tokenizer.
        tell: is told of every event, from that thread.
        stops: texts that end an answer.
    """

    make: Callable[[], Writing]
    tell: Callable[[Event], None]
    stops: Sequence[str] = ()
    came: float = field(default_factory=time.monotonic)
    reader: Reader | None = None
    wrote: float | None = None


class Engine:
    """Runs a model for many requests at once, until it is closed.

    Args:
        model: a hooked model; nobody else may use it meanwhile.
        limits: what is held at most.
        metrics: are kept up to date.
        thread: in which the model was loaded, for the speed of its passes; one of its own by default.
    """

    def __init__(
        self,
        model: HookedModel,
        limits: Limits | None = None,
        *,
        metrics: Metrics | None = None,
        thread: ModelThread | None = None,
    ) -> None:
        self.model, self.limits, self.metrics = model, limits or Limits(), metrics or Metrics()
        self.positions = self.limits.positions or positions_that_fit(model)
        self._batch = ContinuousBatch(model, chunk=self.limits.chunk)
        self._came: deque[Job] = deque()
        self._gone: set[Job] = set()
        self._waiting: deque[tuple[Job, Writing]] = deque()
        self._in: dict[Writing, Job] = {}
        self._changed, self._closing, self._stopped, self._pace = threading.Condition(), False, False, 1.0
        self._rows = 0
        own = thread or ModelThread()
        self._over = own.start(self._run)
        if thread is None:
            own.close()  # once this has run

    @property
    def running(self) -> bool:
        """Whether it takes requests."""
        return not self._over.done()

    @property
    def waiting(self) -> int:
        """Requests that are not in the batch yet."""
        return len(self._came) + len(self._waiting)

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self._rows

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let requests wait for their turn, all or none.

        Raises:
            BusyError: too many are waiting.
            StoppingError: the engine is being closed.
        """
        with self._changed:
            if self._closing or not self.running:
                raise StoppingError("the server is stopping")
            if self.waiting + len(jobs) > self.limits.waiting:
                seconds = max(1, round(self._pace * self.waiting / max(1, len(self._in))))
                raise BusyError(f"{self.waiting} requests are waiting; ask again later", seconds)
            self._came.extend(jobs)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """End a request that nobody waits for."""
        with self._changed:
            self._gone.add(job)
            self._changed.notify()

    def close(self, *, patience: float = 30.0) -> None:
        """Take no more requests, write those that are there to their ends, and stop."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if wait([self._over], patience).done:
            return
        with self._changed:
            self._stopped = True  # what is left is told so
            self._changed.notify()
        wait([self._over], patience)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._came or self._gone or self._waiting or self._in or self._closing):
                    self._changed.wait()
                if self._closing and not (self._came or self._waiting or self._in):
                    return
                # While others are written, one newcomer a turn: to read a long prompt takes a while.
                came = [self._came.popleft() for _ in range(min(len(self._came), 1 if self._in else _NEWCOMERS))]
                gone = {*self._gone}
                self._came = deque(job for job in self._came if job not in gone)
                self._gone.clear()
            try:
                self._turn(came, gone)
            except Exception as error:  # a bug: whoever waits is told, and the next ones are served
                note_failure(error)
                for job in [*came, *(job for job, _ in self._waiting), *self._in.values()]:
                    self._tell(job, Failed(error))
                self._waiting.clear()
                self._in.clear()
                self._batch = ContinuousBatch(self.model, chunk=self.limits.chunk)
            self._publish()

    def _publish(self) -> None:
        """What other threads may read of the batch."""
        self._rows = self._batch.rows
        self.metrics.rows.set(self._rows)
        self.metrics.waiting.set(self.waiting)

    def _turn(self, came: Sequence[Job], gone: set[Job]) -> None:
        for job in came:
            if job not in gone:
                self._prepare(job)
        self._let_go(gone)
        late, seconds = time.monotonic(), self.limits.seconds
        held = [*(job for job, _ in self._waiting), *self._in.values()]
        timed_out = {job for job in held if self._stopped or late - job.came > seconds}
        for job in timed_out:
            error = TimedOutError(f"the request took longer than {seconds:g} seconds")
            self._tell(job, Failed(StoppingError("the server has stopped") if self._stopped else error))
        self._let_go(timed_out)
        self._admit()
        self._publish()
        if len(self._batch):
            for writing in self._batch.step():
                self._read(writing)

    def _prepare(self, job: Job) -> None:
        try:
            writing = job.make()
            self._check_size(writing)
        except Exception as error:  # whatever is wrong with a request is told to whoever sent it
            self._tell(job, Failed(error))
            return
        job.reader = Reader(writing, job.stops)
        self._waiting.append((job, writing))

    def _check_size(self, writing: Writing) -> None:
        rows, longest = len(writing.plan.rows), writing.longest
        if rows > self.limits.rows or rows * longest > self.positions:
            raise PromptError(
                f"the request takes {rows} rows of {longest} positions; this server holds {self.limits.rows} rows and "
                f"{self.positions} positions: ask for fewer texts, fewer tokens, or with a shorter prompt"
            )

    def _let_go(self, jobs: set[Job]) -> None:
        if not jobs:
            return
        self._waiting = deque(one for one in self._waiting if one[0] not in jobs)
        for writing, job in list(self._in.items()):
            if job in jobs:
                del self._in[writing]
                self._batch.leave(writing)

    def _admit(self) -> None:
        """First come, first in, as long as there is room."""
        while self._waiting:
            job, writing = self._waiting[0]
            rows = self._batch.rows + len(writing.plan.rows)
            longest = max(one.longest for one in (writing, *self._in))
            if rows > self.limits.rows or rows * longest > self.positions:
                return
            self._waiting.popleft()
            try:
                self._batch.add(writing)
            except Exception as error:
                self._tell(job, Failed(error))
                continue
            self._in[writing] = job
            # What is written from comes first among the rows.
            self._tell(job, Started(len(writing.plan.rows[0].tokens)))

    def _read(self, writing: Writing) -> None:
        job = self._in.get(writing)
        if job is None or job.reader is None:
            return
        if writing.error is not None:
            del self._in[writing]
            self._tell(job, Failed(writing.error))
            return
        now = time.monotonic()
        try:
            pieces = job.reader.pieces()
        except Exception as error:
            note_failure(error)
            self._tell(job, Failed(error))
            self._let_go({job})
            return
        for piece in pieces:
            self.metrics.wrote(piece, now - (job.came if job.wrote is None else job.wrote), first=job.wrote is None)
            self._tell(job, piece)
        job.wrote = now
        stopped = [index for index, ended in enumerate(job.reader.ended) if ended]
        if len(stopped) == len(job.reader.ended):
            del self._in[writing]
            self._pace += 0.1 * (now - job.came - self._pace)
            self._tell(job, Done())
        if stopped and any(index in writing.running for index in stopped):
            self._batch.leave(writing, stopped)

    def _tell(self, job: Job, event: Event) -> None:
        try:
            job.tell(event)
        except Exception:  # nobody listens any more
            self.cancel(job)


def positions_that_fit(model: HookedModel) -> int:
    """Positions of keys and values that half of the free memory holds."""
    cfg, parameter = model.cfg, next(model.parameters())
    heads = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    each = 2 * cfg.n_layers * heads * cfg.d_head * parameter.element_size()
    device = runner_of(model).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return max(cfg.n_ctx, int(_SHARE * free / each))
