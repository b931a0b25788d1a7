# this_file: tests/utils/test_units.py
"""Durations, rates and sizes as people write them."""

from __future__ import annotations

import contextlib
import datetime
import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tables import rows

from opero.errors import OperoUsageError
from opero.utils.units import format_seconds, parse_seconds, parse_size, parse_windows

pytestmark = pytest.mark.internal

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(min_value=-(10**400), max_value=10**400),
    st.floats(),
    st.text(max_size=20),
    st.from_regex(r"\d{1,400} ?(ms|s|m|h|d|w|mb|gib|/s|/min)", fullmatch=True),
    st.timedeltas(),
    st.lists(st.integers(), max_size=2),
)


@contextlib.contextmanager
def refusal_naming(option: str) -> Iterator[None]:
    """Let a usage error pass if it names the option, and nothing else."""
    try:
        yield
    except OperoUsageError as error:
        if f"{option}=" not in str(error):
            raise AssertionError(f"the message does not name {option}") from error


@rows(
    ("text", "seconds"),
    [
        (0, 0.0),
        (1.5, 1.5),
        (datetime.timedelta(minutes=2), 120.0),
        ("250ms", 0.25),
        ("90s", 90.0),
        ("90 s", 90.0),
        (" 90s ", 90.0),
        ("90 seconds", 90.0),
        ("1 second", 1.0),
        ("15m", 900.0),
        ("15min", 900.0),
        ("2 minutes", 120.0),
        ("1h", 3600.0),
        ("1H", 3600.0),
        ("1h 30m", 5400.0),
        ("1h30m", 5400.0),
        ("7d", 604800.0),
        ("2 weeks", 1209600.0),
        (".5s", 0.5),
        ("1.5h", 5400.0),
        ("0s", 0.0),
    ],
)
def test_a_duration_is_read(text: Any, seconds: float) -> None:
    assert parse_seconds(text, "max_delay") == seconds


@rows(
    "wrong",
    [
        *("", " ", "90", "s", "5 parsecs", "-5s", "1h and 30m", "1,5s", "1e3s", "h1", "1s;", "1ss"),
        *(-1, -0.001, math.nan, math.inf, True, None, [1], b"1s", datetime.timedelta(-1)),
        *(10**400, "9" * 400 + "d"),
    ],
)
def test_what_is_no_duration_is_refused_with_the_option_and_examples(wrong: Any) -> None:
    with pytest.raises(OperoUsageError, match=r'^max_delay=.*is no duration.*"250ms"'):
        parse_seconds(wrong, "max_delay")


@given(ANYTHING)
def test_a_duration_is_finite_and_not_negative_or_an_error(value: Any) -> None:
    with refusal_naming("deadline"):
        assert 0 <= parse_seconds(value, "deadline") < math.inf


@given(st.floats(min_value=0, max_value=1e9), st.sampled_from(["ms", "s", "min", "h", "d", "w"]))
def test_units_multiply(amount: float, unit: str) -> None:
    one = parse_seconds(f"1{unit}", "wait")
    assert parse_seconds(f"{amount:.6f}{unit}", "wait") == pytest.approx(round(amount, 6) * one)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        (5, (5.0, 1.0)),
        (0.5, (0.5, 1.0)),
        ("100/minute", (100.0, 60.0)),
        ("100 / min", (100.0, 60.0)),
        ("100 per minute", (100.0, 60.0)),
        ("1000/day", (1000.0, 86400.0)),
        ("10/s", (10.0, 1.0)),
        ("10/sec", (10.0, 1.0)),
        ("3/2s", (3.0, 2.0)),
        ("3 per 2 hours", (3.0, 7200.0)),
        ("1.5/500ms", (1.5, 0.5)),
        ("5/H", (5.0, 3600.0)),
    ],
)
def test_a_rate_is_read(text: Any, rate: tuple[float, float]) -> None:
    assert parse_windows(text)[0].rate == rate


@pytest.mark.parametrize(
    "wrong",
    [
        *(
            "",
            "100",
            "/minute",
            "100/",
            "100/fortnight",
            "0/s",
            "5/0s",
            "-5/s",
            "5perminute",
            "a/s",
        ),
        *(0, -1, math.nan, math.inf, True, None, [5], 10**400, "9" * 400 + "/s"),
    ],
)
def test_what_is_no_rate_is_refused_with_the_option_and_examples(wrong: Any) -> None:
    with pytest.raises(OperoUsageError, match=r'^rate_limit=.*is no rate.*"100/minute"'):
        parse_windows(wrong)


@given(ANYTHING)
def test_a_rate_is_positive_and_finite_or_an_error(value: Any) -> None:
    with refusal_naming("calls"):
        rate = parse_windows(value, "calls")[0].rate
        assert 0 < rate.count < math.inf
        assert 0 < rate.period < math.inf


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        ("1B", 1),
        ("64MB", 64_000_000),
        ("64 mb", 64_000_000),
        ("64MiB", 67_108_864),
        ("1.5kB", 1500),
        ("2GB", 2_000_000_000),
        ("1GiB", 1_073_741_824),
    ],
)
def test_a_size_is_read(text: Any, size: int) -> None:
    assert parse_size(text, "cache_max_bytes") == size


@pytest.mark.parametrize(
    "wrong", ["", "64", "MB", "64 M", "0MB", "0.1B", 0, -1, 1.5, True, None, "9" * 400 + "GB"]
)
def test_what_is_no_size_is_refused_with_the_option_and_an_example(wrong: Any) -> None:
    with pytest.raises(OperoUsageError, match=r'^cache_max_bytes=.*is no size.*"64MB"'):
        parse_size(wrong, "cache_max_bytes")


@given(ANYTHING)
def test_a_size_is_a_positive_int_or_an_error(value: Any) -> None:
    with refusal_naming("limit"):
        size = parse_size(value, "limit")
        assert type(size) is int
        assert size >= 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.00012, "0.00012 s"),
        (0.25, "0.25 s"),
        (1, "1 s"),
        (60, "60 s"),
        (90, "90 s"),
        (99.96, "100 s"),
        (119, "119 s"),
        (120, "2 min"),
        (900, "15 min"),
        (999.9, "1000 s"),
        (1234.5, "1234 s"),
        (3600, "1 h"),
        (5400, "90 min"),
        (86400, "1 d"),
        (90000, "25 h"),
        (604800, "7 d"),
        (12345678, "12345678 s"),
    ],
)
def test_seconds_are_written_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@given(st.floats(min_value=1e-3, max_value=1e9))
def test_what_is_written_reads_back_as_nearly_the_same(seconds: float) -> None:
    assert parse_seconds(format_seconds(seconds), "x") == pytest.approx(seconds, rel=0.01)
