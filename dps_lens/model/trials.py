"""What a model can do is tried once, on a few tokens, and kept with the model."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from dps_lens.model.protocol import HookedModel
from dps_lens.model.use import in_use

T = TypeVar("T")


def tried(model: HookedModel, name: str, trial: Callable[[], T]) -> T:
    """The result of a trial, which sees the model without anybody's hooks; run when it is first asked for."""
    known = vars(model).setdefault("_dps_lens_trials", {})
    if name not in known:
        with in_use(model), without_hooks(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a trial may do what a library warns of
            known[name] = trial()
    return known[name]


@contextmanager
def without_hooks(model: HookedModel) -> Iterator[None]:
    """Lay aside what hangs on the hook points: what edits do to a trial says nothing of the model."""
    points = {id(point): point for point in model.hook_dict.values()}.values()
    aside = [(point, point._forward_hooks) for point in points]
    try:
        for point, _ in aside:
            point._forward_hooks = OrderedDict()
        yield
    finally:
        for point, hooks in aside:
            point._forward_hooks = hooks
