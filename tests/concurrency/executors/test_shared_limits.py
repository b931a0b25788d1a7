# this_file: tests/concurrency/executors/test_shared_limits.py
"""One rate limit and one concurrency limit for all worker processes, whichever of them is killed."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from opero import CircuitBreaker, ConcurrencyLimit, RateLimiter, opero, operomap
from opero.concurrency.executors.base import Lost
from opero.errors import CircuitOpenError

if TYPE_CHECKING:
    from tests.concurrency.conftest import Maps

pytestmark = pytest.mark.internal

both = pytest.mark.parametrize("maps", ["fork", "forkserver"], indirect=True)
posix = pytest.mark.skipif(os.name != "posix", reason="needs signals")
Span = tuple[float, float]

MODULE = """
import time
from opero import opero

@opero(cache=False, rate_limit=50, concurrency=1)
def limited(x):
    began = time.monotonic()
    time.sleep(0.005)
    return began, time.monotonic()

def outer(x):
    return limited(x)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "limited_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("limited_module")
    del sys.modules["limited_module"]


def spans(ran: Any) -> list[Span]:
    return sorted(one for one in ran.items if not isinstance(one, Lost))


def at_once(found: list[Span]) -> int:
    """The most spans that overlap."""
    return max(sum(a <= began < b for a, b in found) for began, _ in found)


def assert_spaced(found: list[Span], rate: float) -> None:
    """No window holds more than the rate and one call; a late start may be made up for."""
    starts = [began for began, _ in found]
    for n, start in enumerate(starts):
        later = [s for s in starts[n:] if s < start + 0.5]
        # Each of the four workers may note the time of one start long after its slot was taken.
        assert len(later) <= 0.5 * rate + 2 + 4


def refused(x: int) -> str:
    raise ConnectionError(x)


def nap(_: int) -> Span:
    began = time.monotonic()
    time.sleep(0.005)
    return began, time.monotonic()


# --- rate -----------------------------------------------------------------------------------------


@both
def test_a_rate_limit_holds_for_all_workers_together(maps: Maps) -> None:
    assert_spaced(spans(maps(nap, range(40), workers=4, rate_limit=50)), 50)


@both
def test_a_limiter_of_an_inner_function_is_the_same_in_all_workers(maps: Maps) -> None:
    inner = opero(cache=False, rate_limit=RateLimiter(50))(nap)

    def outer(x: int) -> Span:
        return inner(x)

    assert_spaced(spans(maps(outer, range(40), workers=4)), 50)


@both
def test_a_limiter_that_every_import_makes_is_the_same_in_all_workers(
    maps: Maps, module: Any
) -> None:
    found = spans(maps(module.outer, range(40), workers=4))
    assert_spaced(found, 50)
    assert at_once(found) == 1


@both
def test_the_map_and_its_workers_share_the_limiter(maps: Maps) -> None:
    limiter = RateLimiter("10/hour")
    for _ in range(4):
        assert limiter.try_acquire()
    tried = maps(lambda _: limiter.try_acquire(), range(12), workers=3).items
    # A quota has room for one call of catch-up.
    assert sum(tried) in (6, 7)
    assert not limiter.try_acquire()


@both
def test_a_pause_that_one_worker_is_asked_for_holds_back_all(maps: Maps) -> None:
    limiter = RateLimiter(1000)

    def work(x: int) -> Span:
        time.sleep(0.002)
        limiter.acquire()
        began = time.monotonic()
        if x == 5:
            limiter.pause(0.4)
        return began, time.monotonic()

    found = spans(maps(work, range(30), workers=4))
    assert max(b - a for (a, _), (b, _) in pairwise(found)) >= 0.38


@both
@posix
def test_a_killed_worker_leaves_the_rate_to_the_others(maps: Maps) -> None:
    def work(x: int) -> Span:
        if x % 7 == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return nap(x)

    ran = maps(work, range(40), workers=4, rate_limit=100)
    assert sum(isinstance(one, Lost) for one in ran.items) == 6
    assert_spaced(spans(ran), 100)


# --- concurrency ----------------------------------------------------------------------------------


@both
def test_a_concurrency_limit_holds_for_all_workers_together(maps: Maps) -> None:
    found = spans(maps(nap, range(24), workers=4, concurrency=2))
    assert len(found) == 24
    assert at_once(found) <= 2


@both
def test_a_concurrency_limit_of_an_inner_function_is_the_same_in_all_workers(maps: Maps) -> None:
    inner = opero(cache=False, concurrency=ConcurrencyLimit(2))(nap)

    def outer(x: int) -> Span:
        return inner(x)

    assert at_once(spans(maps(outer, range(24), workers=4))) <= 2


@both
@posix
def test_a_killed_worker_gives_its_permit_back(maps: Maps) -> None:
    def work(x: int) -> Span:
        if x % 5 == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return nap(x)

    ran = maps(work, range(20), workers=3, concurrency=1)
    assert sum(isinstance(one, Lost) for one in ran.items) == 4
    assert at_once(spans(ran)) == 1


def test_the_map_and_its_workers_share_the_permits(maps: Maps) -> None:
    limit = ConcurrencyLimit(3)
    with limit:
        free = maps(lambda _: sum(limit.try_acquire() for _ in range(5)), [1], workers=1).items
    assert free == [2]
    assert limit.in_flight == 0


# --- circuit breaker ------------------------------------------------------------------------------


@both
def test_a_circuit_breaker_is_one_for_all_workers(maps: Maps) -> None:
    breaker = CircuitBreaker(fail_max=3, jitter=0)
    inner = opero(cache=False, retries=0, circuit_breaker=breaker)(refused)

    def outer(x: int) -> str:
        try:
            return inner(x)
        except CircuitOpenError:
            return "open"
        except ConnectionError:
            time.sleep(0.005)
            return "failed"

    found = list(maps(outer, range(24), workers=3).items)
    # Calls that are under way when the circuit opens end as they do.
    assert 3 <= found.count("failed") <= 5
    assert found.count("open") == 24 - found.count("failed")
    assert breaker.state == "open"
    assert breaker.stats.opened == 1


# --- pauses ---------------------------------------------------------------------------------------


def test_an_item_that_pauses_long_gives_its_worker_to_others(tmp_path: Path) -> None:
    ended: list[int] = []

    def work(x: int) -> int:
        failed = tmp_path / "failed"
        if x == 0 and not failed.exists():
            failed.touch()
            raise ValueError(x)
        return x

    mapped = operomap(
        mode="process",
        workers=1,
        cache=False,
        chunksize=1,
        retries=1,
        min_delay=1,
        jitter=False,
        on_result=lambda one: ended.append(one.index),
    )(work)
    assert mapped(range(6)) == list(range(6))
    assert ended == [1, 2, 3, 4, 5, 0]


# --- other hosts ----------------------------------------------------------------------------------

ELSEWHERE = """
import multiprocessing, os, sys, tempfile, warnings
from concurrent.futures import ProcessPoolExecutor
from opero import ConcurrencyLimit, RateLimiter, operomap

def move_to_another_host(folder):
    def without(path, *arguments, opens=os.open, **options):
        if os.fspath(path).startswith(folder):
            raise FileNotFoundError(2, "No such file or directory", path)
        return opens(path, *arguments, **options)

    os.open = without

def warnings_of(initializer, options):
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(2, context, initializer, (tempfile.gettempdir(),))
    with warnings.catch_warnings(record=True) as seen, pool:
        warnings.simplefilter("always")
        operomap(executor=pool, workers=2, cache=False, retries=0, progress=False, **options)(abs)(range(10))
    return [str(one.message) for one in seen if "not shared with all workers" in str(one.message)]

if __name__ == "__main__":
    rate, permits = {"rate_limit": RateLimiter("500/s")}, {"concurrency": ConcurrencyLimit(3)}
    options = rate if sys.argv[1] == "rate" else permits
    print(len(warnings_of(print, options)), len(warnings_of(move_to_another_host, options)))
"""


@posix
@pytest.mark.parametrize("limit", ["rate", "permits"])
def test_the_program_is_warned_once_of_workers_on_another_host(tmp_path: Path, limit: str) -> None:
    script = tmp_path / "elsewhere.py"
    script.write_text(ELSEWHERE)
    out = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), limit],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ).stdout
    assert out.split()[-2:] == ["0", "1"]
