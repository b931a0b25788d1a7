# this_file: tests/composition/test_order_of_stages.py
"""The stages together: cache, then retry, then fallback, then rate limit, then the call."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from opero import RateLimiter, failures, opero
from opero.core import (
    get_cache_decorator,
    get_fallback_decorator,
    get_rate_limit_decorator,
    get_retry_decorator,
)
from opero.testing import FakeClock, capture_events, flaky


class Service:
    """Answers as told, by model; remembers when it was asked."""

    def __init__(self, clock: FakeClock, **outcomes: list[Any]) -> None:
        self.clock = clock
        self.outcomes = outcomes
        self.asked: list[tuple[str, float]] = []

    def body(self) -> Callable[..., Any]:
        def ask(prompt: str, model: str = "a") -> Any:
            self.asked.append((model, round(self.clock.elapsed, 6)))
            outcome = self.outcomes[model].pop(0)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return ask


def test_a_hit_touches_nothing_behind_the_cache(face: Any, clock: FakeClock) -> None:
    service = Service(clock, a=[OSError(), OSError()], b=["fine"])
    ask = opero(arg_fallback="model", rate_limit="1/minute", retries=0)(face.of(service.body()))
    service.outcomes["a"] = [OSError()]
    assert face.run(ask, "hi", ["a", "b"]) == "fine"
    before, stats = clock.elapsed, ask.stats.as_dict()
    with capture_events() as events:
        assert [face.run(ask, "hi", ["a", "b"]) for _ in range(5)] == ["fine"] * 5
    assert clock.elapsed == before
    assert len(service.asked) == 2
    assert {k: v for k, v in ask.stats.as_dict().items() if v != stats[k]} == {"hits": 5}
    assert {type(e).__name__ for e in events} == {"CacheHit"}


def test_a_whole_call_in_all_its_steps(face: Any, clock: FakeClock) -> None:
    service = Service(clock, a=[OSError(), OSError()], b=[KeyError(), "fine"])
    ask = opero(arg_fallback="model", min_delay=2, jitter=False)(face.of(service.body()))
    with capture_events() as events:
        assert face.run(ask, "hi", ["a", "b"]) == "fine"
        assert face.run(ask, "hi", ["a", "b"]) == "fine"
    assert service.asked == [("a", 0), ("b", 0), ("a", 2), ("b", 2)]
    assert [type(e).__name__ for e in events] == [
        "CacheMiss", "AttemptFailed", "FallbackUsed", "AttemptFailed", "RetryScheduled",
        "AttemptFailed", "FallbackUsed", "CallSucceeded", "CacheHit",
    ]  # fmt: skip


def test_every_real_call_takes_a_slot(face: Any, clock: FakeClock) -> None:
    service = Service(clock, a=[OSError()] * 2, b=[OSError()] * 2)
    ask = opero(
        cache=False,
        arg_fallback="model",
        retries=1,
        min_delay=1,
        max_delay=1,
        rate_limit=RateLimiter("1/10s", burst=1),
    )(face.of(service.body()))
    with pytest.raises(OSError, match="gave up after 2 attempts, 4 calls"):
        face.run(ask, "hi", ["a", "b"])
    times = [at for _, at in service.asked]
    assert [model for model, _ in service.asked] == ["a", "b", "a", "b"]
    assert all(later - earlier >= 9.99 for earlier, later in itertools.pairwise(times[1:]))
    assert ask.stats.waited > 10


def test_a_failure_is_not_cached(face: Any, clock: FakeClock) -> None:
    service = Service(clock, a=[OSError(), "fine"])
    ask = opero(retries=0)(face.of(service.body()))
    with pytest.raises(OSError, match=r"^$"):
        face.run(ask, "hi")
    assert face.run(ask, "hi") == "fine"


@pytest.mark.parametrize("values", ["a", ["a", "b"]], ids=["one value", "two values"])
def test_a_rejected_result_is_not_cached(face: Any, clock: FakeClock, values: Any) -> None:
    service = Service(clock, a=["", ""], b=["", ""])
    ask = opero(arg_fallback="model", retries=0, retry_if_result=lambda r: not r)(
        face.of(service.body())
    )
    for _ in range(2):
        receipt = face.run(ask.call, "hi", values)
        assert (receipt.value, receipt.rejected, receipt.source) == ("", True, "fresh")
    assert len(service.asked) == (2 if values == "a" else 4)


def test_a_result_that_a_retry_brought_is_cached(face: Any, clock: FakeClock) -> None:
    service = Service(clock, a=["", OSError(), "fine"])
    ask = opero(retry_if_result=lambda r: not r)(face.of(service.body()))
    assert [face.run(ask, "hi"), face.run(ask, "hi")] == ["fine", "fine"]
    assert len(service.asked) == 3


def test_the_cache_keeps_no_final_error(face: Any, clock: FakeClock) -> None:
    """With the cache on, the caller still gets the last call's own object."""
    errors = [OSError(n) for n in range(4)]
    service = Service(clock, a=list(errors))
    with pytest.raises(OSError, match="gave up after 4 attempts") as caught:
        face.run(opero(face.of(service.body())), "hi")
    assert caught.value is errors[3]
    assert failures(caught.value) == errors


def test_the_list_of_values_is_the_key_not_the_one_that_worked(face: Any, clock: FakeClock) -> None:
    service = Service(clock, a=["by a", "again by a"], b=["by b"])
    ask = opero(arg_fallback="model", retries=0)(face.of(service.body()))
    assert face.run(ask, "hi", ["a", "b"]) == "by a"
    assert face.run(ask, "hi", ["a", "b"]) == "by a"
    assert face.run(ask, "hi", "a") == "again by a"


def test_nested_functions_multiply(face: Any, clock: FakeClock) -> None:
    body = flaky("never", failures=99)
    inner = opero(cache=False, retries=2)(body)
    outer = opero(cache=False, retries=1)(face.of(lambda: [inner()]))
    with pytest.raises(ConnectionError):
        face.run(outer)
    assert body.calls == (1 + 2) * (1 + 1)
    assert (inner.stats.gave_up, outer.stats.gave_up) == (2, 1)


def test_the_stages_stacked_by_hand_do_the_same(face: Any, clock: FakeClock) -> None:
    service = Service(clock, a=[OSError(), OSError()], b=[KeyError(), "fine"])
    ask = face.of(service.body())
    for decorate in (
        get_rate_limit_decorator(rate_limit=1e6),
        get_fallback_decorator(arg_fallback="model"),
        get_retry_decorator(retries=3, min_delay=2, jitter=False),
        get_cache_decorator(),
    ):
        ask = decorate(ask)
    assert face.run(ask, "hi", ["a", "b"]) == "fine"
    assert face.run(ask, "hi", ["a", "b"]) == "fine"
    assert [model for model, _ in service.asked] == ["a", "b", "a", "b"]
    assert clock.sleeps[-1] == 2.0


def test_explain_prints_the_order(face: Any) -> None:
    ask = opero(arg_fallback="model", rate_limit="10/s")(face.of(lambda model=("a", "b"): None))
    told = ask.explain()
    places = [told.index(f"─ {name} ") for name in ("cache", "retry", "fallback", "rate limit")]
    assert places == sorted(places)
    assert "worst case 8 calls" in told
