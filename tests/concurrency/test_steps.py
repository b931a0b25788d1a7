# this_file: tests/concurrency/test_steps.py
"""Steps that wait on the spot or in an event loop: the same answers, and nothing left open."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from opero.concurrency.steps import BlockingCall, BlockingCalls, Steps, run_steps, run_steps_async


def here(steps: Steps[Any]) -> Any:
    return run_steps(steps)


def away(steps: Steps[Any]) -> Any:
    return asyncio.run(run_steps_async(steps))


both = pytest.mark.parametrize("run", [here, away])


async def plus_one(x: int) -> int:
    await asyncio.sleep(0)
    return x + 1


@both
def test_steps_get_the_answers_of_their_errands(run: Callable[[Steps[Any]], Any]) -> None:
    def steps() -> Steps[list[Any]]:
        first = yield BlockingCall(lambda: "one")
        second = yield BlockingCalls(lambda x: x + 1, plus_one, [(n,) for n in range(100)])
        return [first, second]

    assert run(steps()) == ["one", list(range(1, 101))]


@both
def test_steps_without_errands_are_plain_code(run: Callable[[Steps[Any]], Any]) -> None:
    def steps() -> Steps[int]:
        yield from ()
        return 5

    assert run(steps()) == 5


@both
def test_an_error_ends_the_steps(run: Callable[[Steps[Any]], Any]) -> None:
    closed = []

    def steps() -> Steps[None]:
        try:
            yield BlockingCall(lambda: 1 / 0)
        finally:
            closed.append(True)

    with pytest.raises(ZeroDivisionError):
        run(steps())
    assert closed == [True]


def test_what_blocks_does_so_in_another_thread() -> None:
    def steps() -> Steps[int]:
        return (yield BlockingCall(threading.get_ident))

    assert run_steps(steps()) == threading.get_ident()
    assert asyncio.run(run_steps_async(steps())) != threading.get_ident()


def test_a_loop_has_many_questions_open_at_once_but_not_all() -> None:
    open_now = most = 0

    async def ask(x: int) -> int:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        await asyncio.sleep(0)
        open_now -= 1
        return x

    def steps() -> Steps[Any]:
        return (yield BlockingCalls(int, ask, [(n,) for n in range(200)]))

    assert asyncio.run(run_steps_async(steps())) == list(range(200))
    assert 1 < most <= 32
