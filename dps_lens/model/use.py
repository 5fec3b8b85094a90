"""One thread at a time runs a model: what is hung on it for a pass acts on every pass."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from dps_lens.errors import ModelBusyError
from dps_lens.model.protocol import HookedModel

# Not on the models themselves: a lock can be neither copied nor pickled.
_LOCKS: "WeakKeyDictionary[Any, Any]" = WeakKeyDictionary()
_NEW = threading.Lock()


@contextmanager
def in_use(model: HookedModel) -> Iterator[None]:
    """Keep other threads from passes of this model; uses in the same thread nest.

    Raises:
        ModelBusyError: another thread is inside.
    """
    with _NEW:
        lock = _LOCKS.setdefault(model, threading.RLock())
    if not lock.acquire(blocking=False):
        raise ModelBusyError(
            "another thread is in a pass of this model, or holds an ablation open on it; let one thread at a time use "
            "a model, behind a lock of your own, or load it once a thread"
        )
    try:
        yield
    finally:
        lock.release()
