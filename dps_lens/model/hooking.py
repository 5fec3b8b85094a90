"""Hooks that are found once, and put on a model and taken off it at little cost."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from dps_lens.model.protocol import HookedModel
from dps_lens.model.use import in_use


class Hooks:
    """A context in which forward hooks are on a model, and which can be entered again and again.

    `model.hooks` looks up every name anew, which takes longer than a decoding step of a small model.
    """

    def __init__(self, model: HookedModel, hooks: Sequence[tuple[str, Any]]) -> None:
        """Find the hook points.

        Args:
            model: a hooked model.
            hooks: names of hook points, and functions as `model.hooks` takes them.

        Raises:
            KeyError: the model has no such hook point.
        """
        points = model.hook_dict if hooks else {}
        self._model, self._hooks = model, [(points[name], hook) for name, hook in hooks]
        self._stack = ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(in_use(self._model))
            for point, hook in self._hooks:
                point.add_hook(hook)
                stack.callback(_remove, point, point.fwd_hooks[-1])
            self._stack = stack.pop_all()

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def _remove(point: Any, handle: Any) -> None:
    """Take one hook off; those that others put on the same point stay."""
    handle.hook.remove()
    point.fwd_hooks[:] = [one for one in point.fwd_hooks if one is not handle]
