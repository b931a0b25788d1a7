# this_file: tests/orchestrator/test_processes.py
"""`MultiprocessConfig`: items go to worker processes, and everything else holds there too."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tenacity

from opero import (
    ConcurrencyConfig,
    MultiprocessConfig,
    Orchestrator,
    OrchestratorConfig,
    RateLimitConfig,
    RetryConfig,
    event_bus,
    orchestrate,
)
from opero.errors import OperoUsageError
from opero.events import AttemptFailed, FallbackUsed

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="worker processes are forks"),
    pytest.mark.timeout(120),
]

AT_ONCE = RetryConfig(max_attempts=2, wait_min=0, wait_multiplier=0)


def in_processes(workers: int = 2, **more: Any) -> Orchestrator:
    return Orchestrator(
        OrchestratorConfig(multiprocess_config=MultiprocessConfig(max_workers=workers), **more)
    )


def process(face: Any, orchestrator: Orchestrator, fns: Any, *items: Any, **kwargs: Any) -> Any:
    method = orchestrator.process if face.asynchronous else orchestrator.process_sync
    return face.run(method, fns, *items, **kwargs)


def whereabouts(x: int) -> tuple[int, int]:
    return x, os.getpid()


def meeting(folder: Path) -> Any:
    """Return a function that waits until another process has called it too."""

    def meet(x: int) -> tuple[int, int]:
        (folder / str(os.getpid())).touch()
        end = time.monotonic() + 100
        while len(list(folder.iterdir())) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        return x, os.getpid()

    return meet


def odd_fails(x: int) -> str:
    if x % 2:
        raise ConnectionError(x)
    return f"even {x}"


def test_items_run_in_other_processes_at_once_and_stay_in_order(face: Any, tmp_path: Path) -> None:
    results = process(face, in_processes(2), [face.of(meeting(tmp_path))], *range(12))
    assert [x for x, _ in results] == list(range(12))
    pids = {pid for _, pid in results}
    assert os.getpid() not in pids
    assert len(pids) == 2


def test_fallbacks_and_retries_run_in_the_worker(face: Any) -> None:
    def small(x: int) -> str:
        if x > 1:
            raise KeyError(x)
        return f"small {x} of {os.getpid()}"

    fallbacks = [face.of(small), face.of(lambda x: f"any {x}")]
    orchestrator = in_processes(retry_config=AT_ONCE, fallbacks=fallbacks)
    results = process(face, orchestrator, [face.of(odd_fails)], *range(4))
    assert [r.partition(" of ")[0] for r in results] == ["even 0", "small 1", "even 2", "any 3"]
    assert str(os.getpid()) not in results[1]


def test_several_functions_run_in_workers_with_keyword_arguments(face: Any) -> None:
    def twice(x: int, plus: int) -> int:
        return 2 * x + plus

    def square(x: int, plus: int) -> int:
        return x * x + plus

    functions = [face.of(twice), face.of(square)]
    assert process(face, in_processes(), functions, 3, 4, plus=1) == [7, 9, 10, 17]


def test_lambdas_closures_and_methods_travel() -> None:
    factor = 3

    class Client:
        def fetch(self, x: int) -> int:
            return x * factor

    orchestrator = in_processes()
    assert orchestrator.process_sync([lambda x: x * factor], 1, 2) == [3, 6]
    assert orchestrator.process_sync([Client().fetch], 1, 2) == [3, 6]


class Client:
    """A class of this module, with methods in processes."""

    def __init__(self, base: int) -> None:
        self.base = base
        self.home = os.getpid()  # a fresh interpreter imports this module anew

    @orchestrate(config=OrchestratorConfig(multiprocess_config=MultiprocessConfig(max_workers=2)))
    def fetch(self, x: int) -> tuple[int, bool]:
        return self.base + x, os.getpid() == self.home


def test_orchestrated_methods_process_in_processes_and_single_calls_stay() -> None:
    client = Client(10)
    assert client.fetch(1) == (11, True)
    assert client.fetch.process(1, 2) == [(11, False), (12, False)]


def test_coroutine_functions_run_many_at_once_in_each_worker_if_asked() -> None:
    running: list[int] = []

    async def nap(x: int) -> tuple[int, int, int]:
        running.append(x)
        await asyncio.sleep(0.1)
        together = len(running)
        running.remove(x)
        return x, os.getpid(), together

    config = OrchestratorConfig(
        multiprocess_config=MultiprocessConfig(max_workers=2, backend="aiomultiprocess")
    )
    results = asyncio.run(Orchestrator(config).process([nap], *range(40)))
    assert [x for x, _, _ in results] == list(range(40))
    assert os.getpid() not in {pid for _, pid, _ in results}
    assert max(together for _, _, together in results) > 1


def test_the_error_of_an_item_keeps_its_type_and_notes(face: Any) -> None:
    orchestrator = in_processes(retry_config=AT_ONCE, fallbacks=[face.of(odd_fails)])
    with pytest.raises(ConnectionError) as caught:
        process(face, orchestrator, [face.of(odd_fails)], 0, 1)
    received = "\n".join(caught.value.__notes__)
    assert "gave up after 2 attempts" in received
    assert "2 functions" in received
    assert "failed for item 1" in received


def test_reraise_false_raises_retry_error_from_workers_too(face: Any) -> None:
    retry = RetryConfig(2, 0, 0, 0, reraise=False)
    for orchestrator in (
        in_processes(retry_config=retry),
        Orchestrator(OrchestratorConfig(retry_config=retry)),
    ):
        with pytest.raises(tenacity.RetryError) as caught:
            process(face, orchestrator, [face.of(odd_fails)], 0, 1)
        assert isinstance(caught.value.last_attempt.exception(), ConnectionError)


def test_a_rate_limit_holds_over_all_processes() -> None:
    def stamp(_: int) -> float:
        return time.monotonic()

    orchestrator = in_processes(4, rate_limit_config=RateLimitConfig("20/s"))
    began = time.monotonic()  # a start may be noted long after it was admitted
    stamps = orchestrator.process_sync([stamp], *range(21))
    assert max(stamps) - began >= 0.9


def test_a_concurrency_limit_means_fewer_workers() -> None:
    orchestrator = in_processes(4, concurrency_config=ConcurrencyConfig(1))
    results = orchestrator.process_sync([whereabouts], *range(6))
    assert len({pid for _, pid in results}) == 1


def test_a_concurrency_limit_holds_over_the_coroutines_of_all_processes(tmp_path: Path) -> None:
    def count() -> int:
        return len(list(tmp_path.iterdir()))

    async def step(x: int) -> int:
        mark = tmp_path / str(x)
        mark.touch()
        await asyncio.sleep(0.02)
        together = count()
        mark.unlink()
        return together

    config = OrchestratorConfig(
        multiprocess_config=MultiprocessConfig(max_workers=4, backend="aiomultiprocess"),
        concurrency_config=ConcurrencyConfig(limit=2),
    )
    together = asyncio.run(Orchestrator(config).process([step], *range(40)))
    assert max(together) <= 2


def test_the_logger_of_this_process_gets_events_of_workers(
    face: Any, caplog: pytest.LogCaptureFixture
) -> None:
    orchestrator = in_processes(
        fallbacks=[face.of(lambda x: x)], logger=logging.getLogger("my_app")
    )
    with caplog.at_level(logging.INFO, "my_app"):
        process(face, orchestrator, [face.of(odd_fails)], 1)
    assert [r.getMessage().split(" after ")[0] for r in caplog.records] == [
        "odd_fails: attempt 1 failed with ConnectionError",
        "odd_fails: gave up",
        "odd_fails: falls back on <lambda>",
    ]


def test_the_bus_gets_events_of_workers() -> None:
    caught_events: list[Any] = []
    with event_bus.subscribe(caught_events.append, types=[AttemptFailed, FallbackUsed]):
        in_processes(fallbacks=[str]).process_sync([odd_fails], 1)
    received = [(type(e), e.function) for e in caught_events]
    assert received == [(AttemptFailed, "odd_fails"), (FallbackUsed, "odd_fails")]


def test_a_memory_cache_in_workers_is_refused_and_one_on_disk_is_shared(tmp_path: Path) -> None:
    with pytest.raises(OperoUsageError, match="write cache_backend='disk'"):
        in_processes(cache=True)
    orchestrator = in_processes(cache=True, cache_backend=f"disk:{tmp_path / 'cache'}")
    first = orchestrator.process_sync([whereabouts], *range(4))
    assert orchestrator.process_sync([whereabouts], *range(4)) == first


def test_a_dead_worker_costs_its_item_only() -> None:
    def die(x: int) -> int:
        if x == 3:
            os._exit(7)
        return x

    with pytest.raises(Exception, match="worker") as caught:
        in_processes().process_sync([die], *range(6))
    assert any("item 3" in note for note in caught.value.__notes__)


def test_functions_of_a_script_need_no_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "from opero import MultiprocessConfig, Orchestrator, OrchestratorConfig\n"
        "def double(x): return 2 * x, os.getpid()\n"
        "config = OrchestratorConfig(multiprocess_config=MultiprocessConfig(max_workers=2))\n"
        "found = Orchestrator(config).process_sync([double], 1, 2, 3)\n"
        "print([x for x, _ in found], os.getpid() in [pid for _, pid in found])\n",
        encoding="utf-8",
    )
    received = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (received.stdout, received.stderr) == ("[2, 4, 6] False\n", "")
