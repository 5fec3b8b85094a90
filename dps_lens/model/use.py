"""One thread at a time runs a model: what is hung on it for a pass acts on every pass."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from dps_lens.errors import ModelBusyError
from dps_lens.model.protocol import HookedModel


@dataclass
class _Use:
    thread: threading.Thread | None = None
    depth: int = 0


# Not on the models themselves, which may be copied; not locks of threads, as a context that is left open may be closed
# by another thread: the one that collects it.
_USES: "WeakKeyDictionary[Any, _Use]" = WeakKeyDictionary()
_LOCK = threading.RLock()


@contextmanager
def in_use(model: HookedModel) -> Iterator[None]:
    """Keep other threads from passes of this model; uses in the same thread nest.

    Raises:
        ModelBusyError: another thread is inside.
    """
    with _LOCK:
        use = _USES.setdefault(model, _Use())
        if use.depth and use.thread is not threading.current_thread():
            raise ModelBusyError(
                "another thread is in a pass of this model, or holds an ablation open on it; let one thread at a time "
                "use a model, behind a lock of your own, or load it once a thread"
            )
        use.thread, use.depth = threading.current_thread(), use.depth + 1
    try:
        yield
    finally:
        with _LOCK:
            use.depth -= 1
