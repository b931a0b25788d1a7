# this_file: tests/limits/test_permits.py
"""Permits that processes share: real processes, and what is left when one is killed."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from opero import ConcurrencyLimit
from opero.errors import BulkheadFullError

posix = pytest.mark.skipif(os.name != "posix", reason="needs signals")

HOLDER = """
import pickle, sys
limit = pickle.load(sys.stdin.buffer)
taken = sum(limit.acquire(timeout=0) for _ in range({wanted}))
print(taken, flush=True)
sys.stdin.read()
for _ in range(taken):
    limit.release()
print(limit.in_flight, flush=True)
"""


@contextmanager
def holder(limit: ConcurrencyLimit, wanted: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that holds permits of a limit until it is asked to give them back."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", HOLDER.format(wanted=wanted)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin
    assert process.stdout
    try:
        process.stdin.write(pickle.dumps(limit))
        process.stdin.flush()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def reported(process: subprocess.Popen[bytes]) -> int:
    assert process.stdout
    return int(process.stdout.readline())


def give_back(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin
    process.stdin.close()


def test_permits_that_another_process_holds_are_gone_here() -> None:
    limit = ConcurrencyLimit(3)
    with holder(limit, 2) as process:
        assert reported(process) == 2
        assert limit.try_acquire()
        assert not limit.try_acquire()
        give_back(process)
        assert reported(process) == 0
        assert limit.try_acquire()


def test_permits_that_were_out_before_are_not_given_twice() -> None:
    limit = ConcurrencyLimit(3)
    assert limit.try_acquire()
    assert limit.try_acquire()
    with holder(limit, 3) as process:
        assert reported(process) == 1
        limit.release()
        limit.release()
        assert limit.in_flight == 0


@posix
def test_a_killed_holder_gives_its_permits_back() -> None:
    limit = ConcurrencyLimit(2)
    with holder(limit, 2) as process:
        assert reported(process) == 2
        assert not limit.try_acquire()
        process.kill()
        assert limit.acquire(timeout=10)
        assert limit.acquire(timeout=10)


def test_a_thread_that_waits_gets_what_another_process_gives_back() -> None:
    limit = ConcurrencyLimit(1)
    with holder(limit, 1) as process:
        assert reported(process) == 1
        threading.Timer(0.05, give_back, [process]).start()
        assert limit.acquire(timeout=10)


@pytest.mark.asyncio
async def test_a_task_that_waits_gets_what_another_process_gives_back() -> None:
    limit = ConcurrencyLimit(1)
    with holder(limit, 1) as process:
        assert reported(process) == 1
        asyncio.get_running_loop().call_later(0.05, give_back, process)
        assert await limit.wait(timeout=10)
        assert limit.in_flight == 1


def test_waiters_from_before_the_permits_were_shared_are_served_too() -> None:
    limit = ConcurrencyLimit(1)
    limit.acquire()
    got: list[bool] = []
    thread = threading.Thread(target=lambda: got.append(limit.acquire(timeout=20)))
    thread.start()
    while not limit.waiting:
        pass
    with holder(limit, 0) as process:
        assert reported(process) == 0
        limit.release()
        thread.join()
    assert got == [True]


def test_no_call_queues_behind_another_process_where_the_queue_is_closed() -> None:
    limit = ConcurrencyLimit(1, queue=0)
    with holder(limit, 1) as process:
        assert reported(process) == 1
        with pytest.raises(BulkheadFullError):
            limit.acquire()
        give_back(process)
        assert reported(process) == 0
        assert limit.acquire()


def test_a_wait_for_another_process_ends_in_time() -> None:
    limit = ConcurrencyLimit(1)
    with holder(limit, 1) as process:
        assert reported(process) == 1
        assert not limit.acquire(timeout=0.03)
        assert limit.in_flight == limit.waiting == 0


def test_it_is_one_object_in_its_process_whatever_is_pickled() -> None:
    limit = ConcurrencyLimit(2, queue=5, name="db")
    twin = pickle.loads(pickle.dumps(limit))
    assert twin is limit
    assert (limit.limit, limit.queue, limit.name) == (2, 5, "db")


def test_the_file_goes_with_its_owner() -> None:
    limit = ConcurrencyLimit(2)
    assert limit.share()
    path = Path(limit._path or "")
    assert path.exists()
    del limit
    gc.collect()
    assert not path.parent.exists()


@posix
def test_a_child_forked_after_sharing_holds_nothing_and_shares() -> None:
    code = """
import os
from opero import ConcurrencyLimit
limit = ConcurrencyLimit(2)
limit.share()
limit.acquire()
child = os.fork()
if not child:
    assert limit.in_flight == 0
    limit.release()  # that of the parent, which is none of ours
    assert limit.acquire(timeout=0) and not limit.acquire(timeout=0)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert limit.in_flight == 1
assert limit.acquire(timeout=0)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=100)


@pytest.mark.internal
def test_a_permit_that_is_given_back_while_they_move_is_free_for_other_processes():
    class Slow(list):
        def append(self, permit):
            limit.share()
            super().append(permit)

    limit = ConcurrencyLimit(1)
    permit = limit.enter()
    limit._permits.free = Slow()
    limit.leave(permit)
    assert limit._permits.across.held == []
    assert limit.try_acquire()


@pytest.mark.internal
def test_a_call_from_before_a_new_start_gives_back_no_permit_of_another():
    limit = ConcurrencyLimit(2)
    limit.share()
    before = limit.enter()
    limit.begin()
    limit.enter()
    limit.leave(before)
    assert len(limit._permits.across.held) == 1
