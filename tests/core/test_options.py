# this_file: tests/core/test_options.py
"""Every option: what it refuses when a function is decorated, and how a mistyped name is met."""

from __future__ import annotations

import datetime
import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import tenacity
from tests.tables import rows

from opero import CircuitBreaker, ConcurrencyLimit, RateLimiter, RetryBudget, opero
from opero.errors import OperoUsageError


class Store:
    """Has a store's verbs."""

    get = set = delete = clear = lambda *given: None


class HalfStore:
    get = set = lambda *given: None


class Codec:
    """Has a codec's verbs."""

    encode = decode = lambda *given: b""


async def later(*given: object) -> bool:
    return True


def yes(*given: object) -> bool:
    return True


async def called_later(self: object, *given: object) -> bool:
    return True


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


def each(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in table.items() for value in values]


@rows(("name", "value"), each(WRONG))
def test_a_wrong_value_is_refused_before_there_is_a_function(name: str, value: Any) -> None:
    with pytest.raises(OperoUsageError) as raised:
        opero(**{name: value})
    message = str(raised.value)
    assert message.startswith(f"{name}={value!r}"), "it names the option and the value"
    assert len(message) > len(f"{name}={value!r}") + 15, "it tells the fix"


class Rude:
    """Its own code raises, whatever is asked of it."""

    def refuse(self, *given: object) -> Any:
        raise RuntimeError("not an error of opero")

    __repr__ = __eq__ = __bool__ = __getattr__ = refuse
    __hash__ = None  # type: ignore[assignment]


class RudeNumber(int):
    __repr__ = __eq__ = __lt__ = __le__ = __gt__ = __ge__ = Rude.refuse
    __hash__ = None  # type: ignore[assignment]


@rows("name", WRONG)
def test_a_value_whose_own_code_raises_is_refused_like_any_other(name: str) -> None:
    array = pytest.importorskip("numpy").array([1, 2])
    for value in (Rude(), [Rude()], RudeNumber(-1), array):
        with pytest.raises(OperoUsageError, match=f"^{name}=.{{15}}") as raised:
            opero(**{name: value})
        shown = str(raised.value)
        assert type(value).__name__ in shown or repr(value) in shown


@rows(("name", "value"), each(RIGHT))
def test_a_right_value_is_taken_as_it_is(name: str, value: Any) -> None:
    def fetch(x: int = 1) -> int:
        return x

    def stream() -> Iterator[int]:
        yield 1

    body: Any = stream if name == "idle_timeout" else fetch
    decorated = opero(**{name: value})(body)
    assert getattr(decorated.options, name) is value
    assert decorated.options.given == {name}


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("retires", "retries"),
        ("retry", "retry_on"),
        ("ratelimit", "rate_limit"),
        ("rate_limt", "rate_limit"),
        ("cache_tll", "cache_ttl"),
        ("ttl", None),
        ("backoff", "backoff_factor"),
        ("fallback", "fallback_on"),
        ("on_events", "on_event"),
        ("frobnicate", None),
    ],
)
def test_an_unknown_option_is_met_with_the_nearest_known_one(wrong: str, meant: str | None) -> None:
    with pytest.raises(TypeError) as raised:
        opero(**{wrong: 1})
    hint = f" Did you mean {meant!r}?" if meant else ""
    assert str(raised.value) == f"opero() has no option {wrong!r}.{hint}"


def test_pauses_that_cannot_be_are_refused() -> None:
    with pytest.raises(OperoUsageError, match="min_delay='1m' is longer than max_delay=30"):
        opero(min_delay="1m")


@pytest.mark.parametrize("given", [{"cache_stale_ttl": "1h"}, {"cache_refresh": 0.8}])
def test_what_follows_an_expiry_needs_one(given: dict[str, Any]) -> None:
    with pytest.raises(OperoUsageError, match=rf"{next(iter(given))}=.* needs entries that expire"):
        opero(cache_ttl=None, **given)


@pytest.mark.parametrize("option", ["secret", "cache_ignore"])
def test_a_single_name_is_met_with_the_tuple_that_was_meant(option: str) -> None:
    with pytest.raises(OperoUsageError, match=rf"write {option}=\('client',\)"):
        opero(**{option: "client"})


def test_an_exception_instance_is_met_with_its_class() -> None:
    with pytest.raises(OperoUsageError, match=r"is an instance: write the class, retry_on=OSError"):
        opero(retry_on=OSError("x"))  # type: ignore[arg-type]


def test_a_strategy_class_is_met_with_its_call() -> None:
    with pytest.raises(OperoUsageError, match=r"write wait=wait_fixed\(\.\.\.\)"):
        opero(wait=tenacity.wait_fixed)


@pytest.mark.parametrize("option", ["secret", "cache_ignore", "arg_fallback"])
def test_a_name_that_is_no_parameter_is_met_with_those_that_are(option: str) -> None:
    def fetch(model: str, prompt: str) -> None: ...

    value = "modell" if option == "arg_fallback" else ("modell",)
    with pytest.raises(
        OperoUsageError,
        match=rf"{option}='modell': fetch\(\) has no parameter 'modell'. "
        "Did you mean 'model'. Its parameters: model, prompt.",
    ):
        opero(**{option: value})(fetch)


@pytest.mark.parametrize("star", ["args", "kwargs"])
def test_a_starred_parameter_holds_no_fallback_values(star: str) -> None:
    def fetch(x: int, *args: int, **kwargs: int) -> None: ...

    with pytest.raises(OperoUsageError, match="Its parameters: x"):
        opero(arg_fallback=star)(fetch)


@pytest.mark.parametrize("option", ["secret", "cache_ignore"])
def test_a_function_that_takes_any_keyword_may_have_any_name_declared(option: str) -> None:
    def fetch(**more: int) -> None: ...

    assert opero(**{option: ("api",)})(fetch)
