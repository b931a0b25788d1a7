# this_file: tests/core/test_standalone.py
"""The stages as decorators of their own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from opero.core import (
    get_cache_decorator,
    get_fallback_decorator,
    get_rate_limit_decorator,
    get_retry_decorator,
)
from opero.errors import OperoUsageError
from opero.testing import FakeClock, flaky

HELPERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "cache": (get_cache_decorator, {"cache_ttl": 60}),
    "retry": (get_retry_decorator, {"retries": 2, "min_delay": 0}),
    "fallback": (get_fallback_decorator, {"arg_fallback": "x"}),
    "rate limit": (get_rate_limit_decorator, {"rate_limit": 1000}),
}


@pytest.mark.parametrize("stage", HELPERS)
def test_only_its_own_stage_is_on(stage: str) -> None:
    helper, options = HELPERS[stage]

    @helper(**options)
    def fetch(x: object = (1, 2)) -> object:
        return x

    lines = str(fetch.explain()).splitlines()[1:-1]
    assert [line.removeprefix("├─ ").split("  ")[0] for line in lines] == [stage]


@pytest.mark.parametrize("stage", HELPERS)
def test_a_coroutine_function_stays_one(stage: str) -> None:
    helper, options = HELPERS[stage]

    @helper(**options)
    async def fetch(x: object = (1, 2)) -> object:
        return x

    assert asyncio.iscoroutinefunction(fetch)
    assert asyncio.run(fetch(5)) == 5


@pytest.mark.parametrize("stage", HELPERS)
def test_another_stages_option_is_refused_with_its_own_ones(stage: str) -> None:
    helper, own = HELPERS[stage]
    other = next(iter(HELPERS["cache" if stage != "cache" else "retry"][1]))
    with pytest.raises(OperoUsageError) as raised:
        helper(**{other: 1})
    message = str(raised.value)
    assert message.startswith(f"{helper.__name__}() has no option {other!r}.")
    assert all(name in message.split("Its options: ")[1] for name in own)


@pytest.mark.parametrize("stage", HELPERS)
def test_a_mistyped_option_is_met_with_the_nearest_known_one(stage: str) -> None:
    helper, own = HELPERS[stage]
    name = next(iter(own))
    with pytest.raises(OperoUsageError, match=f"Did you mean {name!r}"):
        helper(**{name + "s": 1})


@pytest.mark.parametrize("stage", HELPERS)
def test_a_wrong_value_is_refused_when_the_decorator_is_made(stage: str) -> None:
    helper, own = HELPERS[stage]
    name = next(iter(own))
    with pytest.raises(OperoUsageError, match=f"{name}="):
        helper(**{name: [object()]})


@pytest.mark.parametrize("stage", HELPERS)
def test_options_that_belong_to_no_stage_are_taken_by_all(stage: str) -> None:
    helper, own = HELPERS[stage]
    received: list[object] = []

    @helper(**own, secret=("x",), on_event=received.append)
    def fetch(x: object = (1, 2)) -> object:
        return x

    fetch()
    assert received


def test_cache_alone_does_not_retry() -> None:
    broken = flaky("ok", failures=1)
    with pytest.raises(ConnectionError):
        get_cache_decorator()(broken)()
    assert broken.calls == 1  # type: ignore[attr-defined]


def test_cache_alone_caches() -> None:
    fetch = get_cache_decorator()(flaky(5, failures=0))
    assert (fetch(), fetch(), fetch.stats.calls) == (5, 5, 1)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "1 + 3 attempts on any error but final answers, pause 0.1 s to 0.15, 0.225, 0.338 s"),
        ({"min_delay": 20, "jitter": False}, ", pause 20, 30, 30 s"),
        (
            {"backoff_factor": 3, "min_delay": 1, "max_delay": 2, "retry_on": KeyError},
            "1 + 3 attempts on KeyError, pause 1 s to 2, 2, 2 s",
        ),
    ],
)
def test_retry_alone_explains_its_options(options: dict[str, Any], line: str) -> None:
    assert f"{line}\n" in str(get_retry_decorator(**options)(flaky("ok")).explain())


def test_retry_alone_does_not_cache(clock: FakeClock) -> None:
    fetch = get_retry_decorator()(flaky("ok", failures=1))
    assert (fetch(), fetch(), fetch.stats.calls) == ("ok", "ok", 3)


def test_fallback_alone_makes_one_attempt() -> None:
    tried = []

    @get_fallback_decorator(arg_fallback="x")
    def fetch(x: object) -> None:
        tried.append(x)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        fetch([1, 2])
    assert tried == [1, 2]


def test_rate_limit_alone_makes_calls_wait(clock: FakeClock) -> None:
    @get_rate_limit_decorator(rate_limit="1/s")
    def fetch() -> None: ...

    for _ in range(5):
        fetch()
    assert 3 <= clock.elapsed <= 4


def test_a_helper_can_be_switched_to_more_later(clock: FakeClock) -> None:
    fetch = get_fallback_decorator()(flaky("ok", failures=2))
    assert fetch.with_options(retries=2)() == "ok"
