# this_file: tests/limits/test_shared_objects.py
from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opero import RateLimiter
from opero.errors import OperoUsageError
from opero.testing import fake_clock

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

WORK = """
import sys, time, json
def work(limiter, seconds):
    starts, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        limiter.acquire()
        starts.append(time.monotonic())
    return starts
"""


def script(text: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", WORK + text, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def result(process: subprocess.Popen[bytes], data: bytes = b"") -> object:
    out, err = process.communicate(data, timeout=100)
    assert process.returncode == 0, err.decode()
    return json.loads(out)


def assert_together(lists: list[list[float]], rate: float) -> None:
    """All lists together keep the limit, and each has a part."""
    starts = sorted(start for starts in lists for start in starts)
    # A process notes the time a little after its slot was taken, so single steps are not judged.
    assert 10 < len(starts) <= rate * (starts[-1] - starts[0] + 0.05) + 2
    assert all(lists)


# --- one process ----------------------------------------------------------------------------------


def test_unpickling_in_the_same_process_gives_the_same_object():
    limiter = RateLimiter("5/s", burst=2)
    assert pickle.loads(pickle.dumps(limiter)) is limiter
    assert limiter.shared
    assert limiter.describe().endswith("shared by all threads and processes")


def test_sharing_keeps_what_has_started():
    limiter = RateLimiter("3/hour")
    limiter.acquire()
    assert limiter.share()
    assert limiter.share()
    assert [limiter.try_acquire() for _ in range(3)] == [True, True, False]


def test_a_fake_clock_leaves_a_shared_slot_alone():
    limiter = RateLimiter("1/hour")
    limiter.share()
    with fake_clock() as clock:
        limiter.acquire()
        limiter.acquire()
        assert clock.elapsed == pytest.approx(3600)
    assert limiter.try_acquire()


# --- several processes ----------------------------------------------------------------------------


def test_spawned_processes_share_one_limit():
    limiter = RateLimiter(200)
    data = pickle.dumps(limiter)
    workers = [
        script(
            "import pickle\nprint(json.dumps(work(pickle.load(sys.stdin.buffer), 0.5)))",
        )
        for _ in range(2)
    ]
    for worker in workers:
        assert worker.stdin
        worker.stdin.write(data)
        worker.stdin.flush()
    mine, end = [], time.monotonic() + 1.0
    while time.monotonic() < end:
        limiter.acquire()
        mine.append(time.monotonic())
    assert_together([mine, *(result(worker) for worker in workers)], 200)


def test_several_pickles_in_another_process_are_one_object():
    limiter = RateLimiter("3/hour")
    limiter.acquire()
    stream = io.BytesIO()
    for thing in (limiter, {"limit": limiter}):
        pickle.dump(thing, stream)
    answer = script(
        "import pickle\n"
        "one, other = pickle.load(sys.stdin.buffer), pickle.load(sys.stdin.buffer)['limit']\n"
        "tried = [one.try_acquire() for _ in range(3)]\n"
        "print(json.dumps([one is other, one.uid, tried, one.describe()]))",
    )
    description = "3 per hour: no spacing, shared by all threads and processes"
    expected = [True, limiter.uid, [True, True, False], description]
    assert result(answer, stream.getvalue()) == expected
    assert not limiter.try_acquire()


def test_a_pickle_that_outlives_its_slot_limits_per_process_and_warns():
    limiter = RateLimiter("3/hour")
    data = pickle.dumps(limiter)
    del limiter
    answer = script(
        "import pickle, warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    data = sys.stdin.buffer.read()\n"
        "    one = pickle.loads(data)\n"
        "print(json.dumps([one.try_acquire(), [str(w.message) for w in caught]]))",
    )
    tried, (warning,) = result(answer, data)
    assert tried
    assert "the limit is per process" in warning


def test_publishing_shares_every_limiter():
    answer = script(
        "from opero.limits.limiter import RateLimiter\nfrom opero.limits.shared import share_all\n"
        "limiters = [RateLimiter(5), RateLimiter('5/day')]\n"
        "share_all()\n"
        "print(json.dumps([limiter.shared for limiter in limiters]))"
    )
    assert result(answer) == [True, True]


@posix
def test_forked_processes_share_one_limit():
    answer = script(
        """
import os
from opero.limits.limiter import RateLimiter
from opero.limits.shared import share_all
limiter = RateLimiter(200)
limiter.acquire()
share_all()
pipes = []
for _ in range(3):
    r, w = os.pipe()
    if not os.fork():
        os.write(w, json.dumps(work(limiter, 0.5)).encode())
        os._exit(0)
    os.close(w)
    pipes.append(r)
lists = [json.loads(open(r).read()) for r in pipes]
print(json.dumps(lists))
"""
    )
    assert_together(result(answer), 200)


@posix
def test_a_child_forked_earlier_joins_the_slot_that_it_is_sent():
    answer = script(
        """
import os, pickle
from opero.limits.limiter import RateLimiter
limiter = RateLimiter("3/hour")
to_child, to_parent = os.pipe(), os.pipe()
if not os.fork():
    os.close(to_child[1])
    one = pickle.loads(os.fdopen(to_child[0], "rb").read())
    os.write(to_parent[1], json.dumps([one is limiter, one.try_acquire()]).encode())
    os._exit(0)
os.close(to_parent[1])
limiter.acquire()
os.write(to_child[1], pickle.dumps(limiter))
os.close(to_child[1])
child = json.loads(os.fdopen(to_parent[0]).read())
print(json.dumps([child, limiter.try_acquire(), limiter.try_acquire()]))
"""
    )
    assert result(answer) == [[True, True], True, False]


@posix
@pytest.mark.parametrize("shared", [False, True])
def test_a_child_forked_while_a_thread_held_the_lock_can_go_on(shared):
    answer = script(
        f"""
import os, signal, threading
from opero.limits.limiter import RateLimiter
limiter = RateLimiter("3/hour")
if {shared}:
    limiter.share()
(limiter._state.file.thread_lock if limiter.shared else limiter._state._lock).acquire()
limiter._moving.acquire()
limiter._queue.threads.join("a caller of the parent")
limiter.loops_waiting["a loop of the parent"] = None
if not os.fork():
    signal.alarm(10)
    worked = limiter.try_acquire() and limiter.acquire() == 0 and limiter.share()
    del limiter  # `os._exit` would leave the child's own file behind
    os._exit(0 if worked else 1)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    )
    assert result(answer) == 0


@posix
@pytest.mark.parametrize("how", ["limiter.acquire()", "asyncio.run(main())"])
def test_a_worker_killed_at_any_time_leaves_the_others_their_limit(how):
    limiter = RateLimiter(500)
    data = pickle.dumps(limiter)
    text = (
        "import pickle, asyncio\n"
        "limiter = pickle.load(sys.stdin.buffer)\n"
        "async def main(): await limiter.wait()\n"
        "print('1', flush=True)\n"
        f"while True: {how}"
    )
    for _ in range(2):
        worker = script(text)
        assert worker.stdin
        assert worker.stdout
        worker.stdin.write(data)
        worker.stdin.flush()
        worker.stdout.readline()
        time.sleep(0.03)
        worker.kill()
        worker.communicate()
        assert all(limiter.acquire() < 1 for _ in range(5))


# --- names ----------------------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("OPERO_STATE_DIR", str(tmp_path))
    return tmp_path


def test_limiters_of_one_name_share_their_slot(state):
    one, other = RateLimiter("3/hour", name="geocoder"), RateLimiter("3/hour", name="geocoder")
    assert [limiter.try_acquire() for limiter in (one, other, one, other)] == [True] * 3 + [False]
    expected = "3 per hour: no spacing, shared by all programs that name it 'geocoder'"
    assert one.describe() == other.describe() == expected


def test_a_name_keeps_its_limit_from_one_program_to_the_next(state):
    text = (
        "from opero.limits.limiter import RateLimiter\n"
        "limiter = RateLimiter('3/hour', name='geocoder')\n"
        "print(json.dumps([limiter.try_acquire() for _ in range(2)]))"
    )
    assert [result(script(text)) for _ in range(2)] == [[True, True], [True, False]]
    assert not RateLimiter("3/hour", name="geocoder").try_acquire()


def test_a_named_limiter_keeps_its_name_in_another_process(state):
    limiter = RateLimiter("3/hour", name="geocoder")
    answer = script(
        "import pickle\n"
        "one = pickle.load(sys.stdin.buffer)\n"
        "print(json.dumps([one.name, one.try_acquire(), one.describe()]))"
    )
    assert result(answer, pickle.dumps(limiter)) == ["geocoder", True, limiter.describe()]
    assert [limiter.try_acquire() for _ in range(3)] == [True, True, False]


def test_one_name_with_two_rates_is_an_error_with_the_fix(state):
    limiter = RateLimiter("3/hour", name="geocoder")
    with pytest.raises(OperoUsageError, match="different names"):
        RateLimiter("4/hour", name="geocoder")
    assert limiter.try_acquire()


def test_a_name_that_cannot_be_kept_limits_per_process_and_warns(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("OPERO_STATE_DIR", str(file / "below"))
    with pytest.warns(RuntimeWarning, match="the limit is per process"):
        limiter = RateLimiter("1/hour", name="geocoder")
    assert [limiter.try_acquire() for _ in range(2)] == [True, False]
    assert limiter.describe().endswith("shared by all threads")
