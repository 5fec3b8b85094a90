"""Settings that are numbers: refused where they enter, in one wording."""

import math
from numbers import Integral, Real
from typing import Any, TypeAlias

from dps_lens.errors import DPSLensError

Bound: TypeAlias = float | int


def check_number(
    error: type[DPSLensError],
    name: str,
    value: object,
    *,
    least: Bound | None = None,
    above: Bound | None = None,
    most: Bound = math.inf,
    why: str = "",
) -> None:
    """Refuse what is not a finite number in a range; truth values and texts are none.

    Args:
        error: what is raised.
        name: of the setting, after the call that it is of: `"generate: min_p"`.
        value: of the setting.
        least: the smallest that is allowed.
        above: a bound that itself is not allowed, in place of `least`.
        most: the largest that is allowed.
        why: what the setting means, or what to do instead.
    """
    low = above if least is None else least
    if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
        number = float(value)
        if (low is None or number > low or number == least) and number <= most:
            return
    raise error(f"{name} {value!r} is not a number{_range(least, above, most)}{'; ' * bool(why)}{why}")


def check_whole(
    error: type[DPSLensError], name: str, value: object, *, least: int, most: Bound = math.inf, why: str = ""
) -> None:
    """Refuse what is not a whole number in a range; truth values, texts and 2.0 are none.

    Args:
        error: what is raised.
        name: of the setting, after the call that it is of: `"generate: max_new_tokens"`.
        value: of the setting.
        least: the smallest that is allowed.
        most: the largest that is allowed.
        why: what the setting means, or what to do instead.
    """
    if isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most:
        return
    raise error(f"{name} {value!r} is not a whole number{_range(least, None, most)}{'; ' * bool(why)}{why}")


def check_seed(error: type[DPSLensError], name: str, value: object) -> None:
    """Refuse a seed that torch cannot take, or that it would turn into another one."""
    check_whole(error, name, value, least=-(2**63), most=2**64 - 1)


def check_flag(error: type[DPSLensError], name: str, value: object) -> None:
    """Refuse what is neither True nor False: `"false"` would count as true."""
    if not isinstance(value, bool):
        raise error(f"{name} {value!r} is neither True nor False")


def _range(least: Bound | None, above: Bound | None, most: Bound) -> str:
    start: Any = f" from {least}" if least is not None else f" above {above}" if above is not None else ""
    if math.isinf(most):
        return f"{start} up" if least is not None else start
    return f"{start} to {most}" if least is not None else f"{start}, at most {most}"
