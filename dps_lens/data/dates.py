"""Dates in any common form, as ISO dates that sort by time."""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from numbers import Real
from typing import Any

import numpy as np

_KNOWN, _MONTH_FIRST, _DAY_FIRST = "known", "month first", "day first"
_YEARS, _SECONDS, _MILLISECONDS = (1000, 3000), (10**8, 4_200_000_000), (10**11, 4_200_000_000_000)
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_ISO = re.compile(r"(\d{4})(?:([-/.])(\d{1,2})(?:\2(\d{1,2})(?:[T ]+(\d.*))?)?)?")
_COMPACT = re.compile(r"(\d{4})(\d\d)(\d\d)")
_NUMERIC = re.compile(r"(\d{1,2})([-/.])(\d{1,2})\2(\d{4})(?:,?[T ]+(\d.*))?")
_REVIEWED = re.compile(r"(\d{1,2}) (\d{1,2}), (\d{4})")
_NUMBER = re.compile(r"\d+(\.\d+)?")


def is_missing(value: object) -> bool:
    """None, NaN, and what pandas puts where there is no value."""
    if value is None or type(value).__name__ == "NAType":
        return True
    return isinstance(value, float | datetime | np.generic) and bool(value != value)  # noqa: PLR0124


@dataclass(frozen=True)
class _Reading:
    """What a date may mean.

    Attributes:
        form: how it is written, down to what it leaves out.
        by_order: ISO dates by the order of day and month.
    """

    form: str
    by_order: dict[str, str]


def iso_dates(values: Sequence[Any], error: Callable[[int, str], Exception]) -> list[str | None]:
    """The dates of one history in ISO form, so that strings sort by time; None for those that are missing.

    Day and month are told apart by the whole history: by a number above 12, or where both readings put the documents
    into the same order; then the month is taken to come first.

    Args:
        values: as they were read: text, numbers (a year, seconds or milliseconds since 1970), dates and times.
        error: makes an error of a place in `values` and what is wrong there.

    Raises:
        DataError: a date cannot be read, is written in another form than the others, or its day and month cannot be
            told apart; as `error` makes it.
    """
    readings: dict[int, _Reading] = {}
    for index, value in enumerate(values):
        if not is_missing(value) and not (isinstance(value, str) and not value.strip()):
            try:
                readings[index] = _read(value)
            except (ValueError, OverflowError):
                raise error(index, f"{value!r} is no date that can be read; write YYYY-MM-DD") from None
    _check_forms(values, readings, error)
    order = _order(values, readings, error)
    return [readings[index].by_order[order] if index in readings else None for index in range(len(values))]


def _check_forms(values: Sequence[Any], readings: dict[int, _Reading], error: Callable[[int, str], Exception]) -> None:
    first = next(iter(readings), 0)
    for index, reading in readings.items():
        if reading.form != readings[first].form:
            raise error(
                index,
                f"{values[index]!r} ({reading.form}) is written otherwise than {values[first]!r} "
                f"({readings[first].form}), so that their order is not known; write all dates of a user in one form",
            )


def _order(values: Sequence[Any], readings: dict[int, _Reading], error: Callable[[int, str], Exception]) -> str:
    """How day and month are ordered in dates that do not say it."""
    orders = [one.by_order for one in readings.values()]
    if not orders or _KNOWN in orders[0]:
        return _KNOWN
    possible = [order for order in (_MONTH_FIRST, _DAY_FIRST) if all(order in one for one in orders)]
    if not possible:
        month = next(index for index, one in readings.items() if _DAY_FIRST not in one.by_order)
        day = next(index for index, one in readings.items() if _MONTH_FIRST not in one.by_order)
        raise error(
            max(month, day), f"{values[day]!r} has the day first and {values[month]!r} the month; write YYYY-MM-DD"
        )
    if len(possible) > 1 and len({tuple(_ranks([one[order] for one in orders])) for order in possible}) > 1:
        index = next(index for index, one in readings.items() if len({*one.by_order.values()}) > 1)
        raise error(
            index,
            f"day and month of {values[index]!r} cannot be told apart, nor by the user's other dates; write YYYY-MM-DD",
        )
    return possible[0]


def _ranks(dates: Sequence[str]) -> list[int]:
    places = {one: place for place, one in enumerate(sorted({*dates}))}
    return [places[one] for one in dates]


def _read(value: Any) -> _Reading:
    if isinstance(value, np.datetime64):
        return _read(value.astype("datetime64[us]").item())
    if isinstance(value, date):
        return _of_time(value) if isinstance(value, datetime) else _Reading("day", {_KNOWN: value.isoformat()})
    if isinstance(value, bool) or not isinstance(value, str | Real):
        raise ValueError
    return _of_text(str(value).strip())


def _of_text(text: str) -> _Reading:
    if found := _COMPACT.fullmatch(text):
        return _Reading("day", {_KNOWN: _day(*map(int, found.groups()))})
    if found := _REVIEWED.fullmatch(text):
        month, day, year = map(int, found.groups())
        return _Reading("month day, year", {_KNOWN: _day(year, month, day)})
    for form, read in ((_NUMBER, _of_number), (_ISO, _of_iso), (_NUMERIC, _of_numbers)):
        if found := form.fullmatch(text):
            return read(found)
    return _of_words(text)


def _of_number(found: re.Match[str]) -> _Reading:
    number = float(found[0])
    if _YEARS[0] <= number < _YEARS[1] and number == int(number):
        return _Reading("year", {_KNOWN: f"{int(number):04}"})
    for (low, high), unit in ((_SECONDS, 1), (_MILLISECONDS, 1000)):
        if low <= number < high:
            moment = _EPOCH + timedelta(seconds=number / unit)
            return _Reading("seconds" if unit == 1 else "milliseconds", {_KNOWN: moment.isoformat()})
    raise ValueError


def _of_iso(found: re.Match[str]) -> _Reading:
    year, _, month, day, time = found.groups()
    if day is None:
        checked = _day(int(year), int(month or 1), 1)
        return _Reading("month" if month else "year", {_KNOWN: checked[:7] if month else checked[:4]})
    checked = _day(int(year), int(month), int(day))
    return _of_time(_parsed(f"{checked} {time}")) if time else _Reading("day", {_KNOWN: checked})


def _of_numbers(found: re.Match[str]) -> _Reading:
    one, _, two, year, time = found.groups()
    by_order, form = {}, "numbers, the year last"
    for order, month, day in ((_MONTH_FIRST, one, two), (_DAY_FIRST, two, one)):
        if int(month) <= 12:
            iso = _day(int(year), int(month), int(day))
            read = _of_time(_parsed(f"{iso} {time}")) if time else _Reading("day", {_KNOWN: iso})
            by_order[order], form = read.by_order[_KNOWN], f"{read.form} in numbers, the year last"
    if not by_order:
        raise ValueError
    return _Reading(form, by_order)


def _of_words(text: str) -> _Reading:
    """Names of months, and the dates of e-mails."""
    if not re.search(r"[^\W\d_]{3}", text) or not re.search(r"\d{4}", text):
        raise ValueError
    # What a text leaves out is taken from the default: it shows where two defaults differ.
    one, two = (_parsed(text, default=datetime(2001, month, month)) for month in (1, 2))
    if one.month != two.month:
        raise ValueError
    if ":" in text:
        return _of_time(one)
    iso = one.date().isoformat()
    return (
        _Reading("day in words", {_KNOWN: iso}) if one.day == two.day else _Reading("month in words", {_KNOWN: iso[:7]})
    )


def _parsed(text: str, **options: Any) -> datetime:
    from dateutil import parser

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a time zone that is unknown is no time zone
        try:
            return parser.parse(text, **options)
        except (ValueError, OverflowError, Warning) as error:
            raise ValueError from error


def _of_time(moment: datetime) -> _Reading:
    if moment.tzinfo is None:
        return _Reading("time", {_KNOWN: moment.isoformat()})
    return _Reading("time with its offset", {_KNOWN: moment.astimezone(timezone.utc).isoformat()})


def _day(year: int, month: int, day: int) -> str:
    return date(year, month, day).isoformat()
