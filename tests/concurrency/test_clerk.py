# this_file: tests/concurrency/test_clerk.py
"""The thread beside a worker: there when it can be of use, gone when it would be in the way."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.concurrency.test_work import job_of

from opero.concurrency.clerk import Clerk, clerks
from opero.concurrency.executors.base import Chunk, Done, GaveBack
from opero.concurrency.sheet import Sheet
from opero.concurrency.start import choose_start, look_around

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.concurrency.conftest import Maps

    from opero.concurrency.executors.base import Report

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs worker processes")
linux = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")


def until(reached: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.001)


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.fixture
def told() -> list[Report]:
    return []


@pytest.fixture
def clerk(told: list[Report]) -> Iterator[Clerk]:
    clerk = Clerk(told.append)
    yield clerk
    clerk.leave()
    clerk.rest()


def sheet_of(count: int, *, target_s: float = 0.0) -> Sheet:
    """Return a sheet whose own worker tells nobody anything."""
    chunk = Chunk(7, range(count), list(range(count)))
    return Sheet(chunk, job_of(abs, target_s=target_s), "w", print)


def test_it_tells_what_is_done_and_gives_back_the_rest(clerk: Clerk, told: list[Report]) -> None:
    sheet = sheet_of(5, target_s=0.01)
    positions = sheet.positions()
    sheet.add(next(positions), "0", None)
    next(positions)
    clerk.watch(sheet)
    until(lambda: len(told) == 2)
    done, back = told
    assert isinstance(done, Done)
    assert done.values == ["0"]
    assert back == GaveBack(7, 2)


def test_it_wakes_for_the_next_chunk(clerk: Clerk, told: list[Report]) -> None:
    for n in range(1, 4):
        sheet = sheet_of(2)
        next(sheet.positions())
        clerk.watch(sheet)
        until(lambda n=n: len(told) == n)  # type: ignore[misc]  # no default type
        until(lambda: clerk._asleep)
        clerk.leave()


def test_it_ends_and_begins_again(clerk: Clerk, told: list[Report]) -> None:
    sheet = sheet_of(2)
    next(sheet.positions())
    clerk.watch(sheet)
    clerk.rest()
    clerk.rest()
    assert clerks() == 0
    sheet = sheet_of(2)
    next(sheet.positions())
    clerk.watch(sheet)
    until(lambda: GaveBack(7, 1) in told)


def test_who_cannot_be_told_is_left_to_the_worker(told: list[Report]) -> None:
    tried = threading.Event()

    def fail(report: Report) -> None:
        tried.set()
        raise OSError

    clerk = Clerk(fail)
    sheet = sheet_of(3, target_s=100)
    positions = sheet.positions()
    sheet.add(next(positions), "0", None)
    next(positions)
    clerk.watch(sheet)
    assert tried.wait(20)
    clerk.leave()
    clerk.rest()
    sheet._tell = told.append
    sheet.end()
    assert [type(report) for report in told] == [Done, GaveBack]


@linux
def test_there_is_none_for_single_items(maps: Maps) -> None:
    def count(_: int) -> int:
        time.sleep(0.05)
        return threads()

    assert maps(count, range(3), workers=1).items == [1] * 3


@linux
def test_it_is_not_among_the_threads_of_the_user(maps: Maps) -> None:
    def count(_: int) -> tuple[int, int, str]:
        until(clerks)
        return threads(), threading.active_count(), choose_start(look_around())[0]

    assert maps(count, range(2), workers=1, chunk=2, target_s=100).items == [(2, 1, "fork")] * 2


@linux
def test_signals_are_for_the_worker(maps: Maps) -> None:
    def blocks(_: int) -> list[bool]:
        until(clerks)
        found = []
        for task in sorted(Path("/proc/self/task").iterdir(), key=lambda task: int(task.name)):
            mask = re.findall(r"SigBlk:\s*(\w+)", (task / "status").read_text())
            found.append(bool(int(mask[0], 16) >> (signal.SIGINT - 1) & 1))
        return found

    assert maps(blocks, range(2), workers=1, chunk=2, target_s=100).items == [[False, True]] * 2


def fork() -> int:
    """Fork, as code of users does."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pid = os.fork()
    if not pid:
        os._exit(int(clerks()))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_users_may_fork_beside_it(maps: Maps) -> None:
    def forks(_: int) -> list[int]:
        found = []
        for _ in range(20):
            until(clerks)
            found.append(fork())
        return found

    assert maps(forks, range(3), workers=1, chunk=3, target_s=100).items == [[0] * 20] * 3


def test_it_comes_back_after_a_fork(maps: Maps) -> None:
    def forks(x: int) -> Any:
        until(clerks)
        fork()
        until(clerks)
        return x

    assert maps(forks, range(3), workers=1, chunk=3, target_s=100).items == [0, 1, 2]
