# this_file: tests/composition/test_nested_retries.py
"""Retries within retries multiply visibly, may be stopped, and a budget bounds them all."""

from __future__ import annotations

from typing import Any

import pytest

from opero import RetryBudget, events, opero
from opero.testing import capture_events, flaky


def fail() -> None:
    raise ConnectionError("no route")


@pytest.fixture
def nested(face: Any) -> Any:
    """Make an outer function of these options, around an inner one that makes three attempts."""

    def make(**options: Any) -> Any:
        inner = opero(cache=False, retries=2, min_delay=0)(face.of(fail))

        async def aouter() -> Any:
            return await inner()

        def outer() -> Any:
            return inner()

        body = aouter if face.asynchronous else outer
        return opero(**{"cache": False, "retries": 1, "min_delay": 0, **options})(body), inner

    return make


def name(face: Any) -> str:
    return "aouter" if face.asynchronous else "outer"


def test_the_note_says_that_calls_multiplied(face: Any, nested: Any) -> None:
    outer, inner = nested()
    with pytest.raises(ConnectionError) as caught:
        face.run(outer)
    assert inner.stats.calls == 6
    note = caught.value.__notes__[-1]
    assert note.startswith(f"opero: {name(face)}() gave up after 2 attempts, 2 calls")
    assert note.endswith(
        "\n  within it fail() had retried too, and gave up 2 times after 6 calls in all"
    )


def test_an_event_says_so_when_it_happens(face: Any, nested: Any) -> None:
    outer, _ = nested()
    with capture_events(events.RetriesNested) as received, pytest.raises(ConnectionError):
        face.run(outer)
    assert [(e.function.rpartition(".")[2], e.inner) for e in received] == [(name(face), "fail")]


def test_explain_says_so_once_it_is_known(face: Any, nested: Any) -> None:
    outer, _ = nested()
    assert "within it" not in outer.explain()
    with pytest.raises(ConnectionError):
        face.run(outer)
    assert "() within it retries too, so calls multiply" in outer.explain()


def test_explain_names_five_of_them_at_most() -> None:
    def failing(name: str) -> Any:
        body = flaky("ok", failures=9)
        body.__name__ = name
        return opero(cache=False, retries=1, min_delay=0)(body)

    inner = [failing(f"inner_{n}") for n in range(6)]
    outer = opero(cache=False, retries=1, min_delay=0)(lambda n: inner[n]())
    for n in range(6):
        with pytest.raises(ConnectionError):
            outer(n)
    assert [f"inner_{n}()" in outer.explain() for n in range(6)] == [True] * 5 + [False]


def test_an_error_that_the_function_itself_has_ended_with_before_is_retried_again() -> None:
    error = ConnectionError("no route")

    def broken() -> None:
        raise error

    fn = opero(cache=False, retries=1, min_delay=0, retry_nested=False)(broken)
    for calls in (2, 4):
        with pytest.raises(ConnectionError):
            fn()
        assert fn.stats.calls == calls


def test_explain_knows_a_decorated_function_that_is_decorated_again() -> None:
    shown = opero(cache=False, retries=1)(opero(cache=False, retries=2)(fail)).explain()
    assert "fail() within it retries too, so calls multiply" in shown
    assert "worst case 6 calls" in shown


def test_an_inner_exhaustion_may_be_final(face: Any, nested: Any) -> None:
    outer, inner = nested(retry_nested=False)
    with pytest.raises(ConnectionError) as caught:
        face.run(outer)
    assert inner.stats.calls == 3
    assert caught.value.__notes__[-1].endswith("within it had retried, and retry_nested=False")
    assert "within it retries too, and that is not retried again" in outer.explain()


def test_an_inner_failure_that_was_not_retried_is_not_final(face: Any) -> None:
    inner = opero(cache=False, retries=0)(flaky("ok", failures=1))

    def outer() -> Any:
        return inner()

    assert face.run(opero(cache=False, retry_nested=False, min_delay=0)(face.of(outer))) == "ok"


def test_a_function_that_is_decorated_twice_is_nested_too() -> None:
    inner = opero(cache=False, retries=2, min_delay=0)(fail)
    outer = opero(cache=False, retries=2, min_delay=0, retry_nested=False)(inner)
    with pytest.raises(ConnectionError):
        outer()
    assert inner.stats.calls == 3


# --- the budget -------------------------------------------------------------------------------------


def test_an_empty_budget_makes_a_failure_final(face: Any) -> None:
    budget = RetryBudget(ratio=0, minimum=1, name="svc")
    fetch = opero(cache=False, retries=9, min_delay=0, retry_budget=budget)(face.of(fail))
    with (
        capture_events(events.RetryBudgetSpent) as received,
        pytest.raises(ConnectionError) as caught,
    ):
        face.run(fetch)
    assert fetch.stats.calls == 2
    assert [event.budget for event in received] == ["svc"]
    assert (
        "no retry is left in <RetryBudget 'svc': 1 retry for 1 call in" in caught.value.__notes__[0]
    )
    with pytest.raises(ConnectionError):
        face.run(fetch)
    assert fetch.stats.calls == 3
    assert budget.calls == 2


def test_functions_share_a_budget_that_grows_with_their_calls(face: Any) -> None:
    budget = RetryBudget(ratio=0.1, minimum=0)
    options: dict[str, Any] = {"cache": False, "min_delay": 0, "retry_budget": budget}
    works = opero(**options)(face.of(lambda: "ok"))
    fails = opero(**options)(face.of(fail))
    for _ in range(19):
        face.run(works)
    with pytest.raises(ConnectionError):
        face.run(fails)
    assert fails.stats.calls == 1 + 2


def test_hits_of_the_cache_are_no_calls() -> None:
    budget = RetryBudget()
    fetch = opero(retry_budget=budget)(lambda: "ok")
    for _ in range(5):
        fetch()
    assert budget.calls == 1


def test_explain_shows_the_budget() -> None:
    shown = opero(cache=False, retry_budget=RetryBudget(0.1, 10, "10s"))(fail).explain()
    assert "; at most 10 + 0.1 × calls in 10 s (retry budget)" in shown
