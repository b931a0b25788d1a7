# this_file: tests/limits/test_file_state.py
from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from opero.limits import limiter_state, state_file
from opero.limits.gcra import SECOND, Gcra, Rule
from opero.limits.limiter_state import LimiterState
from opero.limits.windows import SlidingWindow

pytestmark = pytest.mark.internal

HOUR = 3600 * SECOND
MINUTELY = Gcra(60 * SECOND, 60 * SECOND, 0)
SPACED = Gcra(HOUR // 6, HOUR // 6, 0)
HOURLY = SlidingWindow(HOUR, 3)

posix = pytest.mark.skipif(os.name != "posix", reason="record locks and signals of POSIX")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "slot")


def fresh(path: str, rule: Rule = HOURLY, *, named: bool = False) -> LimiterState:
    return LimiterState(rule).move(path, create=True, named=named)


def joined(path: str, rule: Rule = HOURLY) -> LimiterState:
    return LimiterState(rule).move(path, create=False)


def forget(slot: LimiterState) -> None:
    """Close the file as the end of the process would."""
    state_file._open_files.files.pop(slot.file.path)


def run(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def most(slot: LimiterState) -> int:
    """Count how many calls may start now."""
    return sum(not slot.take() for _ in range(20))


def test_a_process_has_one_descriptor_per_file(path):
    assert fresh(path).file is fresh(path).file


def test_a_slot_is_closed_with_its_last_user(path):
    slot = fresh(path)
    fd = slot.file.fd
    del slot
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_descriptor_is_kept_while_the_file_is_open_once_more(path):
    slot = fresh(path)
    fd = slot.file.fd
    forget(slot)
    again = fresh(path)
    del slot
    gc.collect()
    assert os.fstat(fd)
    assert state_file._open_files.kept.pop() == fd
    os.close(fd)
    assert again.take() == 0


def test_a_slot_can_be_given_back(path):
    slot = fresh(path)
    wait, mark = slot.take_marked()
    assert wait == 0
    assert slot.give_back(mark)
    assert most(slot) == 3
    assert not slot.give_back(mark)


@pytest.mark.parametrize("rule", [MINUTELY, HOURLY], ids=str)
def test_a_caller_that_holds_a_state_while_it_moves_looks_again(path, rule):
    slot = LimiterState(rule)
    take = slot.take
    while not take():
        pass
    assert slot.pause(2 * HOUR)
    slot.move(path, create=True)
    assert take() > 0
    assert HOUR < slot.wait_for() <= 2 * HOUR
    slot.resume()
    assert 0 < slot.take_marked()[0] <= rule.period


def test_what_does_not_exist_cannot_be_joined(path):
    with pytest.raises(OSError, match="No such file"):
        joined(path)


def test_what_is_no_slot_cannot_be_joined(path):
    Path(path).write_bytes(bytes(500))
    with pytest.raises(OSError, match="holds no such state"):
        joined(path)


# --- killed ---------------------------------------------------------------------------------------

HOLDER = """
import sys
from opero.limits.limiter_state import LimiterState
from opero.limits.windows import part_of
slot = LimiterState(part_of(tuple(map(int, sys.argv[2].split())))).move(sys.argv[1], create=True)

def hold():
    exec(sys.argv[3])
    print("held", flush=True)
    sys.stdin.read()

slot.file.exclusively(hold)
"""


@posix
@pytest.mark.parametrize(
    ("rule", "damage"),
    [
        (MINUTELY, "pass"),
        (MINUTELY, "slot._state[0] = (1 << 61)"),
        (HOURLY, "slot._state[0] = (1 << 61)"),
        (HOURLY, "for place in range(5): slot._state[place] = (1 << 61)"),
        (HOURLY, "slot._state[2 + slot._state[1] % 3] = slot._now()"),
    ],
)
def test_a_holder_that_is_killed_neither_hangs_nor_lifts_the_limit(path, rule, damage):
    slot = fresh(path, rule)
    while not slot.take():
        pass
    holder = run(HOLDER, path, " ".join(map(str, rule.signature)), damage)
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    wait = slot.take()
    assert 0 < wait <= rule.period
    assert slot.take() > 0


@posix
def test_others_wait_while_one_holder_decides(path):
    slot = fresh(path)
    holder = run(HOLDER, path, " ".join(map(str, HOURLY.signature)), "pass")
    assert holder.stdout
    holder.stdout.readline()
    taker = run(
        "import sys\n"
        "from opero.limits.limiter_state import LimiterState\n"
        "from opero.limits.windows import SlidingWindow\n"
        f"slot = LimiterState(SlidingWindow({HOUR}, 3)).move({path!r}, create=False)\n"
        "print(slot.take(), flush=True)",
    )
    with pytest.raises(subprocess.TimeoutExpired):
        taker.wait(0.4)
    holder.communicate("")
    assert taker.communicate()[0] == "0\n"
    assert most(slot) == 2


# --- clocks ---------------------------------------------------------------------------------------


class Clocks:
    """The two clocks that a state may go by."""

    def __init__(self) -> None:
        self.monotonic, self.wall = 10**15, 10**18

    def pass_(self, time: int) -> None:
        self.monotonic += time
        self.wall += time

    def reboot(self, asleep: int) -> None:
        self.monotonic = 5 * SECOND
        self.wall += asleep

    def monotonic_ns(self) -> int:
        return self.monotonic

    def time_ns(self) -> int:
        return self.wall


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    made = Clocks()
    monkeypatch.setattr(limiter_state, "time", made)
    return made


@pytest.mark.parametrize(
    ("rule", "asleep", "left"),
    [
        (HOURLY, 0, HOUR),
        (HOURLY, HOUR // 2, HOUR // 2),
        (HOURLY, 2 * HOUR, 0),
        (SPACED, HOUR // 8, HOUR // 24),
        (SPACED, HOUR, 0),
    ],
)
def test_a_named_limit_goes_on_after_a_reboot_by_the_wall_clock(clocks, path, rule, asleep, left):
    state = fresh(path, rule, named=True)
    while not state.take():
        pass
    forget(state)
    clocks.reboot(asleep)
    assert fresh(path, rule, named=True).wait_for() == left


@pytest.mark.parametrize("rule", [MINUTELY, HOURLY, SPACED], ids=str)
@pytest.mark.parametrize("hours", [-8, -1])
def test_a_wall_clock_that_is_set_back_costs_no_more_than_a_period(clocks, path, rule, hours):
    state = fresh(path, rule, named=True)
    while not state.take():
        pass
    clocks.wall += hours * HOUR
    assert 0 < state.take() <= rule.longest_wait
    clocks.pass_(rule.longest_wait)
    assert state.take() == 0


@pytest.mark.parametrize("rule", [MINUTELY, HOURLY], ids=str)
def test_a_private_state_holds_on_a_machine_that_has_just_started(clocks, path, rule):
    clocks.monotonic = 3
    state = fresh(path, rule)
    taken = sum(not state.take() for _ in range(10))
    assert taken == (3 if rule is HOURLY else 1)
    assert state.pause(SECOND)
    assert state.paused() == SECOND


def test_no_call_slips_through_a_pause_while_the_state_moves(path):
    waits: list[int] = []

    class Lock:
        """Lets a call that waited for it go on as soon as it is free."""

        def __enter__(self):
            pass

        def __exit__(self, *_):
            if not waits:
                waits.append(-1)
                waits[:] = [state.take_marked()[0]]

    state = LimiterState(HOURLY)
    state.pause(SECOND)
    state._lock = Lock()
    state.move(path, create=True)
    assert 0 < waits[0] <= SECOND


@pytest.mark.parametrize("shared", [False, True])
def test_a_signal_handler_may_make_a_call_within_a_call(path, shared):
    within: list[int] = []

    def now() -> int:
        if not within:
            within.append(-1)
            within[:] = [state.take_marked()[0]]
        return SECOND

    state = fresh(path) if shared else LimiterState(HOURLY)
    state._now = now
    assert state.take_marked()[0] == 0
    assert within == [0]
    assert [state.take_marked()[0] == 0 for _ in range(2)] == [True, False]


# --- where files lie ------------------------------------------------------------------------------


@posix
def test_a_private_file_is_removed_by_the_end_of_its_creator_and_by_no_forked_child():
    script = """
import os, sys
from pathlib import Path
from opero.limits.state_file import private_path
class Owner: ...
owner = Owner()
path = Path(private_path(owner)); path.touch()
if not os.fork():
    sys.exit()
os.wait()
print(path.exists(), path.parent)
"""
    there, folder = run(script).communicate()[0].split()
    assert there == "True"
    assert not Path(folder).exists()


def test_taking_is_fast_enough_for_a_clock_that_runs_on(path):
    assert most(fresh(path, Gcra(SECOND, 1, 0))) == 20
