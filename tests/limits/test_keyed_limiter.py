# this_file: tests/limits/test_keyed_limiter.py
from __future__ import annotations

import asyncio
import gc
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from opero import RateLimiter, opero
from opero.core import get_rate_limit_decorator
from opero.errors import OperoUsageError, OperoWarning, SpendCapError
from opero.testing import set_disabled


def host_of(url: str, *_: object) -> str:
    return url.partition("/")[0]


class TooManyError(Exception):
    headers = {"Retry-After": "5"}  # noqa: RUF012 - as client libraries have it


def test_each_key_has_a_bucket_of_its_own(face, clock):
    limiter = RateLimiter("1/minute", burst=0, key=host_of)
    fetch = opero(cache=False, rate_limit=limiter)(face.of(lambda url: clock.elapsed))
    assert [face.run(fetch, url) for url in ("a/1", "b/1", "c/1")] == [0, 0, 0]
    assert face.run(fetch, "a/2") == pytest.approx(60)
    assert len(limiter) == 3  # type: ignore[arg-type]  # a KeyedLimiter
    assert "1 per minute: one call each 60 s, for each key by itself" in fetch.explain()


def test_a_key_sees_the_fallback_value_in_use(face, clock):
    limiter = RateLimiter("1/minute", burst=0, key=lambda key: key)

    def ask(key: object) -> tuple[object, float]:
        if key == "one":
            raise ConnectionError
        return key, clock.elapsed

    ask = get_rate_limit_decorator(rate_limit=limiter)(face.of(ask))
    with pytest.raises(ConnectionError):
        face.run(ask, "one")
    asking = opero(cache=False, retries=0, rate_limit=limiter, arg_fallback="key")(
        face.of(lambda key: (key, clock.elapsed))
    )
    assert face.run(asking, ["two", "one"]) == ("two", 0)
    assert face.run(asking, ["three"]) == ("three", 0)
    assert face.run(asking, ["one"])[1] == pytest.approx(60)


def test_a_throttled_call_pauses_its_own_bucket_only(face, clock):
    limiter = RateLimiter("100/s", key=host_of)

    def fetch(url: str) -> str:
        if url == "a/1":
            raise TooManyError
        return url

    fetch = opero(cache=False, retries=0, rate_limit=limiter)(face.of(fetch))
    with pytest.raises(TooManyError):
        face.run(fetch, "a/1")
    assert face.run(fetch, "b/1") == "b/1"
    assert clock.elapsed == 0
    assert limiter.bucket("a").paused == pytest.approx(5)  # type: ignore[attr-defined]
    assert face.run(fetch, "a/2") == "a/2"
    assert clock.elapsed == pytest.approx(5)


def test_each_bucket_has_costs_and_a_cap_of_its_own(face, clock):
    limiter = RateLimiter("100 tokens/minute", key=host_of, cost=lambda url, n: n, cap=150)
    fetch = opero(cache=False, rate_limit=limiter)(face.of(lambda url, n: n))
    assert [face.run(fetch, url, 100) for url in ("a", "b")] == [100, 100]
    with pytest.raises(SpendCapError):
        face.run(fetch, "a", 60)
    assert limiter.spent == 200
    limiter.reset_spent()
    assert limiter.spent == 0


def test_keys_differ_by_type_and_content(clock):
    limiter = RateLimiter("1/hour", burst=0, key=host_of)
    for key in (1, True, 1.0, "1", b"1", None, ("a", 1), frozenset({1})):
        assert limiter.bucket(key).try_acquire()
        assert not limiter.bucket(key).try_acquire()


def test_idle_buckets_are_dropped(clock):
    limiter = RateLimiter("10/s", key=host_of)
    for number in range(1000):
        limiter.bucket(f"host-{number}").acquire()
        clock.advance(0.01)
    gc.collect()
    assert len(limiter) < 200
    assert len(limiter._buckets._all) < 200


def test_a_bucket_in_which_something_counts_is_kept(clock):
    limiter = RateLimiter("3/hour", key=host_of)
    limiter.bucket("busy").acquire()
    limiter.bucket("paused").pause(3000)
    for number in range(500):
        limiter.bucket(f"host-{number}")
    assert [limiter.bucket("busy").try_acquire() for _ in range(3)] == [True, True, False]
    assert limiter.bucket("paused").paused > 0


def test_a_bucket_in_use_stays_the_one(clock):
    limiter = RateLimiter("3/hour", key=host_of)
    bucket = limiter.bucket("a")
    for number in range(500):
        limiter.bucket(f"host-{number}")
    assert limiter.bucket("a") is bucket


def test_more_keys_than_can_be_kept_are_forgotten_with_a_warning(clock, monkeypatch):
    monkeypatch.setattr("opero.limits.keyed._MOST", 70)
    limiter = RateLimiter("3/hour", key=host_of)
    for number in range(70):
        limiter.bucket(number).acquire()
    with pytest.warns(OperoWarning, match="more than 70 keys"):
        limiter.bucket("one too many")
    assert len(limiter) <= 70


def test_threads_that_come_at_once_find_one_bucket():
    limiter, found = RateLimiter("3/hour", key=host_of), []
    ready = threading.Barrier(8)

    def work() -> None:
        ready.wait(20)
        found.append(limiter.bucket("a"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(set(map(id, found))) == 1


def test_a_key_is_shown_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("OPERO_STATE_DIR", str(tmp_path))
    limiter = RateLimiter("3/hour", key=host_of, name="api")
    bucket = limiter.bucket("sk-hunter2")
    bucket.acquire()
    shown = [repr(limiter), repr(bucket), limiter.describe(), *map(str, tmp_path.rglob("*"))]
    assert not any("hunter2" in text for text in shown)
    assert len(list(tmp_path.iterdir())) == 2
    assert not any(b"hunter2" in path.read_bytes() for path in tmp_path.iterdir())


def test_a_named_limiter_keeps_its_buckets_for_the_next_program(tmp_path, monkeypatch):
    monkeypatch.setenv("OPERO_STATE_DIR", str(tmp_path))
    script = (
        "from opero import RateLimiter\n"
        "limiter = RateLimiter('2/hour', key=str, name='api')\n"
        "print(limiter.bucket('a').try_acquire())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=False, timeout=20
    )
    assert done.stdout == b"True\n", done.stderr
    limiter = RateLimiter("2/hour", key=str, name="api")
    assert [limiter.bucket("a").try_acquire() for _ in range(2)] == [True, False]
    assert limiter.bucket("b").try_acquire()


def test_processes_share_the_buckets_of_a_limiter_that_they_are_sent():
    limiter = RateLimiter("3/hour", key=str)
    limiter.bucket("early").acquire()
    data = pickle.dumps(limiter)
    assert pickle.loads(data) is limiter
    script = (
        "import pickle, sys\n"
        "limiter = pickle.load(sys.stdin.buffer)\n"
        "print([limiter.bucket(key).try_acquire() for key in ('early', 'late')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=data, capture_output=True, check=False, timeout=20
    )
    assert done.stdout == b"[True, True]\n", done.stderr
    for key in ("early", "late"):
        taken = [limiter.bucket(key).try_acquire() for _ in range(3)]
        assert sum(taken) == (1 if key == "early" else 2)
    folder = Path(limiter._path).parent
    assert folder.exists()
    del limiter
    gc.collect()
    assert not folder.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_while_a_thread_held_the_lock_can_go_on():
    script = (
        "import os, signal, threading\n"
        "from opero import RateLimiter\n"
        "limiter = RateLimiter('3/hour', key=str)\n"
        "held, done = threading.Event(), threading.Event()\n"
        "def hold():\n"
        "    with limiter._buckets._lock:\n"
        "        held.set(); done.wait(10)\n"
        "threading.Thread(target=hold, daemon=True).start()\n"
        "held.wait()\n"
        "if not os.fork():\n"
        "    signal.alarm(10)\n"
        "    os._exit(0 if limiter.bucket('a').try_acquire() else 1)\n"
        "code = os.waitstatus_to_exitcode(os.wait()[1]); done.set()\n"
        "print(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=False, timeout=20
    )
    assert done.stdout == b"0\n", done.stderr


@pytest.mark.parametrize(
    "use",
    [
        lambda limiter: limiter.acquire(),
        lambda limiter: limiter.try_acquire(),
        lambda limiter: limiter.reserve(),
        lambda limiter: asyncio.run(limiter.wait()),
        lambda limiter: asyncio.run(limiter.reserve_async()),
        lambda limiter: limiter.pause(5),
        lambda limiter: limiter.resume(),
        lambda limiter: limiter.left,
    ],
)
def test_by_hand_it_takes_a_bucket(use):
    with pytest.raises(OperoUsageError, match=r"say which, as in limiter.bucket\(key\)"):
        use(RateLimiter("10/s", key=host_of))


def test_a_key_that_fails_is_a_usage_error_that_shows_no_argument(face, clock):
    fetch = opero(cache=False, rate_limit=RateLimiter("5/s", key=lambda x: x[5]))(
        face.of(lambda x: x)
    )
    with pytest.raises(OperoUsageError, match="raised IndexError") as caught:
        face.run(fetch, "abc")
    assert "abc" not in str(caught.value)
    assert fetch.stats.calls == fetch.stats.retries == 0


def test_what_has_no_content_is_no_key(face):
    fetch = opero(cache=False, rate_limit=RateLimiter("5/s", key=threading.Lock))(
        face.of(lambda: 1)
    )
    with pytest.raises(OperoUsageError, match="cannot be a limiter's key"):
        face.run(fetch)


@pytest.mark.parametrize("key", ["host", 5])
def test_what_cannot_be_called_is_no_key_function(key):
    with pytest.raises(OperoUsageError, match=r"key=.* must be a plain function"):
        RateLimiter("10/s", key=key)


def test_no_bucket_is_asked_while_opero_is_disabled(face):
    limiter = RateLimiter("1/hour", key=lambda: 1 / 0)
    fetch = opero(cache=False, rate_limit=limiter)(face.of(lambda: 1))
    with set_disabled():
        assert [face.run(fetch) for _ in range(3)] == [1, 1, 1]
        assert limiter.acquire() == 0
