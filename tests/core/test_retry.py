# this_file: tests/core/test_retry.py
"""Retry: what is tried again, how often, and after which pause."""

from __future__ import annotations

import asyncio
import io
import itertools
import sqlite3
import types
import zipfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import tenacity
from hypothesis import strategies as st
from tests.tables import rows

from opero import opero
from opero.errors import (
    OperoWarning,
)
from opero.testing import FakeClock, flaky, set_disabled

# --- decisions: the pauses ------------------------------------------------------------------------

attempts = st.integers(1, 10_000)


# --- how often ------------------------------------------------------------------------------------


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_calls_are_one_plus_retries(face: Any, clock: FakeClock, retries: int) -> None:
    body = flaky("never", failures=99)
    with pytest.raises(ConnectionError, match=f"flaky failure {1 + retries} of"):
        face.run(opero(cache=False, retries=retries)(face.of(body)))
    assert body.calls == 1 + retries


def test_three_retries_are_the_default(face: Any, clock: FakeClock) -> None:
    body = flaky("never", failures=99)
    with pytest.raises(ConnectionError):
        face.run(opero(cache=False)(face.of(body)))
    assert (body.calls, len(clock.sleeps)) == (4, 3)


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_it_stops_with_the_first_success(face: Any, clock: FakeClock, failures: int) -> None:
    body = flaky("fine", failures=failures)
    assert face.run(opero(cache=False)(face.of(body))) == "fine"
    assert (body.calls, len(clock.sleeps)) == (failures + 1, failures)


def test_every_call_starts_with_a_fresh_count(face: Any, clock: FakeClock) -> None:
    body = flaky("fine", failures=5)
    fetch = opero(cache=False, retries=2)(face.of(body))
    with pytest.raises(ConnectionError):
        face.run(fetch)
    assert face.run(fetch) == "fine"
    assert body.calls == 6


def test_no_jitter_gives_the_exact_pauses(face: Any, clock: FakeClock) -> None:
    fetch = opero(
        cache=False,
        retries=5,
        min_delay="500ms",
        max_delay=3,
        backoff_factor=2,
        jitter=False,
    )(face.of(flaky("fine", failures=5)))
    face.run(fetch)
    assert clock.sleeps == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert fetch.stats.slept == 9.5
    assert fetch.stats.retries == 5


def test_the_default_pauses_bridge_about_half_a_second(face: Any, clock: FakeClock) -> None:
    face.run(opero(cache=False)(face.of(flaky("fine", failures=3))))
    for pause, highest in zip(clock.sleeps, (0.15, 0.225, 0.3375), strict=True):
        assert 0.1 <= pause <= highest * 1.000001


# --- what is retried ------------------------------------------------------------------------------


def is_busy(error: BaseException) -> bool:
    return "1 of" in str(error)


@rows(
    ("wanted", "calls"),
    [
        (ConnectionError, 4),
        (OSError, 4),
        ((ValueError, ConnectionError), 4),
        (BaseException, 4),
        (ValueError, 1),
        ((ValueError, KeyError), 1),
        (is_busy, 2),
        (lambda error: False, 1),
        (tenacity.retry_if_exception_type(ConnectionError), 4),
        (tenacity.retry_if_exception_type(ValueError), 1),
        (tenacity.retry_if_exception_message(match=".*[12] of"), 3),
        (tenacity.retry_if_not_exception_type(ConnectionError), 1),
        (
            tenacity.retry_if_exception_type(OSError)
            & tenacity.retry_if_exception_message(match=".*1 of"),
            2,
        ),
        (
            tenacity.retry_if_exception_type(KeyError)
            | tenacity.retry_if_exception_message(match=".*1 of"),
            2,
        ),
        (tenacity.retry_never, 1),
        (tenacity.retry_always, 4),
    ],
)
def test_retry_on_decides(face: Any, clock: FakeClock, wanted: Any, calls: int) -> None:
    body = flaky("never", failures=99)
    with pytest.raises(ConnectionError, match=f"flaky failure {calls} of"):
        face.run(opero(cache=False, retry_on=wanted)(face.of(body)))
    assert body.calls == calls


def broken(subject: Any) -> Any:
    raise LookupError("the predicate's own")


class BrokenStrategy(tenacity.retry_base):
    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        raise LookupError("the strategy's own")


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({"retry_on": broken}, 1),
        ({"retry_on": BrokenStrategy()}, 1),
        ({"stop": broken}, 1),
        ({"wait": broken}, 4),
        ({"wait": lambda state: float("nan")}, 4),
        ({"wait": lambda state: float("inf")}, 4),
        ({"wait": lambda state: "soon"}, 4),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else str(value),
)
def test_a_broken_predicate_warns_and_never_hides_the_error(
    face: Any, clock: FakeClock, options: dict[str, Any], calls: int
) -> None:
    body = flaky("never", failures=99)
    with (
        pytest.warns(OperoWarning, match=r"raised (LookupError|ValueError)"),
        pytest.raises(ConnectionError),
    ):
        face.run(opero(cache=False, **options)(face.of(body)))
    assert body.calls == calls
    assert all(0.1 <= pause <= 1 for pause in clock.sleeps)


@rows("passing", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError])
@rows("wanted", [BaseException, lambda error: True])
@rows("failures", [0, 1])
def test_only_exceptions_are_ever_retried(
    face: Any, clock: FakeClock, passing: type[BaseException], wanted: Any, failures: int
) -> None:
    calls = 0

    def body(model: str = "a") -> None:
        nonlocal calls
        calls += 1
        raise ConnectionError if calls <= failures else passing("now")

    fetch = opero(
        cache=False,
        retry_on=wanted,
        fallback_on=wanted,
        arg_fallback="model" if not failures else None,
    )(face.of(body))
    with pytest.raises(passing) as caught:
        face.run(fetch, *([["a", "b"]] if not failures else []))
    assert calls == failures + 1
    assert not hasattr(caught.value, "__notes__")


# --- tenacity's strategies of the user's ----------------------------------------------------------


@pytest.mark.parametrize(
    ("wait", "pauses"),
    [
        (tenacity.wait_fixed(2), [2, 2, 2]),
        (tenacity.wait_incrementing(start=1, increment=2), [1, 3, 5]),
        (tenacity.wait_exponential(multiplier=1, max=3), [1, 2, 3]),
        (tenacity.wait_chain(*map(tenacity.wait_fixed, (1, 7))), [1, 7, 7]),
        (tenacity.wait_fixed(1) + tenacity.wait_fixed(0.5), [1.5, 1.5, 1.5]),
        (lambda state: state.attempt_number * 10, [10, 20, 30]),
        (lambda state: float(str(state.outcome.exception())[14]), [1, 2, 3]),
        (lambda state: state.idle_for + 1, [1, 2, 4]),
    ],
    ids=["fixed", "incrementing", "exponential", "chain", "sum", "attempt", "outcome", "idle"],
)
def test_wait_replaces_the_pauses(
    face: Any, clock: FakeClock, wait: Any, pauses: list[float]
) -> None:
    face.run(opero(cache=False, wait=wait)(face.of(flaky("fine", failures=3))))
    assert clock.sleeps == pauses


@pytest.mark.parametrize(
    ("stop", "calls"),
    [
        (tenacity.stop_after_attempt(6), 6),
        (tenacity.stop_after_attempt(1), 1),
        (tenacity.stop_after_delay(25), 4),
        (tenacity.stop_before_delay(25), 3),
        (tenacity.stop_after_delay(25) | tenacity.stop_after_attempt(2), 2),
        (tenacity.stop_after_delay(5) & tenacity.stop_after_attempt(5), 5),
        (lambda state: state.seconds_since_start >= 40, 5),
    ],
    ids=["attempts", "first", "after delay", "before delay", "either", "both", "own"],
)
def test_stop_replaces_the_end(face: Any, clock: FakeClock, stop: Any, calls: int) -> None:
    body = flaky("never", failures=99)
    fetch = opero(cache=False, stop=stop, wait=tenacity.wait_fixed(10))(face.of(body))
    with pytest.raises(ConnectionError):
        face.run(fetch)
    assert body.calls == calls
    assert clock.sleeps == [10] * (calls - 1)


def test_stop_counts_the_time_of_the_first_call_too(face: Any, clock: FakeClock) -> None:
    def body() -> None:
        clock.advance(20)
        raise ConnectionError

    fetch = opero(cache=False, stop=tenacity.stop_after_delay(15), min_delay=0)(face.of(body))
    with pytest.raises(ConnectionError):
        face.run(fetch)
    assert fetch.stats.calls == 1


def test_a_strategy_never_sees_the_arguments(face: Any, clock: FakeClock) -> None:
    seen: list[tenacity.RetryCallState] = []

    def body(api_key: str) -> None:
        raise ConnectionError

    fetch = opero(cache=False, wait=lambda state: seen.append(state) or 0.0)(face.of(body))
    with pytest.raises(ConnectionError):
        face.run(fetch, "hunter2")
    assert seen
    assert not any("hunter2" in f"{vars(state)}{state}" for state in seen)


# --- results --------------------------------------------------------------------------------------


def test_a_rejected_result_is_tried_again(face: Any, clock: FakeClock) -> None:
    results = iter(["", "", "full"])
    fetch = opero(cache=False, retry_if_result=lambda r: not r)(face.of(lambda: next(results)))
    assert face.run(fetch) == "full"
    assert (fetch.stats.calls, fetch.stats.failures, fetch.stats.gave_up) == (3, 2, 0)


def test_the_last_result_is_returned_when_all_were_rejected(face: Any, clock: FakeClock) -> None:
    results = iter(range(99))
    fetch = opero(cache=False, retry_if_result=lambda r: True)(face.of(lambda: next(results)))
    receipt = face.run(fetch.call)
    assert (receipt.value, receipt.rejected, receipt.calls, receipt.errors) == (3, True, 4, ())
    assert face.run(fetch) == 7


def test_a_rejected_result_is_retried_whatever_retry_on_says(face: Any, clock: FakeClock) -> None:
    results = iter(["", "full"])
    fetch = opero(cache=False, retry_on=KeyError, retry_if_result=lambda r: not r)(
        face.of(lambda: next(results))
    )
    assert face.run(fetch) == "full"


def test_rejected_results_and_errors_share_the_attempts(face: Any, clock: FakeClock) -> None:
    outcomes = iter([ValueError(), "", ValueError(), ""])

    def body() -> Any:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    receipt = face.run(opero(cache=False, retry_if_result=lambda r: not r)(face.of(body)).call)
    assert (receipt.value, receipt.rejected, receipt.attempts) == ("", True, 4)
    assert [type(e) for e in receipt.errors] == [ValueError, ValueError]


def test_a_strategy_sees_a_rejected_result(face: Any, clock: FakeClock) -> None:
    seen: list[Any] = []
    numbers = iter(range(9))
    fetch = opero(
        cache=False,
        retry_if_result=lambda r: r < 2,
        wait=lambda state: seen.append(state.outcome.result()) or 0.0,
    )(face.of(lambda: next(numbers)))
    assert face.run(fetch) == 2
    assert seen == [0, 1]


def test_a_broken_result_predicate_warns_and_takes_the_result(face: Any) -> None:
    fetch = opero(cache=False, retry_if_result=broken)(face.of(lambda: "fine"))
    with pytest.warns(OperoWarning, match="predicate broken raised LookupError"):
        assert face.run(fetch) == "fine"


# --- the test switch, and the line of explain() ---------------------------------------------------


def test_switched_off_there_is_one_call_and_no_note(face: Any) -> None:
    body = flaky("never", failures=99)
    with set_disabled(), pytest.raises(ConnectionError) as caught:
        face.run(opero(cache=False)(face.of(body)))
    assert body.calls == 1
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "1 + 3 attempts on any error but final answers, pause 0.1 s to 0.15, 0.225, 0.338 s"),
        (
            {"jitter": False, "retries": 2},
            "1 + 2 attempts on any error but final answers, pause 0.1, 0.15 s",
        ),
        (
            {"retries": 9},
            "1 + 9 attempts on any error but final answers, pause 0.1 s to 0.15, 0.225, 0.338, … s",
        ),
        ({"min_delay": 0}, "1 + 3 attempts on any error but final answers, no pauses"),
        (
            {"retry_on": (OSError, KeyError), "min_delay": 0},
            "1 + 3 attempts on OSError or KeyError",
        ),
        ({"retry_on": is_busy}, "1 + 3 attempts on what is_busy accepts"),
        (
            {"stop": tenacity.stop_never, "wait": tenacity.wait_none()},
            "until the given stop on any error but final answers, pauses by the given wait",
        ),
    ],
    ids=lambda value: " ".join(value) or "default" if isinstance(value, dict) else None,
)
def test_explain_prints_the_numbers(options: dict[str, Any], line: str) -> None:
    assert line in opero(cache=False, **options)(lambda: None).explain()


# --- arguments that can be read only once ---------------------------------------------------------


async def _items() -> Any:
    yield 1


class _Coroutine:
    def __await__(self) -> Any:
        yield

    def send(self, value: object) -> None: ...


class _Upload(NamedTuple):
    name: str
    content: Any


@dataclass
class _Form:
    name: str
    content: Any


class _TemporaryFile:
    """A file as `tempfile` makes them: it hands on what is asked of it."""

    def __init__(self) -> None:
        self.file = io.BytesIO(b"text")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class _StreamedResponse:
    is_closed = False

    def iter_bytes(self) -> Any:
        yield b""


SINGLE_USE: dict[str, Callable[[], object]] = {
    "generator": lambda: (n for n in (1, 2)),
    "iterator": lambda: iter([1, 2]),
    "map": lambda: map(str, [1, 2]),
    "file": lambda: io.StringIO("text"),
    "async generator": _items,
    "file in a dict": lambda: {"files": [("a.txt", io.BytesIO(b"text"))]},
    "coroutine": _Coroutine,
    "temporary file": _TemporaryFile,
    "iterator in a named tuple": lambda: _Upload("a.txt", iter([1])),
    "iterator in a dataclass": lambda: _Form("a.txt", (n for n in (1, 2))),
    "iterator in a deque": lambda: deque([iter([1])]),
    "iterator in a namespace": lambda: types.SimpleNamespace(rows=iter([1])),
    "streamed response": _StreamedResponse,
}
REUSABLE: dict[str, object] = {
    "list": [1, 2],
    "range": range(2),
    "counter": itertools.count(),
    "cursor": sqlite3.connect(":memory:").cursor(),
    "connection": sqlite3.connect(":memory:"),
    "archive": zipfile.ZipFile(io.BytesIO(), "w"),
    "future": Future(),
    "form": _Form("a.txt", [1]),
}


@rows("kind", SINGLE_USE)
@rows("way", ["positional", "keyword", "starred", "method", "fallback"])
def test_no_second_call_is_made_with_an_argument_that_is_used_up(kind: str, way: str) -> None:
    calls: list[object] = []
    decorate = opero(cache=False, min_delay=0)

    def body(*args: object, **kwargs: object) -> None:
        calls.append(args)
        raise ConnectionError("down")

    class Client:
        @decorate
        def send(self, items: object) -> None:
            body()

    @decorate
    def send(items: object, *more: object) -> None:
        body()

    @opero(cache=False, retries=0, arg_fallback="model")
    def fall_back(items: object, model: Any = ("a", "b")) -> None:
        body()

    given = SINGLE_USE[kind]()
    call = {
        "positional": lambda: send(given),
        "keyword": lambda: send(items=given),
        "starred": lambda: send([], given),
        "method": lambda: Client().send(given),
        "fallback": lambda: fall_back(given),
    }[way]
    with pytest.raises(ConnectionError) as caught:
        call()
    assert len(calls) == 1
    if way != "fallback":
        name = "argument 2" if way == "starred" else "items"
        assert f"{name} is an iterator or file" in caught.value.__notes__[0]


@pytest.mark.parametrize("kind", REUSABLE)
def test_other_arguments_are_used_again(kind: str) -> None:
    fetch = opero(cache=False, min_delay=0)(flaky("fine", failures=2))
    assert fetch(REUSABLE[kind]) == "fine"


def test_an_iterator_whose_methods_are_decorated_is_no_argument() -> None:
    calls: list[int] = []

    class Pages:
        def __iter__(self) -> Any:
            return self

        @opero(cache=False, min_delay=0)
        def __next__(self) -> int:
            calls.append(1)
            raise ConnectionError("down")

    with pytest.raises(ConnectionError):
        next(Pages())
    assert len(calls) == 4
