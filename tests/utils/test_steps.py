# this_file: tests/utils/test_steps.py
"""Steps that wait on the spot or in an event loop: the same answers, and nothing left open."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from opero.utils.steps import StepLogic, in_thread, run_async, run_sync

pytestmark = pytest.mark.internal


def here(steps: StepLogic[Any]) -> Any:
    return run_sync(steps)


def away(steps: StepLogic[Any]) -> Any:
    return asyncio.run(run_async(steps))


both = pytest.mark.parametrize("run", [here, away])


@both
def test_logic_gets_the_outcomes_of_its_steps(run: Callable[[StepLogic[Any]], Any]) -> None:
    def steps() -> StepLogic[list[Any]]:
        first = yield in_thread(lambda: "one")
        second = yield in_thread(lambda: 2)
        return [first, second]

    assert run(steps()) == ["one", 2]


@both
def test_logic_without_steps_is_plain_code(run: Callable[[StepLogic[Any]], Any]) -> None:
    def steps() -> StepLogic[int]:
        yield from ()
        return 5

    assert run(steps()) == 5


@both
def test_logic_may_catch_the_error_of_a_step(run: Callable[[StepLogic[Any]], Any]) -> None:
    def steps() -> StepLogic[Any]:
        try:
            yield in_thread(lambda: 1 / 0)
        except ZeroDivisionError:
            return (yield in_thread(lambda: "instead"))

    assert run(steps()) == "instead"


@both
def test_an_error_ends_the_steps(run: Callable[[StepLogic[Any]], Any]) -> None:
    closed = []

    def steps() -> StepLogic[None]:
        try:
            yield in_thread(lambda: 1 / 0)
        finally:
            closed.append(True)

    with pytest.raises(ZeroDivisionError):
        run(steps())
    assert closed == [True]


def test_what_blocks_does_so_in_another_thread() -> None:
    def steps() -> StepLogic[int]:
        return (yield in_thread(threading.get_ident))

    assert run_sync(steps()) == threading.get_ident()
    assert asyncio.run(run_async(steps())) != threading.get_ident()
