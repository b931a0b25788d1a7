# this_file: tests/concurrency/test_recorder.py
"""Recorders are asked before anything runs, and get each outcome before the caller does."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from opero import operomap
from opero.concurrency.executors.base import Finished, ItemOutcome, recording

pytestmark = pytest.mark.internal

where: contextvars.ContextVar[list[Any]] = contextvars.ContextVar("where")


class Memory:
    """Remembers by index."""

    def __init__(self) -> None:
        self.known: dict[int, ItemOutcome] = {}
        self.closed = 0
        self.threads: set[int] = set()

    def enter(self, index: int, item: Any) -> None:
        where.set([index, item])

    def find_known(self, idx: Sequence[int], items: Sequence[Any]) -> Mapping[int, ItemOutcome]:
        self.threads.add(threading.get_ident())
        return {n: self.known[n] for n in idx if n in self.known}

    def keep(self, finished: Sequence[Finished]) -> None:
        self.threads.add(threading.get_ident())
        for index, _, outcome in finished:
            assert index not in self.known, "each item is recorded once"
            self.known[index] = outcome

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    token = recording.set(lambda name: memory)
    yield memory
    recording.reset(token)


KINDS = pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sync", {}),
        ("sync", {"sequential": True}),
        ("async", {}),
        ("async", {"mode": "async_process"}),
        ("async", {"sequential": True}),
    ],
)


def mapped(kind: str, body: Any, **options: Any) -> Any:
    """Decorate `body`, or a coroutine function around it; return what maps and waits."""
    given = {"cache": False, "retries": 0, **options}
    if kind == "sync":
        return operomap(**given)(body)

    @operomap(**given)
    async def twin(x: Any) -> Any:
        await asyncio.sleep(0)
        return body(x)

    return lambda items: asyncio.run(twin(items))


@KINDS
def test_what_is_known_is_not_run_again(memory: Memory, kind: str, options: Any) -> None:
    ran: list[int] = []
    double = mapped(kind, lambda x: ran.append(x) or 2 * x, **options)
    memory.known[1] = ItemOutcome(value="known")
    assert double([5, 6, 7]) == [10, "known", 14]
    assert sorted(ran) == [5, 7]
    assert {n: o.value for n, o in memory.known.items()} == {0: 10, 1: "known", 2: 14}
    assert memory.closed == 1


@KINDS
def test_items_run_here_in_contexts_that_were_prepared(
    memory: Memory, kind: str, options: Any
) -> None:
    def look(x: int) -> tuple[int, list[Any], bool]:
        found = where.get()
        where.set(["another item's"])
        return os.getpid(), found, recording.get() is not None

    found = mapped(kind, look, **options)([7, 8, 9])
    assert found == [(os.getpid(), [n, x], True) for n, x in enumerate([7, 8, 9])]
    assert where.get(None) is None


def test_a_failure_that_is_known_is_the_items_again(memory: Memory) -> None:
    memory.known[0] = ItemOutcome(error=KeyError("then"), attempts=3)
    result = operomap(cache=False)(abs).map([1, -2])
    assert result.values == [2]
    assert repr(result.failures[0].error) == "KeyError('then')"
    assert result.resumed == 1


def test_failures_are_recorded_like_results(memory: Memory) -> None:
    result = mapped("sync", lambda x: 1 / x, on_error="skip")([1, 0])
    assert result == [1.0]
    assert isinstance(memory.known[1].error, ZeroDivisionError)


def test_what_ends_the_program_is_not_recorded(memory: Memory) -> None:
    def leave(x: int) -> None:
        raise SystemExit(x)

    with pytest.raises(SystemExit):
        mapped("sync", leave)([1])
    assert not memory.known
    assert memory.closed == 1


def test_outcomes_are_recorded_before_the_caller_gets_them(memory: Memory) -> None:
    seen = []
    double = operomap(cache=False, on_result=lambda one: seen.append(one.index in memory.known))(
        abs
    )
    double([1, 2])
    assert seen == [True, True]


def test_cache_hits_are_recorded(memory: Memory) -> None:
    double = operomap()(abs)
    double.one(-5)
    assert double([-5]) == [5]
    assert memory.known[0].calls == 0
    memory.known[1] = ItemOutcome(value="known")
    assert double.map([-1, -2]).resumed == 2
    assert double.stats.misses == 1


def test_an_event_loop_does_not_wait_for_a_recorder(memory: Memory) -> None:
    mapped("async", abs)([1])
    assert threading.get_ident() not in memory.threads


def test_a_map_may_be_left_unrecorded() -> None:
    names: list[str] = []

    def no_recorder(name: str) -> None:
        names.append(name)

    token = recording.set(no_recorder)
    try:
        assert operomap(mode="thread")(abs)([-1]) == [1]
    finally:
        recording.reset(token)
    assert names == ["abs"]
