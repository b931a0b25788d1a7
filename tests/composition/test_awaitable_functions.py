# this_file: tests/composition/test_awaitable_functions.py
"""Functions that are asynchronous without looking like it: they return something to be awaited."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from opero import RateLimiter, failures, opero
from opero.testing import FakeClock, capture_events, flaky


def plain_def(work: Callable[..., Any]) -> Any:
    async def inner(x: Any) -> Any:
        return work(x)

    def fetch(x: Any) -> Any:
        return inner(x)

    return fetch


def future(work: Callable[..., Any]) -> Any:
    def fetch(x: Any) -> Any:
        made = asyncio.get_running_loop().create_future()
        try:
            made.set_result(work(x))
        except Exception as error:  # noqa: BLE001 - it is handed on
            made.set_exception(error)
        return made

    return fetch


class _Awaitable:
    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        return self.work()


def own_awaitable(work: Callable[..., Any]) -> Any:
    return lambda x: _Awaitable(lambda: work(x))


def partial_of_async(work: Callable[..., Any]) -> Any:
    async def inner(unused: int, x: Any) -> Any:
        return work(x)

    return functools.partial(inner, 0)


def async_call(work: Callable[..., Any]) -> Any:
    class Client:
        async def __call__(self, x: Any) -> Any:
            return work(x)

    return Client()


def plain_call(work: Callable[..., Any]) -> Any:
    async def inner(x: Any) -> Any:
        return work(x)

    class Client:
        def __call__(self, x: Any) -> Any:
            return inner(x)

    return Client()


def lambda_of_async(work: Callable[..., Any]) -> Any:
    async def inner(x: Any) -> Any:
        return work(x)

    return lambda x: inner(x)  # noqa: PLW0108 - a lambda is what is tested


def async_def(work: Callable[..., Any]) -> Any:
    async def fetch(x: Any) -> Any:
        return work(x)

    return fetch


kinds = [
    async_def,
    plain_def,
    future,
    own_awaitable,
    partial_of_async,
    async_call,
    plain_call,
    lambda_of_async,
]


@pytest.fixture(params=kinds, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


def run(begin: Callable[..., Any], *args: Any) -> Any:
    async def main() -> Any:
        return await begin(*args)

    return asyncio.run(main())


def test_a_result_is_awaited(kind: Any) -> None:
    fetch = opero(cache=False)(kind(lambda x: x + 1))
    assert [run(fetch, n) for n in range(3)] == [1, 2, 3]
    assert fetch.stats.calls == 3


def test_its_failures_are_retried(kind: Any, clock: FakeClock) -> None:
    body = flaky("fine", failures=2)
    fetch = opero(cache=False)(kind(body))
    assert run(fetch, 1) == "fine"
    assert (body.calls, len(clock.sleeps), fetch.stats.calls) == (3, 2, 3)


def test_later_calls_are_retried_too(kind: Any, clock: FakeClock) -> None:
    outcomes = iter([1, OSError(), OSError(), 2])

    def work(x: Any) -> Any:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    fetch = opero(cache=False)(kind(work))
    assert [run(fetch, 0), run(fetch, 0)] == [1, 2]
    assert fetch.stats.calls == 4


def test_its_last_error_comes_out(kind: Any, clock: FakeClock) -> None:
    fetch = opero(cache=False)(kind(flaky("never", failures=99)))
    with pytest.raises(
        ConnectionError, match=r"flaky failure 4 of 99\n.*4 attempts, 4 calls"
    ) as got:
        run(fetch, 1)
    assert len(failures(got.value)) == 4


def test_its_fallback_values_are_tried(kind: Any, clock: FakeClock) -> None:
    tried = []

    def work(x: str) -> str:
        tried.append(x)
        if x != "good":
            raise ConnectionError
        return x

    fetch = opero(cache=False, arg_fallback="x")(kind(work))
    receipt = run(fetch.call, ["bad", "good"])
    assert (receipt.value, receipt.fallback, receipt.calls) == ("good", "good", 2)
    assert run(fetch, ["bad", "good"]) == "good"
    assert tried == ["bad", "good"] * 2


def test_its_results_are_judged(kind: Any, clock: FakeClock) -> None:
    results = iter(range(9))
    fetch = opero(cache=False, retry_if_result=lambda n: n < 2)(kind(lambda x: next(results)))
    assert run(fetch, 0) == 2


def test_its_results_are_cached(kind: Any) -> None:
    body = flaky("fine", failures=0)
    fetch = opero(kind(lambda x: body()))
    assert [run(fetch, 1), run(fetch, 1)] == ["fine", "fine"]
    assert (body.calls, fetch.stats.calls, fetch.stats.hits) == (1, 1, 1)
    assert fetch.stats.misses == 1


def test_its_calls_take_one_slot_each(kind: Any, clock: FakeClock) -> None:
    fetch = opero(cache=False, rate_limit=RateLimiter("1/10s", burst=1))(kind(lambda x: x))
    receipts = [run(fetch.call, n) for n in range(4)]
    assert [r.value for r in receipts] == [0, 1, 2, 3]
    assert [r.waited for r in receipts] == pytest.approx([0, 0, 10, 10])


def test_a_call_that_another_one_overtook_is_closed(kind: Any) -> None:
    body = flaky("fine", failures=0)
    fetch = opero(kind(lambda x: body()))

    async def main() -> list[Any]:
        first = fetch(1)
        second = await fetch(1)
        return [second, await first]

    assert asyncio.run(main()) == ["fine", "fine"]
    assert fetch.stats.hits == 1


def test_its_events_are_sent_once(kind: Any, clock: FakeClock) -> None:
    fetch = opero(cache=False)(kind(flaky("fine", failures=1)))
    with capture_events() as events:
        run(fetch, 1)
    assert [type(e).__name__ for e in events] == [
        "AttemptFailed",
        "RetryScheduled",
        "CallSucceeded",
    ]


def test_many_at_once_keep_their_arguments_apart(kind: Any) -> None:
    fetch = opero(cache=False)(kind(lambda x: x))

    async def main() -> list[int]:
        return await asyncio.gather(*(fetch(n) for n in range(20)))

    assert asyncio.run(main()) == list(range(20))


@pytest.mark.parametrize("kind", [async_def, partial_of_async, async_call])
def test_what_is_known_to_be_async_stays_a_coroutine_function(kind: Any) -> None:
    assert inspect.iscoroutinefunction(opero(cache=False)(kind(lambda x: x)))


def test_an_error_before_the_awaitable_counts_once(clock: FakeClock) -> None:
    """A plain function may fail before it gets as far as its awaitable."""
    outcomes = iter([OSError(), None, OSError(), None])

    async def inner(x: int) -> int:
        return x

    def fetch(x: int) -> Any:
        outcome = next(outcomes)
        if outcome:
            raise outcome
        return inner(x)

    decorated = opero(cache=False)(fetch)
    assert [run(decorated, 1), run(decorated, 2)] == [1, 2]
    assert (decorated.stats.calls, decorated.stats.retries) == (4, 2)


@pytest.mark.parametrize("outcome", ["fine", OSError("late")], ids=["success", "failure"])
def test_a_later_value_that_gives_the_first_awaitable_is_the_one_that_counts(
    clock: FakeClock, outcome: Any
) -> None:
    tried: list[str] = []

    async def inner(model: str) -> Any:
        if isinstance(outcome, Exception) and len(tried) < 3:
            raise outcome
        return model

    def fetch(model: str) -> Any:
        tried.append(model)
        if model == "bad":
            raise ConnectionError(model)
        return inner(model)

    decorated = opero(cache=False, arg_fallback="model")(fetch)
    receipt = run(decorated.call, ["bad", "good", "spare"])
    expected = ["bad", "good"] if outcome == "fine" else ["bad", "good", "spare"]
    assert tried == expected
    assert (receipt.value, receipt.fallback, receipt.label) == (
        expected[-1], expected[-1], f"model={expected[-1]!r}"
    )  # fmt: skip
    assert (receipt.calls, decorated.stats.fallbacks) == (len(expected), len(expected) - 1)
