# this_file: tests/composition/test_event_loops.py
"""Event loops: coroutines without asyncio, and synchronous calls that would block a running loop."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from opero import Orchestrator, opero, operomap
from opero.errors import OperoUsageError, OperoWarning
from opero.tasks import Parallel, Sequence, Task
from opero.testing import flaky
from opero.utils import ambient, ensure_async

pytestmark = pytest.mark.internal


def drive(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine as a foreign event loop does."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits")


class OwnError(Exception): ...


def failing(calls: list[int]) -> Any:
    async def fetch() -> None:
        calls.append(1)
        raise OwnError

    return fetch


@pytest.mark.parametrize(
    "options",
    [
        {"retries": 2, "min_delay": 0.01},
        {"retries": 0, "timeout": 5},
        {"retries": 0, "deadline": 5},
        {"retries": 1, "min_delay": 0.01, "deadline": 5, "timeout": 2},
    ],
    ids=["retry", "timeout", "deadline", "all"],
)
def test_without_asyncio_a_wait_names_it_and_hides_no_error(options: dict[str, Any]) -> None:
    calls: list[int] = []
    with pytest.raises(OperoUsageError, match="asyncio") as caught:
        drive(opero(cache=False, **options)(failing(calls))())
    if calls:
        assert isinstance(caught.value.__context__, OwnError)


@pytest.mark.parametrize(
    "options", [{}, {"cache": False}, {"cache": False, "concurrency": 2, "circuit_breaker": True}]
)
def test_without_asyncio_what_needs_no_wait_works(options: dict[str, Any]) -> None:
    @opero(**options)
    async def double(x: int) -> int:
        return 2 * x

    assert drive(double(2)) == 4
    assert drive(double(2)) == 4


def test_without_asyncio_a_retry_without_pause_works() -> None:
    calls: list[int] = []
    with pytest.raises(OwnError):
        drive(opero(cache=False, retries=2, min_delay=0)(failing(calls))())
    assert len(calls) == 3


@pytest.fixture
def not_yet_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ambient, "_warned", set())


def seen(call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if w.category is OperoWarning]


def fetch_twice(*, pause: float) -> None:
    fetch = opero(cache=False, min_delay=pause, max_delay=max(pause, 0.01))
    for _ in range(2):
        fetch(flaky("fine", failures=1))()


@pytest.mark.usefixtures("not_yet_warned")
def test_a_synchronous_pause_on_a_running_loop_warns_once() -> None:
    async def main() -> None:
        fetch_twice(pause=0.001)

    messages = seen(lambda: asyncio.run(main()))
    assert len(messages) == 1
    assert "await asyncio.to_thread(function, ...)" in messages[0]


@pytest.mark.usefixtures("not_yet_warned")
def test_no_warning_without_a_loop_or_without_a_pause_or_in_a_thread() -> None:
    async def main() -> None:
        fetch_twice(pause=0)
        await asyncio.to_thread(fetch_twice, pause=0.001)

    assert seen(lambda: fetch_twice(pause=0.001)) == []
    assert seen(lambda: asyncio.run(main())) == []


# --- without an event loop of asyncio, as under trio ----------------------------------------------


async def _collect(stream: Any) -> list[Any]:
    return [value async for value in stream]


def test_what_needs_asyncio_says_so_before_anything_runs(tmp_path: Path) -> None:
    called: list[int] = []

    async def work(x: int = 1) -> int:
        called.append(x)
        return x

    def plain() -> int:
        called.append(1)
        return 1

    mapped = operomap(progress=False)(work)
    for begin in (
        lambda: opero(cache_backend=f"disk:{tmp_path}", retries=0)(work)(1),
        lambda: mapped([1, 2]),
        lambda: mapped.map([1, 2]),
        lambda: _collect(mapped.stream([1, 2])),
        lambda: Parallel(work, work).run(),
        lambda: Task(plain).run(),
        lambda: Orchestrator().process([work], 1, 2),
        ensure_async(plain),
    ):
        with pytest.raises(OperoUsageError, match="needs a running asyncio event loop"):
            drive(begin())
    assert called == []


def test_what_need_not_wait_needs_no_asyncio() -> None:
    async def work(x: int = 1) -> int:
        return x

    assert drive(opero(work)(2)) == 2
    assert drive(Sequence(work, work).run()) == [1, 1]
