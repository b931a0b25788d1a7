# this_file: src/opero/core/retry_after.py
"""A service's own request to wait, read from the error or response of whatever client library.

No client library is imported: the errors of httpx, requests, aiohttp, urllib, botocore, openai,
anthropic, google-api-core and google-genai all carry a response, headers, a status or details in
one of a few places. What is found there belongs to strangers and may do anything when touched.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from opero.core.classify import (
    first_found,
    header_text,
    read_headers,
    read_status,
    safe_get,
    says_nothing,
)
from opero.errors import OperoUsageError
from opero.utils.units import parse_seconds

_THROTTLED: Final = frozenset({429, 503})
_DETAIL_NAMES: Final = ("details", "body")
"""Where Google's error details are: on its own errors, and on those of SDKs that show the body."""

_EPOCH_FROM: Final = 1_000_000_000
"""From this number on, a delay is a moment (seconds since 1970): no one asks to wait 31 years."""

_MILLISECONDS_FROM: Final = 1_000_000_000_000

_RELEVANT: Final = re.compile(r"retry-after(-ms)?|date|.*rate-?limit.*")
_BUCKETS: Final = (
    # What remains of a bucket, and when it is full again.
    (re.compile(r"(x-rate-?limit|ratelimit)-remaining(-[\w-]+)?"), "{0}-reset{1}"),
    (re.compile(r"anthropic-ratelimit-([\w-]+)-remaining"), "anthropic-ratelimit-{0}-reset"),
)


class Hint(NamedTuple):
    """How long a service asked to wait.

    Attributes:
        seconds: From now on, 0 or more.
        source: The header or attribute that said so.
    """

    seconds: float
    source: str


def requested_wait(subject: object, *, now: float | None = None) -> Hint | None:
    """Return how long a service asks to wait before the next call, None if it does not say.

    In this order: `retry-after-ms`; `Retry-After` as seconds or as an HTTP date (RFC 9110 §10.2.3),
    which is counted against the answer's own `Date`, so that a wrong clock on either side does no
    harm; Google's `RetryInfo` (google.rpc, error_details.proto); an attribute `retry_after`; and
    only with status 429 or 503 the reset time of the rate-limit bucket of which nothing is left
    (`x-ratelimit-remaining…: 0`, `anthropic-ratelimit-…-remaining: 0`), the longest if there are
    several. An error that says nothing is asked for its `__cause__`: SDKs wrap the transport's
    error, which holds the answer.

    Args:
        subject: An exception or a response object. Whatever it does when it is looked at, this
            function does not raise.
        now: Wall-clock seconds since the epoch, for dates in answers without `Date`; the machine's
            clock by default.

    Example:
        >>> class TooMany(Exception):
        ...     headers = {"Retry-After": "2"}
        >>> requested_wait(TooMany())
        Hint(seconds=2.0, source='retry-after')
    """
    return first_found(subject, lambda node: _read_one(node, now), _longest)


def _longest(hints: Iterable[Hint | None]) -> Hint | None:
    return max((each for each in hints if each is not None), default=None)


def _read_one(subject: object, now: float | None) -> Hint | None:
    """Read one exception or response."""
    if says_nothing(subject):
        return None
    response = safe_get(subject, "response")
    places = (subject,) if response is None else (subject, response)
    headers: dict[str, str] = {}
    for place in places:
        for name, value in read_headers(place, _RELEVANT.fullmatch).items():
            headers.setdefault(name, value)
    moment = time.time() if now is None else now
    if "date" in headers:
        sent = _moment(headers["date"])
        moment = moment if sent is None else sent
    hint = _retry_after(headers, moment) if headers else None
    hint = hint or _retry_info(places) or _attribute(places, moment)
    if hint is None and headers and read_status(places) in _THROTTLED:
        hint = _exhausted(headers, moment)
    return hint


# --- ways to say it -----------------------------------------------------------------------------


def _retry_after(headers: Mapping[str, str], now: float) -> Hint | None:
    milliseconds = _number(headers.get("retry-after-ms", ""))
    if milliseconds is not None:
        return Hint(milliseconds / 1000, "retry-after-ms")
    seconds = _delay(headers.get("retry-after", ""), now)
    return None if seconds is None else Hint(seconds, "retry-after")


def _retry_info(places: tuple[object, ...]) -> Hint | None:
    for place in places:
        for name in _DETAIL_NAMES:
            for detail in _details(safe_get(place, name)):
                seconds = _retry_delay(detail)
                if seconds is not None:
                    return Hint(seconds, "RetryInfo")
    return None


def _details(found: object) -> Iterator[object]:
    """Unfold `{"error": {"details": [...]}}`, a list around it, and plain lists."""
    for _ in range(4):
        if isinstance(found, list | tuple) and len(found) == 1 and isinstance(found[0], Mapping):
            inner = found[0]
            if "error" not in inner:
                break
            found = inner
        if not isinstance(found, Mapping):
            break
        found = found.get("error") or found.get("details")
    if isinstance(found, list | tuple):
        yield from found


def _retry_delay(detail: object) -> float | None:
    """Return the seconds of a `RetryInfo`, as a protobuf message or as JSON."""
    if isinstance(detail, Mapping):
        kind = detail.get("@type")
        if not (isinstance(kind, str) and kind.endswith("RetryInfo")):
            return None
        delay = detail.get("retryDelay")
    else:
        delay = safe_get(detail, "retry_delay")
    if isinstance(delay, str):
        return _span(header_text(delay))
    if isinstance(delay, timedelta):
        return _finite(delay.total_seconds())
    seconds, nanos = safe_get(delay, "seconds"), safe_get(delay, "nanos")
    if isinstance(seconds, int) and isinstance(nanos, int):
        return _finite(seconds + nanos / 1e9)
    return None


def _attribute(places: tuple[object, ...], now: float) -> Hint | None:
    for place in places:
        value = safe_get(place, "retry_after")
        seconds = None
        if isinstance(value, timedelta):
            seconds = _finite(value.total_seconds())
        elif isinstance(value, int | float | str) and not isinstance(value, bool):
            seconds = _delay(header_text(value), now)
        if seconds is not None:
            return Hint(seconds, "retry_after")
    return None


def _exhausted(headers: Mapping[str, str], now: float) -> Hint | None:
    hints = []
    for name, value in headers.items():
        for pattern, reset_name in _BUCKETS:
            match = pattern.fullmatch(name)
            if match and _number(value) == 0:
                reset = reset_name.format(*(group or "" for group in match.groups()))
                seconds = _delay(headers.get(reset, ""), now)
                if seconds is not None:
                    hints.append(Hint(seconds, reset))
    return _longest(hints)


# --- amounts ------------------------------------------------------------------------------------


def _delay(text: str, now: float) -> float | None:
    """Return the seconds from `now` on.

    They are written as seconds ("2", "0.5"), a span ("6m0s", "120ms"), or a moment: seconds or
    milliseconds since 1970, an HTTP date, ISO 8601.
    """
    if not text:
        return None
    number = _number(text)
    if number is None and "," in text:
        # A field that was sent twice.
        numbers = [_number(part) for part in text.split(",")]
        number = None if None in numbers else max(each for each in numbers if each is not None)
    if number is not None:
        if number >= _MILLISECONDS_FROM:
            number /= 1000
        return _finite(max(0.0, number - now)) if number >= _EPOCH_FROM else number
    span = _span(text)
    if span is not None:
        return span
    moment = _moment(text)
    return None if moment is None else _finite(max(0.0, moment - now))


def _finite(number: float) -> float | None:
    """Return a number as a float if it is finite and not negative."""
    try:
        number = float(number)
    except OverflowError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _number(text: str) -> float | None:
    try:
        return _finite(float(text))
    except ValueError:
        return None


def _span(text: str) -> float | None:
    try:
        return parse_seconds(text, "reset")
    except OperoUsageError:
        return None


def _moment(text: str) -> float | None:
    """Return an HTTP date or an ISO 8601 moment as seconds since the epoch."""
    from email.utils import parsedate_to_datetime

    for parse in (parsedate_to_datetime, datetime.fromisoformat):
        try:
            moment = parse(text.upper())
            # Without a zone they mean UTC (RFC 9110 §5.6.7), never the zone of this machine.
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, TypeError, IndexError, OverflowError):
            continue
    return None
