# this_file: tests/orchestrator/test_old_api.py
"""Programs written for the old interface run as they are: blocks of code, with their functions filled in."""

from __future__ import annotations

import ast
import asyncio
import inspect
import io
import logging
import threading
import time
import types
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from opero.testing import FakeClock


def run(source: str, **names: Any) -> dict[str, Any]:
    """Execute a block that may await at its top, and return its names."""
    code = compile(inspect.cleandoc(source), "<block>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    function = types.FunctionType(code, names)

    async def main() -> None:
        begun = function()
        if inspect.iscoroutine(begun):
            await begun

    asyncio.run(main())
    return names


class Service:
    """Functions of a program: some work, some fail so many times, and all say what they were called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.running = self.most = 0

    def works(self, name: str) -> Any:
        async def body(*args: Any) -> str:
            self.calls.append((name, *args))
            self.running += 1
            self.most = max(self.most, self.running)
            await asyncio.sleep(0)
            self.running -= 1
            return f"{name}({', '.join(map(str, args))})"

        body.__name__ = name
        return body

    def fails(self, name: str, error: type[Exception] = ConnectionError) -> Any:
        async def body(*args: Any) -> str:
            self.calls.append((name, *args))
            raise error(name)

        body.__name__ = name
        return body

    def count(self, name: str) -> int:
        return sum(call[0] == name for call in self.calls)


@pytest.fixture
def service() -> Service:
    return Service()


# --- fallbacks and retries ------------------------------------------------------------------------


def test_several_fallbacks_in_order_of_preference(service: Service) -> None:
    received = run(
        """
        from opero import Orchestrator, OrchestratorConfig

        orchestrator = Orchestrator(
            config=OrchestratorConfig(
                fallbacks=[fetch_from_backup_api, fetch_from_cache]
            )
        )
        result = await orchestrator.execute(fetch_from_primary_api, "item123")
        """,
        fetch_from_primary_api=service.fails("primary"),
        fetch_from_backup_api=service.fails("backup"),
        fetch_from_cache=service.works("cache"),
    )
    assert received["result"] == "cache(item123)"
    assert [name for name, _ in service.calls] == ["primary", "backup", "cache"]


def test_retries_for_quick_and_for_slow_operations(service: Service, clock: FakeClock) -> None:
    received = run(
        """
        from opero import OrchestratorConfig, RetryConfig, orchestrate

        @orchestrate(
            config=OrchestratorConfig(
                retry_config=RetryConfig(
                    max_attempts=5,
                    wait_min=0.1,
                    wait_max=1.0,
                    wait_multiplier=1.2
                )
            )
        )
        async def quick_operation():
            return await quick()

        @orchestrate(
            config=OrchestratorConfig(
                retry_config=RetryConfig(
                    max_attempts=3,
                    wait_min=2.0,
                    wait_max=30.0,
                    wait_multiplier=2.0,
                    retry_exceptions=(ConnectionError, TimeoutError)
                )
            )
        )
        async def slow_operation():
            return await slow()
        """,
        quick=service.fails("quick"),
        slow=service.fails("slow", TimeoutError),
    )
    with pytest.raises(ConnectionError):
        asyncio.run(received["quick_operation"]())
    assert service.count("quick") == 5
    assert clock.sleeps == [1.0, 1.0, 1.0, 1.0]
    clock.sleeps.clear()
    with pytest.raises(TimeoutError):
        asyncio.run(received["slow_operation"]())
    assert service.count("slow") == 3
    assert clock.sleeps == [2.0, 4.0]


@pytest.mark.parametrize(("error", "calls"), [(ValueError, 3), (KeyError, 1)])
def test_only_specific_exceptions_are_retried(
    service: Service, clock: FakeClock, error: type[Exception], calls: int
) -> None:
    received = run(
        """
        from opero import OrchestratorConfig, RetryConfig, orchestrate

        @orchestrate(
            config=OrchestratorConfig(
                retry_config=RetryConfig(
                    max_attempts=3,
                    retry_exceptions=(ConnectionError, TimeoutError, ValueError)
                )
            )
        )
        async def network_operation():
            return await request()
        """,
        request=service.fails("request", error),
    )
    with pytest.raises(error):
        asyncio.run(received["network_operation"]())
    assert service.count("request") == calls


# --- limits ---------------------------------------------------------------------------------------


def test_ten_operations_at_once(service: Service) -> None:
    received = run(
        """
        from opero import Orchestrator, OrchestratorConfig, ConcurrencyConfig

        orchestrator = Orchestrator(
            config=OrchestratorConfig(
                concurrency_config=ConcurrencyConfig(
                    limit=10
                )
            )
        )
        urls = [f"https://example.com/api/{i}" for i in range(100)]
        results = await orchestrator.process([fetch_url], *urls)
        """,
        fetch_url=service.works("fetch"),
    )
    assert received["results"] == [f"fetch({url})" for url in received["urls"]]
    assert service.most == 10


def test_five_requests_per_second(service: Service, clock: FakeClock) -> None:
    received = run(
        """
        from opero import Orchestrator, OrchestratorConfig, RateLimitConfig

        orchestrator = Orchestrator(
            config=OrchestratorConfig(
                rate_limit_config=RateLimitConfig(
                    rate=5
                )
            )
        )
        api_ids = list(range(100))
        results = await orchestrator.process([api_call], *api_ids)
        """,
        api_call=service.works("api"),
    )
    assert received["results"] == [f"api({n})" for n in range(100)]
    assert 19.5 <= clock.elapsed <= 20


def test_several_patterns_together(service: Service, clock: FakeClock) -> None:
    received = run(
        """
        from opero import (
            Orchestrator, OrchestratorConfig,
            RetryConfig, RateLimitConfig, ConcurrencyConfig
        )

        orchestrator = Orchestrator(
            config=OrchestratorConfig(
                retry_config=RetryConfig(max_attempts=3),
                rate_limit_config=RateLimitConfig(rate=10),
                concurrency_config=ConcurrencyConfig(limit=5),
                fallbacks=[fallback_function]
            )
        )
        results = await orchestrator.process([primary_function], *items)
        """,
        primary_function=service.fails("primary"),
        fallback_function=service.works("fallback"),
        items=["a", "b", "c"],
    )
    assert received["results"] == ["fallback(a)", "fallback(b)", "fallback(c)"]
    assert service.count("primary") == 9
    assert service.most <= 5
    assert clock.elapsed >= 1


# --- logging --------------------------------------------------------------------------------------


def test_a_logger_of_the_program(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "my_app"):
        received = run(
            """
            import logging
            from opero import Orchestrator, OrchestratorConfig

            logger = logging.getLogger("my_app")

            orchestrator = Orchestrator(
                config=OrchestratorConfig(
                    logger=logger
                )
            )
            """
        )
        with pytest.raises(ConnectionError):
            asyncio.run(received["orchestrator"].execute(service.fails("request")))
    assert [(r.name, r.levelname) for r in caplog.records] == [
        ("my_app", "WARNING"),
        ("my_app", "ERROR"),
    ]


def test_context_that_a_function_logs_itself(caplog: pytest.LogCaptureFixture) -> None:
    # A name of its own: what `get_logger` has dressed writes the context into the message.
    with caplog.at_level(logging.INFO, "my_other_app"):
        run(
            """
            import logging
            from opero import orchestrate, OrchestratorConfig

            logger = logging.getLogger("my_other_app")

            @orchestrate(
                config=OrchestratorConfig(
                    logger=logger
                )
            )
            async def process_item(item_id, context=None):
                context = context or {}
                logger.info(f"Processing item {item_id}", extra={"context": context})

            await process_item(7, context={"batch": 1})
            """
        )
    (record,) = (r for r in caplog.records if r.getMessage() == "Processing item 7")
    assert record.context == {"batch": 1}  # type: ignore[attr-defined]  # an `extra`


def test_logging_utilities() -> None:
    logger, stream = logging.getLogger("old_api"), io.StringIO()
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        run(
            """
            from opero import get_logger, ContextAdapter, log_context
            import logging

            logger = ContextAdapter(get_logger("old_api", level=logging.DEBUG))
            logger.add_context(service="api_service", version="1.0.0")
            logger.info("Starting service")

            with log_context(logger, operation="batch_process", batch_id="123"):
                logger.info("Starting batch processing")

            logger.info("Continuing with other operations")
            """
        )
    finally:
        logger.removeHandler(handler)
    first, second, third = stream.getvalue().splitlines()
    assert logger.level == logging.DEBUG
    assert all("service=api_service" in line and "version=1.0.0" in line for line in (first, third))
    assert "operation=batch_process" in second
    assert "batch_id=123" in second
    assert "batch_id" not in first + third


# --- patterns -------------------------------------------------------------------------------------


def test_a_chain_of_operations(service: Service, clock: FakeClock) -> None:
    received = run(
        """
        from opero import orchestrate, OrchestratorConfig, RetryConfig

        @orchestrate(
            config=OrchestratorConfig(
                retry_config=RetryConfig(max_attempts=3)
            )
        )
        async def fetch_data(item_id):
            return await fetch(item_id)

        @orchestrate(
            config=OrchestratorConfig(
                retry_config=RetryConfig(max_attempts=2)
            )
        )
        async def process_data(data):
            return data.upper()

        @orchestrate(
            config=OrchestratorConfig(
                retry_config=RetryConfig(max_attempts=2)
            )
        )
        async def save_result(processed_data):
            return f"saved {processed_data}"

        async def pipeline(item_id):
            data = await fetch_data(item_id)
            processed = await process_data(data)
            result = await save_result(processed)
            return result

        result = await pipeline(7)
        """,
        fetch=service.works("fetch"),
    )
    assert received["result"] == "saved FETCH(7)"


def test_a_configuration_for_each_item(service: Service, clock: FakeClock) -> None:
    received = run(
        """
        from opero import Orchestrator, OrchestratorConfig, RetryConfig

        async def get_config_for_item(item):
            if item.priority == "high":
                return OrchestratorConfig(
                    retry_config=RetryConfig(max_attempts=5),
                    fallbacks=[high_priority_fallback]
                )
            else:
                return OrchestratorConfig(
                    retry_config=RetryConfig(max_attempts=2),
                    fallbacks=[standard_fallback]
                )

        async def process_items(items):
            results = []
            for item in items:
                config = await get_config_for_item(item)
                orchestrator = Orchestrator(config=config)
                result = await orchestrator.execute(process_item, item)
                results.append(result)
            return results

        results = await process_items(items)
        """,
        items=[types.SimpleNamespace(priority=p) for p in ("high", "low")],
        process_item=service.fails("process"),
        high_priority_fallback=service.works("high"),
        standard_fallback=service.works("standard"),
    )
    assert [text.partition("(")[0] for text in received["results"]] == ["high", "standard"]
    assert service.count("process") == 5 + 2


# --- the classes ----------------------------------------------------------------------------------


def test_the_orchestrator(service: Service, clock: FakeClock) -> None:
    received = run(
        """
        from opero import Orchestrator, OrchestratorConfig, RetryConfig

        orchestrator = Orchestrator(
            config=OrchestratorConfig(
                retry_config=RetryConfig(max_attempts=3),
                fallbacks=[backup_function1, backup_function2],
            )
        )

        result = await orchestrator.execute(my_function, *args, **kwargs)
        results = await orchestrator.process([my_function], *items)
        """,
        my_function=service.works("mine"),
        backup_function1=service.fails("backup1"),
        backup_function2=service.fails("backup2"),
        args=(1, 2),
        kwargs={},
        items=[3, 4],
    )
    assert received["result"] == "mine(1, 2)"
    assert received["results"] == ["mine(3)", "mine(4)"]


def test_the_fallback_chain(service: Service) -> None:
    received = run(
        """
        from opero import FallbackChain

        chain1 = FallbackChain(primary_function, fallback_function)
        chain2 = FallbackChain(primary_function, [fallback1, fallback2])
        chain3 = FallbackChain(primary_function)

        results = []
        for chain in (chain1, chain2):
            if chain.has_fallbacks():
                results.append(await chain.execute(*args, **kwargs))
        """,
        primary_function=service.fails("primary"),
        fallback_function=service.works("fallback"),
        fallback1=service.fails("one"),
        fallback2=service.works("two"),
        args=(1,),
        kwargs={},
    )
    assert received["results"] == ["fallback(1)", "two(1)"]
    assert not received["chain3"].has_fallbacks()


def test_the_configuration_classes(service: Service) -> None:
    received = run(
        """
        from opero import OrchestratorConfig, RetryConfig, RateLimitConfig
        from opero import ConcurrencyConfig, MultiprocessConfig

        config = OrchestratorConfig(
            retry_config=RetryConfig(max_attempts=3),
            rate_limit_config=RateLimitConfig(rate=10),
            fallbacks=[backup_function],
        )
        retry_config = RetryConfig(
            max_attempts=3,
            wait_min=1.0,
            wait_max=60.0,
            wait_multiplier=1.0,
            retry_exceptions=(ValueError, KeyError),
            reraise=True
        )
        rate_limit_config = RateLimitConfig(rate=10.0)
        concurrency_config = ConcurrencyConfig(limit=5)
        multiprocess_config = MultiprocessConfig(max_workers=4, backend="pathos")
        """,
        backup_function=service.works("backup"),
    )
    assert received["config"].rate_limit_config.rate == 10
    assert received["retry_config"].retry_exceptions == (ValueError, KeyError)
    assert received["multiprocess_config"].max_workers == 4


def test_the_decorator(service: Service, clock: FakeClock) -> None:
    received = run(
        """
        from opero import orchestrate, OrchestratorConfig, RetryConfig

        @orchestrate(
            config=OrchestratorConfig(
                retry_config=RetryConfig(max_attempts=3),
                fallbacks=[backup_function]
            )
        )
        async def my_function(arg):
            return await primary(arg)

        result = await my_function(some_arg)
        results = await my_function.process(item1, item2, item3)
        """,
        primary=service.fails("primary"),
        backup_function=service.works("backup"),
        some_arg=0,
        item1=1,
        item2=2,
        item3=3,
    )
    assert received["result"] == "backup(0)"
    assert received["results"] == ["backup(1)", "backup(2)", "backup(3)"]
    assert service.count("primary") == 4 * 3


def test_blocks_leave_one_idle_thread_at_most_however_many_run() -> None:
    before = {*threading.enumerate()}  # some of which may end meanwhile, or serve these blocks
    for _ in range(5):
        run("from opero import Orchestrator\nawait Orchestrator().execute(len, 'abc')")
    end = time.monotonic() + 100
    while len(left := {*threading.enumerate()} - before) > 1:
        assert time.monotonic() < end, left
        time.sleep(0.005)
    assert {thread.name for thread in left} <= {"opero-call"}
