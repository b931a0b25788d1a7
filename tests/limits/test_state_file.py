# this_file: tests/limits/test_state_file.py
"""The files in which limits are kept for other processes: whose they are, what they remember, how they are mended."""

from __future__ import annotations

import gc
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from opero import RateLimiter
from opero.errors import OperoUsageError

posix = pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of limiters with a name."""
    monkeypatch.setenv("OPERO_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def named(rate: str, **options: object) -> RateLimiter:
    """Return the limiter of a name as the next program would make it."""
    gc.collect()  # that of the program before
    return RateLimiter(rate, name="api", **options)  # type: ignore[arg-type]  # as above


def file_of(state: Path) -> Path:
    (file,) = state.iterdir()
    return file


def started(limiter: RateLimiter) -> int:
    """Start as many calls as may start now."""
    return sum(limiter.try_acquire() for _ in range(20))


# --- where they lie -------------------------------------------------------------------------------


def test_each_name_has_a_file_where_the_environment_says(state):
    limiters = [RateLimiter("3/hour", name=name) for name in ("geo/coder", "geo_coder")]
    assert [limiter.try_acquire() for limiter in limiters] == [True, True]
    found = sorted(path.name for path in state.iterdir())
    assert len(found) == 2
    assert all(name.startswith("limiter-geo_coder-") for name in found)


def test_named_files_lie_in_the_users_state_directory_otherwise(tmp_path, monkeypatch):
    monkeypatch.delenv("OPERO_STATE_DIR", raising=False)
    monkeypatch.setattr("platformdirs.user_state_dir", lambda *_, **__: str(tmp_path / "home"))
    assert RateLimiter("3/hour", name="x").shared
    assert len(list((tmp_path / "home").iterdir())) == 1


@posix
def test_a_file_is_for_its_user_only(state):
    limiter = named("3/hour")
    assert stat.S_IMODE(file_of(state).stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert limiter.shared


@posix
def test_a_private_file_lies_in_a_private_folder_and_goes_with_its_limiter(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    limiter = RateLimiter("3/hour")
    assert limiter.share()
    (folder,) = tmp_path.glob("opero-*")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    del limiter
    gc.collect()
    assert not folder.exists()


@posix
def test_a_private_folder_in_use_by_others_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    limiter = RateLimiter("3/hour")
    assert limiter.share()
    (folder,) = tmp_path.glob("opero-*")
    (folder / "notes.txt").write_text("mine")
    del limiter
    gc.collect()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


# --- what they hold -------------------------------------------------------------------------------


def test_a_file_remembers_what_has_started(state):
    assert started(named("3/hour")) == 3
    assert started(named("3/hour")) == 0


@posix
@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "of another user", "huge"])
def test_what_is_no_plain_file_of_this_user_is_not_touched(state, tmp_path, monkeypatch, kind):
    named("3/hour")
    file, other = file_of(state), tmp_path / "other"
    other.write_bytes(b"precious")
    gc.collect()
    if kind == "of another user":
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    elif kind == "huge":
        os.truncate(file, 1 << 42)
    else:
        file.unlink()
        make = {"link": lambda: file.symlink_to(other), "folder": file.mkdir}
        make.get(kind, lambda: os.mkfifo(file))()
    with pytest.warns(RuntimeWarning, match="the limit is per process"):
        limiter = named("3/hour")
    assert started(limiter) == 3
    assert other.read_bytes() == b"precious"


@posix
def test_a_file_that_others_may_read_or_write_is_made_private(state):
    named("3/hour")
    gc.collect()
    file_of(state).chmod(0o666)
    named("3/hour")
    assert file_of(state).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b"text", bytes(500)], ids=["empty", "text", "zeros"])
def test_a_file_that_holds_something_else_is_begun_anew(state, content):
    named("3/hour")
    file = file_of(state)
    gc.collect()
    file.write_bytes(content)
    assert started(named("3/hour")) == 3
    assert started(named("3/hour")) == 0


def test_a_limit_that_was_changed_keeps_what_means_the_same(state):
    limiter = named("3 calls/hour & 30 tokens/minute", cap=100)
    limiter.acquire(cost=20)
    del limiter
    changed = named("5 calls/hour & 25 tokens/minute", cap=50)
    assert changed.spent == 20
    assert [changed.try_acquire(cost=cost) for cost in (10, 5)] == [False, True]


def test_another_rate_begins_anew(state):
    assert started(named("3/hour")) == 3
    assert started(named("1/hour")) == 1


def test_two_rates_of_one_name_in_one_program_are_an_error_with_the_fix(state):
    limiter = named("3/hour")
    with pytest.raises(
        OperoUsageError, match=r"this program, with 3 calls in 1 h.*different names"
    ):
        named("1/minute")
    assert limiter.try_acquire()


PROGRAM = """
import sys
from opero import RateLimiter
limiter = RateLimiter("3/hour", name="api")
print("ready", flush=True)
sys.stdin.read()
"""


@posix
def test_another_rate_while_a_program_uses_the_file_is_an_error_with_the_fix(state):
    program = subprocess.Popen(
        [
            sys.executable,
            "-c",
            PROGRAM,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdout
    assert program.stdout.readline() == "ready\n"
    with pytest.raises(
        OperoUsageError,
        match=r"another program, with 3 calls in 1 h and not one call each 60 s.*different names",
    ):
        named("1/minute", burst=0)
    program.communicate("")
    assert named("1/minute", burst=0).try_acquire()


# --- half a change, as a killed process leaves it -------------------------------------------------


def words(file: Path) -> memoryview:
    """Return a copy of the numbers in a file; the second one says whether a change was begun."""
    return memoryview(bytearray(file.read_bytes())).cast("q")


def test_a_sum_that_was_not_stored_is_made_anew(state):
    limiter = named("30 tokens/minute")
    limiter.acquire(cost=20)
    numbers = words(file_of(state))
    # Of the two places with what was spent, the sum of the window comes first.
    numbers[numbers.tolist().index(20_000_000)] = 0
    numbers[1] = 1
    with file_of(state).open("r+b") as file:
        file.write(numbers)
    assert [limiter.try_acquire(cost=cost) for cost in (20, 10)] == [False, True]


@pytest.mark.parametrize(
    ("rate", "wait"),
    [
        ("1/minute", r"\d\d(\.\d+)? s"),
        ("3/hour", r"(1 h|3\d{3} s)"),
        ("2/s & 3/hour", r"0\.\d+ s"),
        ("3 calls/hour & 30 tokens/minute", r"(1 h|3\d{3} s)"),
    ],
)
def test_no_damage_lifts_a_limit_or_holds_it_up_for_longer_than_a_period(state, rate, wait):
    limiter = named(rate, burst=0)
    started(limiter)
    numbers = words(file_of(state))
    for place, number in enumerate(numbers):
        if place and number > 10**15:  # a time
            numbers[place] = 1 << 61
    numbers[1] = 1
    with file_of(state).open("r+b") as file:
        file.write(numbers)
    assert not limiter.try_acquire()
    assert re.search(rf"; {wait} to wait>$", repr(limiter)), repr(limiter)
