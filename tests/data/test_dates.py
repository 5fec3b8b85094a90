"""Dates in common forms; what they mean is written out by hand."""

from datetime import date, datetime, timedelta, timezone

import numpy as np
import pandas as pd
import pytest

from dps_lens.data import load_users
from dps_lens.data.dates import is_missing, iso_dates
from dps_lens.errors import DataError


def error(index, message):
    return DataError(f"{index}: {message}")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["2014-9-1", "2014-10-01"], ["2014-09-01", "2014-10-01"]),
        (["2014/9/1", "2014.10.01"], ["2014-09-01", "2014-10-01"]),
        (["20140901"], ["2014-09-01"]),
        (["12 3, 2012", "01 5, 2013"], ["2012-12-03", "2013-01-05"]),
        (["2019", 2020, 2021.0, np.int64(2022)], ["2019", "2020", "2021", "2022"]),
        (["2014-9", "2014-10"], ["2014-09", "2014-10"]),
        ([1609459200, "1609459201"], ["2021-01-01T00:00:00+00:00", "2021-01-01T00:00:01+00:00"]),
        ([1609459200000], ["2021-01-01T00:00:00+00:00"]),
        (["Mon, 01 Sep 2014 10:00:00 +0200"], ["2014-09-01T08:00:00+00:00"]),
        (["2014-09-01T10:00:00Z", "2014-9-1 12:30:00+02:00"], ["2014-09-01T10:00:00+00:00", "2014-09-01T10:30:00+00:00"]),  # noqa: E501
        (["2014-9-1 10:00", "2014-09-01T10:00:00.5"], ["2014-09-01T10:00:00", "2014-09-01T10:00:00.500000"]),
        (["Sep 1, 2014", "2 October 2014"], ["2014-09-01", "2014-10-02"]),
        (["September 2014", "October 2014"], ["2014-09", "2014-10"]),
        (["12/31/2014", "1/2/2015"], ["2014-12-31", "2015-01-02"]),
        (["31.12.2014", "1.2.2015"], ["2014-12-31", "2015-02-01"]),
        ([date(2014, 9, 1)], ["2014-09-01"]),
        ([datetime(2014, 9, 1, 10, tzinfo=timezone(timedelta(hours=2)))], ["2014-09-01T08:00:00+00:00"]),
        ([pd.Timestamp("2014-09-01"), np.datetime64("2014-10-01T00:00:00")], ["2014-09-01T00:00:00", "2014-10-01T00:00:00"]),  # noqa: E501
        ([None, float("nan"), pd.NA, pd.NaT, "", "2014-09-01"], [None] * 5 + ["2014-09-01"]),
        (["3/4/2015"], ["2015-03-04"]),
        ([], []),
    ],
)  # fmt: skip
def test_dates_in_iso_form(values, expected):
    assert iso_dates(values, error) == expected


def test_iso_forms_sort_by_time():
    moments = ["2014-09-01T10:00:00Z", "2014-09-01T10:00:00.5Z", "2014-09-01T10:00:01Z", "2014-09-01T13:00:00+02:00"]
    found = iso_dates(moments, error)
    assert found == sorted(found)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["2014-01-01", "yesterday"], "1: 'yesterday' is no date that can be read"),
        (["2014-02-30"], "0: '2014-02-30' is no date"),
        (["2014-01-01", "2014"], r"1: '2014' \(year\) is written otherwise than '2014-01-01' \(day\)"),
        (["2014-01-01", "2014-01-01 10:00"], "written otherwise"),
        (["2014-01-01 10:00", "2014-01-01 10:00Z"], "written otherwise"),
        (["2014-01-01", "1/2/2014"], "written otherwise"),
        (["31/12/2014", "12/31/2014"], "'31/12/2014' has the day first and '12/31/2014' the month"),
        (["3/4/2015", "4/3/2015"], "0: day and month of '3/4/2015' cannot be told apart"),
        (["13/14/2015"], "no date"),
        ([True], "no date"),
        ([123], "no date"),
        (["12/1/15"], "no date"),
        (["10:00 PQT 1 Sep 2014"], "no date"),
        (["Monday"], "no date"),
    ],
)
def test_dates_that_cannot_be_ordered_are_refused(values, message):
    with pytest.raises(DataError, match=message):
        iso_dates(values, error)


def records(n=6, user="u", **columns):
    rows = [
        {"user_id": user, "id": f"d{i}", "title": f"Heading {i}", "text": f"Some words, number {i}."} for i in range(n)
    ]
    return [row | {name: values[i] for name, values in columns.items()} for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    "dates",
    [
        ["12/1/2015", "3/1/2016", "11/5/2017", "6/6/2018", "9/9/2019", "1/2/2021"],
        ["2014-9-1", "2014-10-01", "2014-11-01", "2014-12-01", "2015-1-1", "2015-02-01"],
        ["12 3, 2012", "01 5, 2013", "02 5, 2013", "03 5, 2013", "04 5, 2013", "05 6, 2014"],
        ["2019", 2020, "2021", 2022, "2023", 2024],
    ],
)
def test_the_newest_are_held_out_whatever_the_form(dates):
    shuffled = [records(date=dates)[i] for i in (4, 0, 5, 2, 1, 3)]
    user = load_users(shuffled)[0]
    assert [document.id for document in user.history] == ["d0", "d1", "d2", "d3"]
    assert [example.id for example in user.examples] == ["d4", "d5"]
    assert [one.id for one in user.discovery_examples()] == ["d3"]


def test_equal_dates_keep_the_order_of_the_file():
    user = load_users(records(date=["2020", "2021", "2021", "2020", "2022", "2022"]))[0]
    assert [document.id for document in user.history] == ["d0", "d3", "d1", "d2"]
    assert [example.id for example in user.examples] == ["d4", "d5"]


def test_records_of_a_data_frame_with_gaps():
    frame = pd.DataFrame(records(date=pd.date_range("2020-01-01", periods=6)[::-1]))
    user = load_users(frame)[0]
    assert [document.id for document in user.history] == ["d5", "d4", "d3", "d2"]
    frame.loc[2, "date"] = pd.NaT
    with pytest.warns(UserWarning, match="1 users, 'u' first, have documents without a date"):
        undated = load_users(frame)[0]
    assert not undated.dated
    frame["title"] = frame["title"].astype(object)
    frame.loc[1, "title"] = float("nan")
    with pytest.raises(DataError, match="DataFrame, record 1: field 'title' is missing"):
        load_users(frame)


def test_errors_name_record_and_field():
    with pytest.raises(DataError, match=r"list, record 3: field 'date': 'soon' is no date"):
        load_users(records(date=["2020", "2021", "2022", "soon", "2024", "2025"]))
    profile = [
        {"id": str(i), "title": "t", "abstract": f"words {i}", "year": year} for i, year in enumerate((2001, "x"))
    ]
    question = {"name": "a", "input": 'Generate an abstract for the title "x".', "output": "y", "profile": profile}
    with pytest.raises(DataError, match=r"list, record 0, profile, record 1: field 'year': 'x' is no date"):
        load_users([question])


def test_missing_values():
    assert all(map(is_missing, (None, float("nan"), np.float32("nan"), pd.NA, pd.NaT, np.datetime64("NaT"))))
    assert not any(map(is_missing, ("nan", "", 0, False, np.float64(1), pd.Timestamp("2020"))))
