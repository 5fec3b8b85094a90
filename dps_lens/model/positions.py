"""Rotary factors that depend on how long a pass is, and where they change.

Keys that were cached under one set of factors do not fit queries under another, and all rows of a batch take the set of
the longest.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from dps_lens.errors import PromptError
from dps_lens.model.protocol import HookedModel, hf_model_of, is_bridge

_FOUND: "WeakKeyDictionary[Any, RotarySwitch | None]" = WeakKeyDictionary()


@dataclass(frozen=True)
class RotarySwitch:
    """Where rotary factors change.

    Attributes:
        limit: passes of at most so many tokens take the first set of factors.
        settles: longer ones all take one other set (`longrope`), not each length its own (`dynamic`).
    """

    limit: int
    settles: bool


def rotary_switch(model: HookedModel) -> RotarySwitch | None:
    """The switch of a model whose rotary factors depend on length; None for others."""
    if not is_bridge(model):
        return None
    if model not in _FOUND:
        _FOUND[model] = _find(model)
    return _FOUND[model]


def _find(model: HookedModel) -> RotarySwitch | None:
    found = [_switch(module, kind) for module in hf_model_of(model).modules() for kind in _kinds(module)]
    switches = [one for one in found if one is not None]
    return min(switches, key=lambda one: (one.settles, one.limit), default=None)


def is_long(model: HookedModel, tokens: int) -> bool:
    """Whether a pass of so many tokens lies beyond the switch; such rows share no batch with shorter ones."""
    switch = rotary_switch(model)
    return switch is not None and tokens > switch.limit


def check_switch(model: HookedModel, call: str, start: int, stop: int) -> None:
    """Refuse passes that go on from a cache of `start` tokens to `stop` where rotary factors change in between.

    Args:
        model: a hooked model.
        call: named in the error.
        start: tokens of the shortest pass whose keys are cached; the same as `stop` for a pass without a cache.
        stop: tokens of the longest.

    Raises:
        PromptError: says how many tokens fit.
    """
    switch = rotary_switch(model)
    if switch is None or stop <= switch.limit or (switch.settles and start > switch.limit):
        return
    what = "passes over it take other ones" if switch.settles else "each longer pass takes its own"
    raise PromptError(
        f"{call}: {start} cached tokens grow to {stop} across {switch.limit}, up to which this model's rotary factors "
        f"hold ({what}), so that cached keys would not fit; {_fits(switch, start)}"
    )


def _fits(switch: RotarySwitch, start: int) -> str:
    room = switch.limit - start
    if room > 0:
        return f"at most {room} more tokens fit after the cached ones: shorten the prompt or what is written"
    return f"shorten the prompt to less than {switch.limit} tokens"


def _kinds(module: Any) -> list[tuple[str, str | None]]:
    """Kinds of rotary factors of a module, each with the kind of layer that has it where there are several."""
    found = vars(module).get("rope_type")
    if isinstance(found, dict):
        return [(kind, layer) for layer, kind in found.items()]
    return [(found, None)] if isinstance(found, str) else []


def _switch(module: Any, kind_of: tuple[str, str | None]) -> RotarySwitch | None:
    kind, layer = kind_of
    if "dynamic" in kind:
        # A pass of exactly as many tokens does not undo what a longer one has left.
        return RotarySwitch(int(module.original_max_seq_len) - 1, settles=False)
    if kind != "longrope":
        return None
    config = module.config
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    settings = settings.get(layer, settings) if layer is not None else settings
    key = "original_max_position_embeddings"
    limit = settings.get(key) or getattr(config, key, None) or config.max_position_embeddings
    return RotarySwitch(int(limit), settles=True)
