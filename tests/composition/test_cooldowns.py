# this_file: tests/composition/test_cooldowns.py
"""A fallback value whose service asks to wait rests, and the others go on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from opero import CircuitBreaker, deadline, events, failures, opero
from opero.errors import RateLimitPausedError
from opero.testing import capture_events


class ThrottledError(Exception):
    def __init__(self, seconds: float) -> None:
        super().__init__("slow down")
        self.retry_after = seconds


class Service:
    """Answers for each model, unless the test has said how long that model is throttled."""

    def __init__(self, clock: Any, **throttled: float) -> None:
        self.clock = clock
        self.until = {model: clock.elapsed + seconds for model, seconds in throttled.items()}
        self.asked: list[tuple[str, float]] = []

    def __call__(self, model: Any = ("a", "b")) -> str:
        self.asked.append((model, round(self.clock.elapsed, 3)))
        left = self.until.get(model, 0.0) - self.clock.elapsed
        if left > 1e-6:
            raise ThrottledError(left)
        return str(model)


def of(face: Any, service: Service, **options: Any) -> Any:
    def ask(model: Any = ("a", "b")) -> str:
        return service(model)

    options = {"cache": False, "retries": 0, "arg_fallback": "model", **options}
    return opero(**options)(face.of(ask))


def test_a_throttled_value_is_skipped_until_it_has_cooled_down(face: Any, clock: Any) -> None:
    service = Service(clock, a=20)
    ask = of(face, service)
    answers = [face.run(ask) for _ in range(3)]
    clock.advance(20)
    answers.append(face.run(ask))
    assert answers == ["b", "b", "b", "a"]
    assert [model for model, _ in service.asked] == ["a", "b", "b", "b", "a"]


def test_a_value_whose_response_is_rejected_cools_down_as_well(face: Any, clock: Any) -> None:
    asked = []

    def ask(model: Any = ("a", "b")) -> Any:
        asked.append(model)
        return SimpleNamespace(status_code=429 if model == "a" else 200, retry_after=20)

    fetch = opero(
        cache=False, arg_fallback="model", retry_if_result=lambda answer: answer.status_code == 429
    )(face.of(ask))
    assert [face.run(fetch).status_code for _ in range(2)] == [200, 200]
    assert asked == ["a", "b", "b"]


def test_variants_of_a_function_share_what_they_know(face: Any, clock: Any) -> None:
    service = Service(clock, a=20)
    ask = of(face, service)
    face.run(ask)
    assert face.run(ask.with_options(timeout=5)) == "b"
    assert [model for model, _ in service.asked] == ["a", "b", "b"]


def test_when_all_cool_down_a_call_waits_for_the_soonest(face: Any, clock: Any) -> None:
    service = Service(clock, a=20, b=10)
    ask = of(face, service, retries=1, min_delay=1, max_delay=1, jitter=False)
    receipt = face.run(ask.call)
    assert receipt.value == "b"
    assert (receipt.slept, receipt.waited) == (1, pytest.approx(9))
    assert service.asked == [("a", 0), ("b", 0), ("b", 10)]


def test_a_wait_beyond_retry_after_max_is_refused_at_once(face: Any, clock: Any) -> None:
    ask = of(face, Service(clock, a=200, b=100))
    with pytest.raises(ThrottledError):
        face.run(ask)
    with pytest.raises(RateLimitPausedError, match="every value of 'model' is paused") as caught:
        face.run(ask)
    assert caught.value.retry_after == pytest.approx(100)
    assert clock.elapsed == 0


def test_with_real_failures_before_the_refusal_has_them_as_its_past(face: Any, clock: Any) -> None:
    ask = of(face, Service(clock, a=200, b=100), retries=5, min_delay=1, max_delay=1)
    with pytest.raises(RateLimitPausedError, match="every value of 'model'") as caught:
        face.run(ask)
    assert clock.elapsed == 1
    assert [type(e) for e in failures(caught.value)[:2]] == [ThrottledError, ThrottledError]


def test_a_wait_beyond_the_deadline_is_refused_at_once(face: Any, clock: Any) -> None:
    ask = of(face, Service(clock, a=20, b=10))
    with pytest.raises(ThrottledError):
        face.run(ask)

    async def within() -> Any:
        with deadline(5):
            return await ask()

    def begin() -> Any:
        if face.asynchronous:
            return within()
        with deadline(5):
            return ask()

    with capture_events(events.DeadlinePassed) as received, pytest.raises(RateLimitPausedError):
        face.run(begin)
    assert [event.where for event in received] == ["waiting for a value that cools down"]
    assert clock.elapsed == 0


def test_a_single_value_does_not_cool_down_but_pauses(face: Any, clock: Any) -> None:
    service = Service(clock, a=10)
    ask = of(face, service, retries=1)
    assert face.run(ask, "a") == "a"
    assert clock.elapsed == pytest.approx(10)
    assert not ask.__opero__.fallback.cooldowns


def test_of_values_that_cool_and_values_whose_circuit_is_open_the_first_are_waited_for(
    face: Any, clock: Any
) -> None:
    breaker = CircuitBreaker(fail_max=1, counts=ConnectionError)
    service = Service(clock, a=10)

    def ask(model: Any = ("a", "b")) -> str:
        if model == "b":
            raise ConnectionError
        return service(model)

    fetch = opero(
        cache=False, retries=1, min_delay=0, arg_fallback="model", circuit_breaker=breaker
    )(face.of(ask))
    assert face.run(fetch) == "a"
    assert clock.elapsed == pytest.approx(10)


def test_secret_values_are_not_shown(clock: Any) -> None:
    def ask(api_key: Any = ("sk-one", "sk-two")) -> str:
        if api_key == "sk-one":
            raise ThrottledError(20)
        return "ok"

    with capture_events(events.ValueCooling) as received:
        opero(cache=False, arg_fallback="api_key")(ask)()
    assert [(event.value, event.seconds, event.source) for event in received] == [
        ("api_key[0]", 20, "retry_after")
    ]


def test_an_inner_refusal_cools_nothing_down(clock: Any) -> None:
    def ask(model: Any = ("a", "b")) -> str:
        raise RateLimitPausedError(20)

    fetch = opero(cache=False, retries=0, arg_fallback="model")(ask)
    with pytest.raises(RateLimitPausedError):
        fetch()
    assert not fetch.__opero__.fallback.cooldowns
