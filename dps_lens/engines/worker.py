"""What runs in a Ray actor: one model, and the units that it is asked for."""

import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dps_lens.data.tokenizer import tokenizer_digest
from dps_lens.model import HookedModel, describe_model
from dps_lens.work import Failure, Work

TOKENIZER = "tokenizer"
"""In a worker's description of its model: what prompts are made with there."""


@dataclass(frozen=True)
class Ready:
    """A worker's answer: it has the model, and the work."""

    description: dict[str, Any]
    node: str
    place: str


@dataclass(frozen=True)
class Done:
    """A unit, the seconds it took and that the worker had been idle before, and what was warned of."""

    unit: dict[str, Tensor]
    seconds: float
    idle: float
    warned: tuple[str, ...]


class Worker:
    """Holds a model. Errors are answers, so that an exception of Ray always means a lost process.

    Args:
        load: loads the model.
        threads: that torch computes with; other numbers of them give other last digits.
    """

    def __init__(self, load: Callable[[], HookedModel], threads: int) -> None:
        self._load, self._threads = load, threads
        self._model: HookedModel | None = None
        self._work: Work | None = None
        self._ended: float | None = None

    def ready(self, box: list[Any]) -> Ready | Failure:
        """Load the model if it is not there yet, and take the work that the box refers to, if any."""
        import ray

        try:
            if self._model is None:
                torch.set_num_threads(self._threads)
                self._model = self._load()
            if box:
                self._work, self._ended = ray.get(box[0]), None
                vars(self._work)["model"] = self._model
            node = ray.get_runtime_context().get_node_id()
            device = next(self._model.parameters()).device
            description = {**describe_model(self._model), TOKENIZER: tokenizer_digest(self._model)}
            return Ready(description, node, f"{socket.gethostname()}, process {os.getpid()}, {device}")
        except Exception:
            return Failure(traceback.format_exc())

    def make(self, key: str, given: object) -> Done | Failure:
        """One unit of the work."""
        begun = time.perf_counter()
        idle = begun - self._ended if self._ended is not None else 0.0
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("default")
                unit = self._work.make(key, given)  # type: ignore[union-attr]
            unit = {name: tensor.detach().cpu().contiguous() for name, tensor in unit.items()}
            self._ended = time.perf_counter()
            return Done(unit, self._ended - begun, idle, tuple(str(one.message) for one in caught))
        except Exception:
            return Failure(traceback.format_exc())
