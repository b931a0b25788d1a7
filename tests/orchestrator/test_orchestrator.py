# this_file: tests/orchestrator/test_orchestrator.py
"""The orchestrator: calls, many items, limits for all, and the decorator."""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import pickle
import threading
from typing import Any

import pytest
import tenacity

from opero import (
    ConcurrencyConfig,
    Orchestrator,
    OrchestratorConfig,
    RateLimitConfig,
    RetryConfig,
    failures,
    opero,
    orchestrate,
)
from opero.core.wrapper import make_wrapper
from opero.errors import OperoUsageError
from opero.testing import FakeClock, flaky

pytestmark = pytest.mark.internal

AT_ONCE = RetryConfig(max_attempts=3, wait_min=0, wait_multiplier=0)


def execute(face: Any, orchestrator: Orchestrator, fn: Any, *args: Any, **kwargs: Any) -> Any:
    method = orchestrator.execute if face.asynchronous else orchestrator.execute_sync
    return face.run(method, fn, *args, **kwargs)


def process(face: Any, orchestrator: Orchestrator, fns: Any, *items: Any, **kwargs: Any) -> Any:
    method = orchestrator.process if face.asynchronous else orchestrator.process_sync
    return face.run(method, fns, *items, **kwargs)


# --- one call -------------------------------------------------------------------------------------


def test_an_empty_configuration_just_calls(face: Any) -> None:
    orchestrator = Orchestrator()
    assert execute(face, orchestrator, face.of(lambda x, y=2: (x, y)), 1, y=3) == (1, 3)
    fails_once = face.of(flaky("ok", failures=1))
    with pytest.raises(ConnectionError):
        execute(face, orchestrator, fails_once)


def test_a_function_of_the_other_kind_is_accepted(face: Any) -> None:
    async def later(x: int) -> int:
        return x

    orchestrator = Orchestrator(OrchestratorConfig(retry_config=AT_ONCE))
    assert execute(face, orchestrator, later, 1) == 1
    assert execute(face, orchestrator, flaky("ok")) == "ok"


def test_attempts_are_counted_with_the_first(face: Any) -> None:
    calls: list[int] = []

    def fails() -> None:
        calls.append(1)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        execute(face, Orchestrator(OrchestratorConfig(retry_config=AT_ONCE)), face.of(fails))
    assert len(calls) == 3


def test_pauses_are_those_of_tenacity(face: Any, clock: FakeClock) -> None:
    retry = RetryConfig(max_attempts=5, wait_min=2, wait_max=6, wait_multiplier=1.5)
    orchestrator = Orchestrator(OrchestratorConfig(retry_config=retry))
    execute(face, orchestrator, face.of(flaky("ok", failures=4)))
    assert clock.sleeps == [2, 3, 6, 6]


def test_other_exceptions_pass_at_once(face: Any) -> None:
    retry = RetryConfig(
        max_attempts=3, wait_min=0, retry_exceptions=(ConnectionError, TimeoutError)
    )
    fetch = flaky("ok", failures=1, error=ValueError)
    with pytest.raises(ValueError, match="flaky failure 1"):
        execute(face, Orchestrator(OrchestratorConfig(retry_config=retry)), face.of(fetch))


def test_without_reraise_the_caller_gets_tenacitys_error(face: Any) -> None:
    retry = RetryConfig(2, 0, 0, 0, retry_exceptions=ConnectionError, reraise=False)
    orchestrator = Orchestrator(OrchestratorConfig(retry_config=retry))
    with pytest.raises(tenacity.RetryError) as caught:
        execute(face, orchestrator, face.of(flaky("ok", failures=9)))
    last = caught.value.last_attempt
    assert last.attempt_number == 2
    assert isinstance(last.exception(), ConnectionError)
    assert caught.value.__cause__ is last.exception()
    with pytest.raises(KeyError):
        execute(face, orchestrator, face.of(flaky("ok", failures=9, error=KeyError)))


def test_fallbacks_have_attempts_of_their_own_after_those_of_the_primary(face: Any) -> None:
    calls: list[str] = []

    def named(name: str, good_from: int) -> Any:
        def body(x: int) -> str:
            calls.append(name)
            if calls.count(name) < good_from:
                raise ConnectionError(name)
            return f"{name} {x}"

        body.__name__ = name
        return face.of(body)

    config = OrchestratorConfig(
        retry_config=AT_ONCE, fallbacks=[named("backup", 9), named("cache", 2), named("never", 1)]
    )
    assert execute(face, Orchestrator(config), named("primary", 9), 7) == "cache 7"
    assert calls == [*["primary"] * 3, *["backup"] * 3, *["cache"] * 2]


def test_all_errors_of_all_functions_are_behind_the_last(face: Any) -> None:
    config = OrchestratorConfig(
        retry_config=AT_ONCE, fallbacks=face.of(flaky("ok", failures=9, error=KeyError))
    )
    with pytest.raises(KeyError) as caught:
        execute(face, Orchestrator(config), face.of(flaky("ok", failures=9)))
    assert [type(e) for e in failures(caught.value)] == [ConnectionError] * 3 + [KeyError] * 3


def test_a_rate_limit_holds_for_all_functions_together(face: Any, clock: FakeClock) -> None:
    orchestrator = Orchestrator(OrchestratorConfig(rate_limit_config=RateLimitConfig("1/s")))
    first, second = face.of(lambda: 1), face.of(lambda: 2)
    for _ in range(2):
        execute(face, orchestrator, first)
        execute(face, orchestrator, second)
    assert 2 <= clock.elapsed <= 3


def test_other_options_and_the_cache_can_be_given(face: Any) -> None:
    calls: list[int] = []

    def fetch(x: int) -> int:
        calls.append(x)
        return x

    config = OrchestratorConfig(cache=True, options={"cache_maxsize": 1})
    orchestrator, fetch_of_face = Orchestrator(config), face.of(fetch)
    for x in (1, 1, 2, 1):
        execute(face, orchestrator, fetch_of_face, x)
    assert calls == [1, 2, 1]


def test_a_logger_gets_a_line_for_each_event(face: Any, caplog: pytest.LogCaptureFixture) -> None:
    caught_events: list[Any] = []
    config = OrchestratorConfig(
        retry_config=RetryConfig(2, 0, 0, 0),
        fallbacks=[face.of(lambda: "backup")],
        logger=logging.getLogger("my_app"),
        options={"on_event": caught_events.append},
    )
    with caplog.at_level(logging.INFO, "my_app"):
        execute(face, Orchestrator(config), face.of(flaky("ok", failures=9)))
    received = [(r.name, r.levelname, r.getMessage().split(" after ")[0]) for r in caplog.records]
    failed = ("my_app", "WARNING", "flaky: attempt {} failed with ConnectionError")
    assert received[0] == (*failed[:2], failed[2].format(1))
    assert received[1] == ("my_app", "INFO", "flaky: attempt 2 in 0 s")
    assert received[-1][2].startswith("flaky: falls back on ")
    assert caught_events


def test_a_cancelled_call_does_not_fall_back() -> None:
    calls: list[str] = []

    async def hang() -> None:
        calls.append("hang")
        await asyncio.sleep(60)

    async def backup() -> None:
        calls.append("backup")

    async def main() -> None:
        orchestrator = Orchestrator(OrchestratorConfig(retry_config=AT_ONCE, fallbacks=[backup]))
        task = asyncio.create_task(orchestrator.execute(hang))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert calls == ["hang"]


def test_methods_builtins_partials_and_unhashable_objects_are_functions(face: Any) -> None:
    class Client:
        def fetch(self, x: int) -> int:
            return x

    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            return False

        def __call__(self, x: int) -> int:
            return x + 1

    orchestrator = Orchestrator(OrchestratorConfig(retry_config=AT_ONCE))
    assert execute(face, orchestrator, Client().fetch, 1) == 1
    assert execute(face, orchestrator, Client.fetch, Client(), 2) == 2
    assert execute(face, orchestrator, len, "abc") == 3
    assert execute(face, orchestrator, Unhashable(), 1) == 2


def test_a_function_is_decorated_once(face: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from opero.orchestrator import execution as chains

    made: list[Any] = []
    monkeypatch.setattr(chains, "make_wrapper", lambda p: made.append(p) or make_wrapper(p))
    orchestrator = Orchestrator(OrchestratorConfig(retry_config=AT_ONCE))
    fetch = face.of(lambda x=1: x)
    for _ in range(3):
        execute(face, orchestrator, fetch)
    process(face, orchestrator, [fetch], 1, 2)
    assert len(made) == 1


def test_an_orchestrator_explains_and_shows_itself() -> None:
    config = OrchestratorConfig(retry_config=AT_ONCE, concurrency_config=ConcurrencyConfig(2))
    orchestrator = Orchestrator(config)
    assert "1 + 2 attempts" in str(orchestrator.explain(len))
    assert repr(orchestrator) == f"Orchestrator({config!r})"
    with pytest.raises(OperoUsageError, match="must be an OrchestratorConfig"):
        Orchestrator(AT_ONCE)  # type: ignore[arg-type]


def test_an_orchestrator_can_be_pickled_with_its_limits() -> None:
    orchestrator = Orchestrator(OrchestratorConfig(retry_config=AT_ONCE))
    copied = pickle.loads(pickle.dumps(orchestrator))
    assert copied.config == orchestrator.config
    assert copied.execute_sync(len, "abc") == 3


# --- many items -----------------------------------------------------------------------------------


def test_process_calls_each_function_with_each_item(face: Any) -> None:
    def even(x: int) -> str:
        if x % 2:
            raise ValueError(x)
        return f"even {x}"

    def small(x: int) -> str:
        return f"small {x}"

    orchestrator = Orchestrator(OrchestratorConfig(fallbacks=[face.of(lambda x: f"any {x}")]))
    results = process(face, orchestrator, [face.of(even), face.of(small)], *range(3))
    assert results == ["even 0", "any 1", "even 2", "small 0", "small 1", "small 2"]
    assert process(face, orchestrator, face.of(even), 2) == ["even 2"]
    assert process(face, orchestrator, [face.of(even)]) == []


def test_without_a_concurrency_limit_items_go_one_after_the_other() -> None:
    running, most = 0, 0

    async def fetch(x: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return x

    asyncio.run(Orchestrator().process([fetch], *range(10)))
    assert most == 1


def test_as_many_items_as_the_limit_allows_are_worked_on_at_once_and_stay_in_order() -> None:
    running, most = 0, 0

    async def fetch(x: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(10 - x % 7):
            await asyncio.sleep(0)
        running -= 1
        return x

    config = OrchestratorConfig(concurrency_config=ConcurrencyConfig(limit=3))
    assert asyncio.run(Orchestrator(config).process([fetch], *range(30))) == list(range(30))
    assert most == 3


def test_synchronous_functions_have_as_many_threads(face: Any) -> None:
    together = threading.Barrier(8, timeout=20)

    def meet(x: int) -> int:
        together.wait()
        return x

    config = OrchestratorConfig(concurrency_config=ConcurrencyConfig(limit=8))
    assert process(face, Orchestrator(config), [meet], *range(8)) == list(range(8))


@pytest.mark.parametrize("config", [{}, {"concurrency_config": ConcurrencyConfig(limit=2)}])
def test_a_synchronous_function_never_blocks_the_loop(config: Any) -> None:
    at_work, goes_on = threading.Event(), threading.Event()

    def wait(x: int) -> int:
        at_work.set()
        assert goes_on.wait(20), "the loop stood still"
        return x

    async def main() -> list[int]:
        orchestrator = Orchestrator(OrchestratorConfig(**config))
        begun = asyncio.create_task(orchestrator.process([wait], 1, 2))
        assert await asyncio.to_thread(at_work.wait, 20)
        goes_on.set()
        return await begun

    assert asyncio.run(main()) == [1, 2]


def test_functions_of_both_kinds_and_callers_of_both_kinds_mix(face: Any) -> None:
    def odd_fails(x: int) -> str:
        if x % 2:
            raise ValueError(x)
        return f"plain {x}"

    async def any_works(x: int) -> str:
        return f"later {x}"

    expected = ["plain 0", "plain 2", "later 0", "later 2"]
    assert process(face, Orchestrator(), [odd_fails, any_works], 0, 2) == expected
    assert process(face, Orchestrator(), odd_fails, 0, 2) == ["plain 0", "plain 2"]
    assert process(face, Orchestrator(), any_works, 5) == ["later 5"]


def test_the_error_of_the_first_item_that_fails_ends_it_and_names_the_item(face: Any) -> None:
    begun: list[int] = []

    def fetch(x: int) -> int:
        begun.append(x)
        if x == 2:
            raise ConnectionError(x)
        return x

    with pytest.raises(ConnectionError) as caught:
        process(face, Orchestrator(), [face.of(fetch)], *range(10))
    assert begun == [0, 1, 2]
    assert any("2" in note for note in caught.value.__notes__)


def test_processing_needs_a_function(face: Any) -> None:
    for wrong in ([], None):
        with pytest.raises(OperoUsageError, match="needs a function"):
            process(face, Orchestrator(), wrong, 1)
    with pytest.raises(OperoUsageError, match="functions=5"):
        process(face, Orchestrator(), 5, 1)


def test_a_text_is_an_item(face: Any) -> None:
    assert process(face, Orchestrator(), [face.of(len)], "abc", "de") == [3, 2]


# --- the decorator --------------------------------------------------------------------------------


def test_an_orchestrated_function_stays_what_it_is(face: Any) -> None:
    def fetch(item_id: int, *, deep: bool = False) -> tuple[int, bool]:
        """Fetch an item."""
        return item_id, deep

    original = face.of(fetch)
    made = orchestrate(config=OrchestratorConfig(retry_config=AT_ONCE))(original)
    assert made.__name__ == "fetch"
    assert made.__doc__ == "Fetch an item."
    assert inspect.signature(made) == inspect.signature(original)
    assert inspect.iscoroutinefunction(made) is face.asynchronous
    assert face.run(made, 1, deep=True) == (1, True)
    assert face.run(made.process, 1, 2) == [(1, False), (2, False)]
    assert made.orchestrator.config.retry_config is AT_ONCE


class Client:
    """Methods of both kinds, in both orders of decorators."""

    def __init__(self, base: int) -> None:
        self.base = base

    @orchestrate
    def fetch(self, x: int) -> int:
        return self.base + x

    @orchestrate(config=OrchestratorConfig(retry_config=AT_ONCE))
    async def afetch(self, x: int) -> int:
        return self.base + x

    @orchestrate
    @classmethod
    def inside(cls, x: int) -> str:
        return cls.__name__ * x

    @classmethod
    @orchestrate
    def outside(cls, x: int) -> str:
        return cls.__name__ * x

    @orchestrate
    @staticmethod
    def double(x: int) -> int:
        return 2 * x

    @staticmethod
    @orchestrate
    def double_outside(x: int) -> int:
        return 2 * x


def test_methods_see_their_instance() -> None:
    client = Client(10)
    assert client.fetch(1) == 11
    assert client.fetch.process(1, 2) == [11, 12]
    assert Client.fetch(client, 1) == 11
    assert Client.fetch.process(client, 1, 2) == [11, 12]
    assert asyncio.run(client.afetch(1)) == 11
    assert asyncio.run(client.afetch.process(1, 2)) == [11, 12]


def test_class_and_static_methods_can_be_orchestrated() -> None:
    assert Client.inside(2) == Client(1).inside(2) == "ClientClient"
    assert Client.inside.process(1) == ["Client"]
    assert Client.outside(1) == "Client"
    assert Client.double(2) == Client(1).double(2) == Client.double_outside(2) == 4
    assert Client.double.process(1, 2) == Client(1).double_outside.process(1, 2) == [2, 4]


def test_a_configuration_that_does_not_fit_is_refused_at_decoration() -> None:
    config = OrchestratorConfig(options={"arg_fallback": "model"})
    with pytest.raises(OperoUsageError, match="no parameter 'model'"):
        orchestrate(config=config)(len)


def test_a_decorated_function_keeps_its_own_pipeline_inside() -> None:
    inner = opero(cache=False, retries=1, min_delay=0)(flaky("ok", failures=1))
    made: Any = orchestrate(inner)
    assert made() == "ok"
    assert not hasattr(made, "stats")
    assert made.__wrapped__ is inner


def test_what_is_no_function_cannot_be_orchestrated() -> None:
    with pytest.raises(OperoUsageError, match=r"write @orchestrate\(config=\.\.\.\)"):
        orchestrate(OrchestratorConfig())  # type: ignore[arg-type]


def test_an_orchestrator_can_be_forgotten() -> None:
    import weakref

    orchestrator = Orchestrator(OrchestratorConfig(retry_config=AT_ONCE))
    orchestrator.execute_sync(len, "abc")
    gone = weakref.ref(orchestrator)
    del orchestrator
    gc.collect()
    assert gone() is None


# --- @orchestrate with parts ----------------------------------------------------------------------


def test_orchestrate_takes_the_parts_of_a_configuration(face: Any) -> None:
    retry = RetryConfig(max_attempts=2, wait_min=0, wait_max=0)
    calls = []

    def fails(x: int) -> str:
        calls.append(x)
        raise ConnectionError(x)

    fetch = orchestrate(
        fallbacks=[face.of(lambda x: f"mirror {x}")],
        retry_config=retry,
        rate_limit_config=RateLimitConfig(1000),
        concurrency_config=ConcurrencyConfig(2),
    )(face.of(fails))
    assert face.run(fetch, 1) == "mirror 1"
    assert calls == [1, 1]
    assert face.run(fetch.process, 2, 3) == ["mirror 2", "mirror 3"]
    with pytest.raises(OperoUsageError, match="config= and retry_config= exclude each other"):
        orchestrate(config=OrchestratorConfig(), retry_config=retry)  # type: ignore[call-overload]


def test_process_hands_keyword_arguments_to_each_call(face: Any) -> None:
    fetch = orchestrate(face.of(lambda x, plus: x + plus))
    assert face.run(fetch.process, 1, 2, plus=10) == [11, 12]
    assert process(face, Orchestrator(), [face.of(lambda x, plus: x * plus)], 1, plus=3) == [3]
