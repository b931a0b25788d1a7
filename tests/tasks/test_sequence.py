# this_file: tests/tasks/test_sequence.py
"""Steps in order: what they get, what comes out, how they fail, and how `|` joins them."""

from __future__ import annotations

import asyncio
import functools
import gc
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tasks.conftest import until

from opero.errors import OperoUsageError
from opero.tasks import CircuitGroup, Parallel, Sequence, Task, TaskState, run, run_sync
from opero.testing import flaky

if TYPE_CHECKING:
    from tests.tasks.conftest import Received


def one() -> int:
    return 1


async def double(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


class Adder:
    def __init__(self, number: int) -> None:
        self.number = number

    def add(self, to: int) -> int:
        return self.number + to

    def __call__(self, to: int) -> int:
        return self.number + to

    @classmethod
    def name(cls, of: int) -> str:
        return f"{cls.__name__} {of}"


# --- input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "result"),
    [
        (Task(double), 2),
        (Task(double, 21), 42),  # its own arguments are kept
        (Task(double, number=21), 42),
        (Task(lambda: "nothing"), "nothing"),
        (Task(lambda x=10: x), 10),  # a default is not overwritten
        (Task(lambda x, y=10: (x, y)), (1, 10)),
        (Task(lambda x, y: (x, y), y=2), (1, 2)),
        (Task(lambda *args: args), (1,)),
        (Task(lambda *, key=3: key), 3),
        (Task(lambda *, key: key, key=4), 4),
        (Task(lambda **more: more), {}),
        (Task(lambda self: self), 1),
        (str, "1"),
        (float, 1.0),
        (bool, True),
        (Task(str.zfill, "7", 3), "007"),
        (Task((2).__add__), 3),
        (functools.partial(pow, 5), 5),
        (functools.partial(pow, exp=3), 1),
        (functools.partial(double, 3), 6),
        (Adder(5).add, 6),
        (Adder(5), 6),
        (Adder.name, "Adder 1"),
        (Sequence(double, double), [2, 4]),
        (Sequence(Task(double, 3), double), [6, 12]),
        (Parallel(double, one, Task(double, 5)), [2, 1, 10]),
        (Parallel([double, Sequence(double, str)]), [2, [2, "2"]]),
        (CircuitGroup(double), [2]),
    ],
)
def test_a_step_gets_the_last_result_if_it_asks_for_it(step: Any, result: Any) -> None:
    assert run_sync(Sequence(one, step)) == [1, result]


def test_none_is_a_result_like_any_other() -> None:
    assert run_sync(Sequence(lambda: None, lambda got: (got, "got"))) == [None, (None, "got")]


@pytest.mark.parametrize("inner", [Sequence, CircuitGroup])
def test_the_step_after_a_nested_sequence_gets_its_last_result(inner: Callable[..., Any]) -> None:
    assert run_sync(Sequence(one, inner(double, double), str)) == [1, [2, 4], "4"]


def test_the_step_after_a_deeply_nested_sequence_gets_its_last_result() -> None:
    nested = Sequence(double, Sequence(double, Sequence(double)))
    assert run_sync(Sequence(one, nested, str)) == [1, [2, [4, [8]]], "8"]


def test_the_step_after_a_parallel_gets_the_list() -> None:
    assert run_sync(Sequence(one, Parallel(double, double), sum)) == [1, [2, 2], 4]


def test_an_empty_sequence_hands_on_what_it_got() -> None:
    assert run_sync(Sequence()) == []
    assert run_sync(Sequence(one, Sequence(), str)) == [1, [], "1"]
    assert run_sync(Sequence(returns="last")) is None


def test_a_sequence_that_begins_with_an_input_takes_one() -> None:
    assert run_sync(Sequence(double, str), 4) == [8, "8"]
    with pytest.raises(OperoUsageError, match="takes no input"):
        run_sync(Sequence(one, str), 4)


def test_a_keyword_only_step_without_its_value_is_refused_when_it_is_made() -> None:
    with pytest.raises(OperoUsageError, match=r"key=value") as caught:
        Sequence(one, lambda *, key: key)
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize("step", [3, "text", None, [one]])
def test_what_cannot_run_is_no_step(step: Any) -> None:
    with pytest.raises(OperoUsageError, match="cannot be a step"):
        Sequence(one, step)


@given(st.lists(st.integers(), min_size=1, max_size=8), st.data())
def test_nesting_changes_no_result(numbers: list[int], data: st.DataObject) -> None:
    """However steps are grouped, each gets the same input."""
    got: list[Any] = []

    def step(number: int) -> Callable[[Any], int]:
        def called(before: Any) -> int:
            got.append(before)
            return number

        return called

    steps: list[Any] = [step(number) for number in numbers]
    while len(steps) > 1 and data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(steps) - 1))
        end = data.draw(st.integers(start + 1, len(steps)))
        steps[start:end] = [Sequence(*steps[start:end])]
    run_sync(Sequence(*steps), "first")
    assert got == ["first", *numbers[:-1]]


# --- results --------------------------------------------------------------------------------------


def test_sequence_returns_all_results_or_the_last() -> None:
    assert run_sync(Sequence(one, double, str)) == [1, 2, "2"]
    assert run_sync(Sequence(one, double, str, returns="last")) == "2"
    assert run_sync(Sequence(one, Sequence(double, str, returns="last"), len)) == [1, "2", 1]


def test_a_wrong_returns_is_refused() -> None:
    with pytest.raises(OperoUsageError, match="returns='first'"):
        Sequence(one, returns="first")  # type: ignore[arg-type]  # that is what is wrong


def test_a_sequence_runs_a_hundred_times_at_once() -> None:
    async def main() -> list[Any]:
        sequence = Sequence(double, str)
        return list(await asyncio.gather(*(sequence.run(n) for n in range(100))))

    assert asyncio.run(main()) == [[2 * n, str(2 * n)] for n in range(100)]


# --- failures and states --------------------------------------------------------------------------


def test_the_first_failure_ends_a_sequence_with_its_own_error(received: Received) -> None:
    error = ValueError("no")

    def fail(before: int) -> None:
        raise error

    with pytest.raises(ValueError, match="no") as caught:
        run_sync(Sequence(one, fail, Task(double, name="never"), name="pipeline"))
    assert caught.value is error
    assert received.states("pipeline") == ["RUNNING", "FAILED"]
    assert received.states("fail") == ["RUNNING", "FAILED"]
    assert received.of("never") == []
    assert received.of("pipeline")[-1].error is error


def test_states_after_a_cancellation_are_right(received: Received) -> None:
    sequence = Sequence(Task(one, name="done"), Task(asyncio.sleep, 60, name="nap"), name="all")

    async def main() -> None:
        started = sequence.start()
        await until(lambda: received.of("nap"))
        started.cancel()
        with pytest.raises(asyncio.CancelledError):
            await started

    asyncio.run(main())
    assert received.states("done") == ["RUNNING", "SUCCEEDED"]
    assert received.states("nap") == ["RUNNING", "CANCELLED"]
    assert received.states("all") == ["RUNNING", "CANCELLED"]
    assert [step.state for step in sequence.steps] == [TaskState.SUCCEEDED, TaskState.CANCELLED]


def test_runs_of_steps_are_children_of_the_sequences(received: Received) -> None:
    run_sync(Sequence(one, Sequence(double, name="inner"), name="outer"))
    outer, inner = received.of("outer")[0].run_id, received.of("inner")[0].run_id
    assert received.of("one")[0].parent_id == received.of("inner")[0].parent_id == outer
    assert received.of("double")[0].parent_id == inner
    assert received.of("outer")[0].parent_id is None


def test_a_retried_call_within_is_part_of_the_steps_run() -> None:
    from opero.events import AttemptFailed
    from opero.testing import capture_events

    step = Task(flaky("ok", failures=1), options={"retries": 1, "min_delay": 0}, name="step")
    with capture_events() as events:
        run_sync(Sequence(step, name="all"))
    tasks = {e.name: e for e in events if e["type"] == "task"}
    failed = next(e for e in events if isinstance(e, AttemptFailed))
    assert failed.parent_id == tasks["step"].run_id
    assert tasks["step"].parent_id == tasks["all"].run_id


# --- joining --------------------------------------------------------------------------------------


def test_a_bar_joins() -> None:
    assert run_sync(Task(one) | double | str) == [1, 2, "2"]
    assert run_sync(one | Task(double)) == [1, 2]
    assert run_sync(Task(one) | (Task(double) | str)) == [1, 2, "2"]
    assert run_sync(Task(one) | Parallel(double, double) | sum) == [1, [2, 2], 4]


def test_a_sequence_made_by_hand_stays_one_when_it_is_joined() -> None:
    assert run_sync(Sequence(one, double) | str) == [[1, 2], "2"]


def test_joining_leaves_the_parts_as_they_are() -> None:
    left = Task(one) | double
    longer = left | str
    assert run_sync(left) == [1, 2]
    assert run_sync(longer) == [1, 2, "2"]


def test_name_of_a_sequence_lists_its_steps() -> None:
    assert repr(Sequence(one, double)) == "<Sequence one | double>"
    assert repr(Sequence(one, double, str, len)) == "<Sequence one | … | len>"
    assert repr(Sequence(name="mine")) == "<Sequence mine>"
    assert repr(Sequence()) == "<Sequence Sequence>"
    assert repr(Task(one, name="Fetch1")) == "<Task Fetch1>"
    with pytest.raises(OperoUsageError, match="name=3"):
        Task(one, name=3)  # type: ignore[arg-type]  # that is what is wrong


def test_an_error_in_nested_steps_leaves_no_reference_cycle() -> None:
    class OopsError(Exception):
        pass

    async def fail() -> None:
        raise OopsError

    async def main(made: Any) -> weakref.ref[BaseException]:
        try:
            await run(made)
        except OopsError as error:
            return weakref.ref(error)
        raise AssertionError

    gc.disable()
    try:
        for made in (Sequence(fail), Sequence(one, Sequence(fail)), CircuitGroup(one, fail)):
            assert asyncio.run(main(made))() is None
    finally:
        gc.enable()
