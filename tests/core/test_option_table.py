# this_file: tests/core/test_option_table.py
"""The one table of options."""

from __future__ import annotations

import dataclasses
import datetime
import inspect
import math
import string
import threading
from typing import Any

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st
from tests.core.test_options import Codec, HalfStore, Store, called_later, later, yes
from tests.tables import rows

from opero import CircuitBreaker, ConcurrencyLimit, RateLimiter, RetryBudget, opero
from opero.core.options import Options
from opero.errors import OperoUsageError

pytestmark = pytest.mark.internal

NAMES = tuple(Options.declared)
# Of few characters: the table of all of them takes hypothesis half a minute on a busy machine.
TEXTS = st.text(string.printable + "é…", max_size=5)


CallableLater = type("CallableLater", (), {"__call__": called_later})

WRONG: dict[str, list[Any]] = {
    "cache": [None, 1, "yes", "memory"],
    "cache_ttl": [0, -1, "", "60", "1 fortnight", True, math.inf, [60]],
    "cache_backend": ["", "momory", "dsk:/tmp/x", "disk:", "memory:x", None, 5, HalfStore()],
    "cache_key": ["x", 5, ("x",), later],
    "cache_namespace": ["", None, 5, b"x"],
    "cache_maxsize": [0, -1, 1.0, "10", True, None],
    "cache_max_bytes": [0, -1, 1.5, "64", "big", True, None],
    "cache_if": [True, "x", later],
    "cache_copy": [None, 1, "deep"],
    "cache_codec": ["", "json", "pickle", None, 5, Store()],
    "cache_ignore": ["client", b"client", 5, None, [1], {"client": 1}],
    "cache_version": [1.5, True, ("1",)],
    "cache_stale_ttl": [0, -1, "", "60", True, math.inf],
    "cache_refresh": [0, 1, 1.0, -0.5, "0.8", True, math.nan],
    "retries": [-1, 1.0, "3", True, None],
    "backoff_factor": [0.5, 0, -1, math.inf, math.nan, "2", True, None],
    "min_delay": [-1, "soon", None, True, math.nan, "100"],
    "max_delay": [-1, "soon", None, True, math.nan, "100"],
    "jitter": [None, 0, 0.5, "full"],
    "retry_on": [
        *(None, 5, "ValueError", (), [ValueError], ValueError(), (ValueError, 5), int, (int,)),
        *((ValueError(),), later, tenacity.retry_if_exception_type, CallableLater()),
    ],
    "retry_if_result": [True, "x", 5, later],
    "deadline": [0, -1, "soon", True, math.nan],
    "retry_after_max": [-1, "soon", None, True, math.inf],
    "retry_budget": [0.1, True, "10%", [5], RetryBudget],
    "retry_nested": [None, 0, "no"],
    "wait": [5, "1s", tenacity.wait_fixed, later],
    "stop": [5, "1s", tenacity.stop_after_attempt, later],
    "arg_fallback": ["", 5, ("model",), b"model"],
    "fallback_on": [None, 5, (), [ValueError], ValueError(), later],
    "rate_limit": [0, -1, "100", "fast", True, [5], math.inf, RateLimiter, ConcurrencyLimit(5)],
    "circuit_breaker": [5, 0.5, "on", [5], CircuitBreaker, RateLimiter("5/s")],
    "concurrency": [0, -1, 1.5, "5", True, [5], ConcurrencyLimit, threading.Semaphore(5)],
    "timeout": [0, -1, "soon", True, math.nan],
    "idle_timeout": [0, -1, "soon", True, math.nan],
    "secret": ["api_key", 5, None, [1]],
    "on_event": [5, "print", [5], [print, None]],
}

RIGHT: dict[str, list[Any]] = {
    "cache": [True, False],
    "cache_ttl": [1, 0.5, "15m", datetime.timedelta(hours=1), None],
    "cache_backend": ["memory", "disk", "disk:answers", Store()],
    "cache_key": [None, yes],
    "cache_namespace": ["geo"],
    "cache_maxsize": [1, 10**9],
    "cache_max_bytes": [1, "64MB", "1GiB"],
    "cache_if": [None, yes],
    "cache_copy": [True, False],
    "cache_codec": ["auto", "plain", Codec()],
    "cache_ignore": [(), ["x"], {"x"}, frozenset({"x"})],
    "cache_version": [None, 2, "2"],
    "cache_stale_ttl": [None, 60, "1d"],
    "cache_refresh": [None, 0.8, 0.001],
    "retries": [0, 1, 10**6],
    "backoff_factor": [1, 1.0, 2],
    "min_delay": [0, 0.0, "10ms", datetime.timedelta(milliseconds=5)],
    "max_delay": [1, "1m"],
    "jitter": [True, False],
    "retry_on": [
        *(OSError, (OSError, ValueError), yes, KeyboardInterrupt, BaseException),
        tenacity.retry_if_exception_type(OSError),
    ],
    "retry_if_result": [None, yes],
    "deadline": [None, 5, "90s"],
    "retry_after_max": [0, 60, "1m"],
    "retry_budget": [None, RetryBudget()],
    "retry_nested": [True, False],
    "wait": [None, tenacity.wait_fixed(1), tenacity.wait_fixed(1) + tenacity.wait_random(0, 1)],
    "stop": [None, tenacity.stop_after_attempt(2), tenacity.stop_never],
    "arg_fallback": [None, "x"],
    "fallback_on": [OSError, (OSError,), yes],
    "rate_limit": [None, 5, 0.5, "100/minute", RateLimiter("5/s")],
    "circuit_breaker": [None, True, False, CircuitBreaker()],
    "concurrency": [None, 1, 10, ConcurrencyLimit(5)],
    "timeout": [None, 5, "250ms"],
    "idle_timeout": [None, 5, "250ms"],
    "secret": [(), ["x"], {"x"}],
    "on_event": [None, print, [], [print, yes], later],
}


def test_the_tables_below_leave_no_option_out() -> None:
    assert set(WRONG) == set(RIGHT) == set(NAMES)


@given(
    st.sampled_from(NAMES),
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        TEXTS,
        st.binary(max_size=5),
        st.lists(st.one_of(st.integers(), TEXTS), max_size=2),
        st.tuples(st.just(ValueError)),
        st.just(object()),
    ),
)
def test_whatever_is_refused_is_refused_by_name(name: str, value: Any) -> None:
    try:
        Options.of("opero", **{name: value})
    except OperoUsageError as error:
        if name not in str(error):
            raise AssertionError("the message does not name the option") from error


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().retries = 5  # type: ignore[misc]


def test_equal_options_are_equal_wherever_they_were_given() -> None:
    assert Options.of("opero", retries=3) == Options()


def test_given_lists_what_was_written_down_even_if_it_is_the_default() -> None:
    assert Options.of("opero", retries=3, cache=True).given == {"retries", "cache"}


def test_replace_keeps_what_was_given_and_adds_what_changes() -> None:
    options = Options.of("opero", retries=5, min_delay=1).replace("opero", retries=7)
    assert (options.retries, options.min_delay) == (7, 1)
    assert options.given == {"retries", "min_delay"}


def test_replace_checks_like_the_constructor() -> None:
    with pytest.raises(OperoUsageError, match=r"opero\(\) has no option 'retires'"):
        Options().replace("opero", retires=1)


@rows("name", NAMES)
def test_every_option_has_a_meaning_a_stage_and_a_default_that_passes_its_check(name: str) -> None:
    option = Options.declared[name]
    option.check(name, option.default)
    assert option.stage
    assert f" {name}: " in (Options.__doc__ or "")
    assert f" {name}: " in (opero.__doc__ or "")


def test_the_decorator_shows_the_options_as_its_parameters() -> None:
    shown = inspect.signature(opero)
    assert tuple(shown.parameters) == NAMES
    assert {p.kind for p in shown.parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert shown.return_annotation is inspect.Signature.empty
