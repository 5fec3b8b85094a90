"""The thread in which a model runs."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class ModelThread:
    """A thread for everything that a model does; it ends with the process, or when it is closed.

    Load the model in it too. Every thread that has computed something keeps workers of its own, and where there are
    more of them than cores, GNU's OpenMP puts them to sleep after every product: on two cores, decoding takes 1.9 times
    as long beside a thread that has loaded the model and waits.

    >>> thread = ModelThread()
    >>> thread.run(sum, [1, 2])
    3
    """

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="dps-lens-model", daemon=True).start()

    def start(self, function: Callable[..., T], *arguments: Any, **options: Any) -> "Future[T]":
        """Call a function there, after those that were asked for before."""
        found: Future[T] = Future()
        self._asked.put((found, lambda: function(*arguments, **options)))
        return found

    def run(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Call a function there, and wait for what it returns or raises."""
        return self.start(function, *arguments, **options).result()

    def close(self) -> None:
        """End it, after what was asked for before."""
        self._asked.put(None)

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            found, function = asked
            try:
                found.set_result(function())
            except BaseException as error:
                found.set_exception(error)
            # Or the last of them, and the model in it, would be held while the thread waits.
            del asked, found, function
