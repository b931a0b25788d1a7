# this_file: src/opero/utils/units.py
"""Durations, rates and sizes as people write them: "250ms", "100/minute", "64MB"."""

from __future__ import annotations

import datetime
import math
import re

from opero.errors import OperoUsageError
from opero.utils.lazy import NamedTuple

Duration = float | int | str | datetime.timedelta
"""Seconds, a `timedelta`, or text: "250ms", "90s", "15m", "1h", "7d"."""

_UNITS = {
    "ms": 0.001,
    **dict.fromkeys(("s", "sec", "second"), 1.0),
    **dict.fromkeys(("m", "min", "minute"), 60.0),
    **dict.fromkeys(("h", "hour"), 3600.0),
    **dict.fromkeys(("d", "day"), 86400.0),
    **dict.fromkeys(("w", "week"), 604800.0),
}

# Compiled when the first text is read: most durations are numbers.
_AMOUNT = r"(?i)\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-z]+)\s*"
_RATE = r"(?i)\s*(\d+(?:\.\d+)?)\s*((?!per\b)[a-z$€£_]+?)?\s*(?:/|\bper\b)\s*(\d+(?:\.\d+)?)?\s*([a-z]+)\s*"

_CALLS = frozenset({"call", "calls", "request", "requests", "req"})
_SIZES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class Rate(NamedTuple):
    """`count` calls in each `period` seconds."""

    # A tuple's own method `count` is of no use here.
    count: float  # type: ignore[assignment]  # pyright: ignore[reportIncompatibleMethodOverride]
    period: float


class RateWindow(NamedTuple):
    """One of the limits that a rate names.

    Attributes:
        rate: How much, in how many seconds.
        unit: What is counted: "calls", or the user's own word for what calls cost.
    """

    rate: Rate
    unit: str = "calls"

    @property
    def weighted(self) -> bool:
        """Whether it counts what calls cost."""
        return self.unit != "calls"


def parse_seconds(value: object, option: str) -> float:
    """Return a duration as seconds.

    Args:
        value: What should be seconds, `timedelta` or text such as "250ms" or "1h 30m".
        option: Name of the option, for the message.

    Raises:
        OperoUsageError: It is no finite duration of zero or more.

    Example:
        >>> parse_seconds("1h 30m", "cache_ttl")
        5400.0
    """
    if isinstance(value, datetime.timedelta):
        found = value.total_seconds()
    elif isinstance(value, str):
        found = _text_seconds(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        found = _float(value)
    else:
        found = math.nan
    if not (math.isfinite(found) and found >= 0):
        raise OperoUsageError(
            f"{option}={value!r} is no duration. Write seconds (0 or more), a timedelta, "
            'or text like "250ms", "90s", "15m", "1h", "7d".'
        )
    return found


def parse_length(value: object, option: str) -> float:
    """Return a duration that is longer than 0 as seconds.

    Raises:
        OperoUsageError: It is none.
    """
    found = parse_seconds(value, option)
    if found <= 0:
        raise OperoUsageError(f"{option}={value!r} must be longer than 0.")
    return found


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _text_seconds(text: str) -> float:
    total, place = 0.0, 0
    for match in re.finditer(_AMOUNT, text):
        unit = _unit(match[2])
        if match.start() != place or unit is None:
            return math.nan
        total += float(match[1]) * unit
        place = match.end()
    return total if place == len(text) and text.strip() else math.nan


def _unit(name: str) -> float | None:
    name = name.lower()
    # Words have a plural, letters have none.
    return _UNITS.get(name) or (_UNITS.get(name[:-1]) if name[3:].endswith("s") else None)


def parse_windows(
    value: object, option: str = "rate_limit", *, weighted: bool = False
) -> tuple[RateWindow, ...]:
    """Return the limits that a rate names: one, or several with "&" between them.

    A word after the number says what is counted: "500 requests/minute & 30000 tokens/minute".

    Args:
        value: A number of calls per second, or text that names the period.
        option: Name of the option, for the message.
        weighted: Whether a number without a word counts what calls cost.

    Raises:
        OperoUsageError: One of them is no positive, finite rate.

    Example:
        >>> [window.rate.count for window in parse_windows("10/s & 500/minute")]
        [10.0, 500.0]
        >>> parse_windows("30000 tokens/minute")[0].unit
        'tokens'
    """
    found = []
    for part in value.split("&") if isinstance(value, str) else [value]:
        rate, unit = Rate(math.nan, math.nan), "units" if weighted else "calls"
        if isinstance(part, str):
            match = re.fullmatch(_RATE, part)
            period = _unit(match[4]) if match else None
            if match and period:
                rate = Rate(float(match[1]), float(match[3] or 1) * period)
                unit = (match[2] or unit).lower()
        elif isinstance(part, int | float) and not isinstance(part, bool):
            rate = Rate(_float(part), 1.0)
        if not all(0 < number < math.inf for number in rate):
            raise OperoUsageError(
                f"{option}={part!r} is no rate. Write calls per second (more than 0), "
                'text like "100/minute" or "1000/day"'
                + (", or a RateLimiter. None means no limit." if option == "rate_limit" else ".")
            )
        found.append(RateWindow(rate, "calls" if unit in _CALLS else unit))
    return tuple(found)


def parse_size(value: object, option: str) -> int:
    """Return a size in bytes from a whole number or text such as "64MB" (10^6) or "64MiB" (2^20).

    Raises:
        OperoUsageError: It is no size of one byte or more.
    """
    found = 0
    if isinstance(value, str):
        match = re.fullmatch(_AMOUNT, value)
        amount = float(match[1]) * _SIZES.get(match[2].lower(), 0) if match else 0.0
        found = int(amount) if math.isfinite(amount) else 0
    elif isinstance(value, int) and not isinstance(value, bool):
        found = value
    if found < 1:
        raise OperoUsageError(
            f'{option}={value!r} is no size. Write bytes (1 or more) or text like "64MB".'
        )
    return found


def format_seconds(seconds: float) -> str:
    """Write seconds for people: 0.1 s, 90 s, 15 min, 1 h, 7 d.

    Example:
        >>> format_seconds(3600), format_seconds(3599.9), format_seconds(0.25), format_seconds(90)
        ('1 h', '1 h', '0.25 s', '90 s')
    """
    if 100 <= seconds < math.inf:
        seconds = round(seconds)
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size and not seconds % size and seconds >= 2 * size - (unit != "min") * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def format_bytes(size: int) -> str:
    """Write a number of bytes for people.

    Example:
        >>> format_bytes(256_000_000), format_bytes(1_500), format_bytes(12)
        ('256 MB', '1.5 kB', '12 B')
    """
    for unit, step in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= 0.9995 * step:
            return f"{size / step:.3g} {unit}"
    return f"{size} B"
