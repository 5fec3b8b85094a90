"""Settings that are numbers: refused where they enter, in one wording."""

import math
import reprlib
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
) -> float:
    """Refuse what is not a finite number in a range; truth values and texts are none.

    Args:
        error: what is raised.
        name: of the setting, after the call that it is of: `"generate: min_p"`.
        value: of the setting.
        least: the smallest that is allowed.
        above: a bound that itself is not allowed, in place of `least`.
        most: the largest that is allowed.
        why: what the setting means, or what to do instead.

    Returns:
        the number.
    """
    low = above if least is None else least
    number = _finite(value)
    if number is not None and (low is None or number > low or number == least) and number <= most:
        return number
    raise error(f"{name} {_shown(value)} is not a number{_range(least, above, most)}{'; ' * bool(why)}{why}")


def check_whole(
    error: type[DPSLensError], name: str, value: object, *, least: int, most: Bound = math.inf, why: str = ""
) -> int:
    """Refuse what is not a whole number in a range; truth values, texts and 2.0 are none.

    Args:
        error: what is raised.
        name: of the setting, after the call that it is of: `"generate: max_new_tokens"`.
        value: of the setting.
        least: the smallest that is allowed.
        most: the largest that is allowed.
        why: what the setting means, or what to do instead.

    Returns:
        the number.
    """
    if isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most:
        return int(value)
    raise error(f"{name} {_shown(value)} is not a whole number{_range(least, None, most)}{'; ' * bool(why)}{why}")


def check_seed(error: type[DPSLensError], name: str, value: object) -> None:
    """Refuse a seed that torch cannot take, or would turn into another one: on a CPU it reads 32 bits."""
    check_whole(error, name, value, least=0, most=2**32 - 1)


def check_flag(error: type[DPSLensError], name: str, value: object) -> None:
    """Refuse what is neither True nor False: `"false"` would count as true."""
    if not isinstance(value, bool):
        raise error(f"{name} {_shown(value)} is neither True nor False")


def _shown(value: object) -> str:
    """A value for a message; a number of thousands of digits cannot be written."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return f"({type(value).__name__})"


def _finite(value: object) -> float | None:
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond all floats
        return None
    return number if math.isfinite(number) else None


def _range(least: Bound | None, above: Bound | None, most: Bound) -> str:
    start: Any = f" from {least}" if least is not None else f" above {above}" if above is not None else ""
    if math.isinf(most):
        return f"{start} up" if least is not None else start
    return f"{start} to {most}" if least is not None else f"{start}, at most {most}"
