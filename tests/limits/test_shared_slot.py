# this_file: tests/limits/test_shared_slot.py
from __future__ import annotations

import gc
import os
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from opero.errors import OperoUsageError
from opero.limits.state import file as shared_file
from opero.limits import shared_slot
from opero.limits.gcra import Gcra, Rule, SECOND
from opero.limits.windows import SlidingWindow
from opero.limits.state.file import private_path
from opero.limits.shared_slot import SharedSlot, open_slot, state_path

HOUR = 3600 * SECOND
MINUTELY = Gcra(60 * SECOND, 60 * SECOND, 0)
SPACED = Gcra(HOUR // 6, HOUR // 6, 0)
HOURLY = SlidingWindow(HOUR, 3)

posix = pytest.mark.skipif(os.name != "posix", reason="record locks and signals of POSIX")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "slot")


def fresh(path: str, rule: Rule = HOURLY, starts: list[int] | None = None) -> SharedSlot:
    return open_slot(path, rule, create=True, words=rule.words(starts or []))


@contextmanager
def header(path: str) -> Iterator[list[int]]:
    """The header's words, to be changed as nobody should."""
    with Path(path).open("r+b") as file:
        words = list(struct.unpack("16q", file.read(128)))
        yield words
        file.seek(0)
        file.write(struct.pack("16q", *words))


def forget(slot: SharedSlot) -> None:
    """Close the file as the end of the process would."""
    shared_file._files.users.pop(slot.path)


def run(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def most(slot: SharedSlot) -> int:
    """Count how many calls may start now."""
    return sum(not slot.take() for _ in range(20))


def test_a_file_remembers_what_has_started(path):
    slot = fresh(path)
    assert [slot.take() == 0 for _ in range(4)] == [True, True, True, False]
    forget(slot)
    again = open_slot(path, HOURLY, create=False)
    assert again is not slot
    assert HOUR - 10 * SECOND < again.take() <= HOUR
    assert again.look() <= HOUR


def test_a_process_has_one_slot_per_file(path):
    assert fresh(path) is fresh(path)


def test_a_slot_is_closed_with_its_last_user(path):
    slot = fresh(path)
    fd = slot.fd
    del slot
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_descriptor_is_kept_while_the_file_is_open_once_more(path):
    slot = fresh(path)
    fd = slot.fd
    forget(slot)
    again = fresh(path)
    del slot
    gc.collect()
    assert os.fstat(fd)
    assert shared_file._files.kept.pop() == fd
    os.close(fd)
    assert again.take() == 0


def test_a_slot_can_be_given_back(path):
    slot = fresh(path)
    wait, mark = slot.take_marked()
    assert wait == 0
    assert slot.give_back(mark)
    assert most(slot) == 3
    assert not slot.give_back(mark)


@posix
def test_a_file_is_for_its_user_only(path):
    fresh(path)
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600


@posix
def test_a_link_to_somewhere_else_is_not_followed(path, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"precious")
    Path(path).symlink_to(other)
    with pytest.raises(OSError, match="symbolic links"):
        fresh(path)
    assert other.read_bytes() == b"precious"


def test_a_folder_is_no_slot(tmp_path):
    with pytest.raises(OSError, match=r"directory|denied"):
        fresh(str(tmp_path))


def test_what_does_not_exist_cannot_be_joined(path):
    with pytest.raises(OSError, match="No such file"):
        open_slot(path, HOURLY, create=False)


def test_what_is_no_slot_cannot_be_joined(path):
    Path(path).write_bytes(bytes(500))
    with pytest.raises(OSError, match="holds no slot"):
        open_slot(path, HOURLY, create=False)


# --- killed ---------------------------------------------------------------------------------------

HOLDER = """
import sys
from opero.limits import file_lock
from opero.limits.shared_slot import open_slot
from opero.limits.gcra import rule_of
slot = open_slot(sys.argv[1], rule_of(tuple(map(int, sys.argv[2].split()))), create=True)
file_lock.lock(slot.fd)
exec(sys.argv[3])
print("held", flush=True)
sys.stdin.read()
"""


@posix
@pytest.mark.parametrize(
    ("rule", "damage"),
    [
        (MINUTELY, "pass"),
        (MINUTELY, "slot._words[0] = 0"),
        (MINUTELY, "slot._words[0] = -(1 << 62)"),
        (MINUTELY, "slot._words[0] = (1 << 62)"),
        (HOURLY, "slot._words[0] = 0"),
        (HOURLY, "slot._words[0] = (1 << 62)"),
        (HOURLY, "for place in range(5): slot._words[place] = (1 << 62)"),
        (HOURLY, "slot._words[1] = -5; slot._words[0] = 7"),
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
def test_others_wait_while_somebody_decides(path):
    slot = fresh(path)
    holder = run(HOLDER, path, " ".join(map(str, HOURLY.signature)), "pass")
    assert holder.stdout
    holder.stdout.readline()
    taker = run(
        "import sys\n"
        "from opero.limits.shared_slot import open_slot\n"
        "from opero.limits.gcra import *\n"
        "from opero.limits.state.base import *\n"
        f"slot = open_slot({path!r}, Quota({HOUR}, 3), create=False)\n"
        "print(slot.take(), flush=True)",
    )
    with pytest.raises(subprocess.TimeoutExpired):
        taker.wait(0.4)
    holder.communicate("")
    assert taker.communicate()[0] == "0\n"
    assert most(slot) == 2


# --- boots ----------------------------------------------------------------------------------------

MONOTONIC, WALL, BOOT = 6, 7, 8


@pytest.fixture(params=["boot id", "no boot id"])
def boot(request, monkeypatch, tmp_path) -> Path:
    """The system's boot id, or that there is none."""
    file = tmp_path / "boot_id"
    if request.param == "boot id":
        file.write_text("11111111-1111-1111-1111-111111111111\n")
    monkeypatch.setattr(shared_slot, "_BOOT_ID", file)
    return file


def reboot(boot: Path, path: str, *, uptime_before: int, asleep: int) -> None:
    """Make the file one of an earlier boot, `asleep` ago, whose clock read something else."""
    if boot.exists():
        boot.write_text("22222222-2222-2222-2222-222222222222\n")
    with Path(path).open("r+b") as file:
        words = list(struct.unpack("16q", file.read(128)))
        rest = file.read()
        body = list(struct.unpack(f"{len(rest) // 8}q", rest))
        moved = uptime_before - words[MONOTONIC]
        words[MONOTONIC] += moved
        words[WALL] -= asleep
        times = [0] if len(body) == 1 else [0, *range(2, len(body))]
        for place in times:
            if abs(body[place]) < 1 << 60:
                body[place] += moved
        words[5] = ~body[0]
        file.seek(0)
        file.write(struct.pack(f"{16 + len(body)}q", *words, *body))


@pytest.mark.parametrize("uptime_before", [5 * SECOND, 10**17])
@pytest.mark.parametrize(
    ("rule", "asleep", "left"),
    [
        (HOURLY, 0, HOUR),
        (HOURLY, HOUR // 2, HOUR // 2),
        (HOURLY, 2 * HOUR, 0),
        (SPACED, 0, HOUR // 6),
        (SPACED, HOUR // 8, HOUR // 24),
        (SPACED, HOUR, 0),
    ],
)
def test_a_limit_goes_on_after_a_reboot(boot, path, rule, uptime_before, asleep, left):
    slot = fresh(path, rule)
    while not slot.take():
        pass
    forget(slot)
    reboot(boot, path, uptime_before=uptime_before, asleep=asleep)
    wait = fresh(path, rule).look()
    assert max(0, left - 10 * SECOND) <= wait <= left


def test_a_wall_clock_set_back_before_the_reboot_counts_as_no_time(boot, path):
    now = time.monotonic_ns()
    slot = fresh(path, starts=[now - age * HOUR // 60 for age in (40, 20, 0)])
    forget(slot)
    reboot(boot, path, uptime_before=10**17, asleep=-8 * HOUR)
    assert HOUR // 3 - 10 * SECOND <= fresh(path).look() <= HOUR // 3


@pytest.mark.parametrize("place", [MONOTONIC, WALL])
@pytest.mark.parametrize("word", [-(1 << 63), -1, (1 << 63) - 1])
def test_no_damage_to_the_clock_readings_costs_more_than_a_period(boot, path, place, word):
    slot = fresh(path)
    while not slot.take():
        pass
    forget(slot)
    with header(path) as words:
        words[place] = word
    assert fresh(path).look() <= HOUR


def test_a_monotonic_clock_that_went_back_within_one_boot_costs_no_more_than_a_period(
    path, tmp_path
):
    slot = fresh(path)
    while not slot.take():
        pass
    forget(slot)
    reboot(tmp_path / "none", path, uptime_before=10**17, asleep=0)
    assert fresh(path).look() <= HOUR


def test_the_wall_clock_changes_nothing_within_one_boot(path, tmp_path, monkeypatch):
    boot = tmp_path / "boot_id"
    boot.write_text("11111111-1111-1111-1111-111111111111\n")
    monkeypatch.setattr(shared_slot, "_BOOT_ID", boot)
    slot = fresh(path)
    while not slot.take():
        pass
    forget(slot)
    with header(path) as words:
        words[WALL] -= 8 * HOUR
    assert fresh(path).look() > HOUR - 10 * SECOND


# --- another rule ---------------------------------------------------------------------------------


def test_a_file_that_nobody_uses_takes_another_rule_and_keeps_its_starts(path):
    slot = fresh(path, HOURLY)
    slot.take()
    slot.take()
    forget(slot)
    del slot
    gc.collect()
    assert most(fresh(path, SlidingWindow(HOUR, 10))) == 8


@pytest.mark.parametrize("rule", [MINUTELY, SlidingWindow(HOUR, 1)], ids=str)
def test_a_quota_turned_into_another_rule_still_counts_the_last_start(path, rule):
    slot = fresh(path, HOURLY)
    slot.take()
    forget(slot)
    assert fresh(path, rule).take() > 0


def test_two_rules_in_one_program_are_an_error_with_the_fix(path):
    slot = fresh(path)
    with pytest.raises(OperoUsageError, match=r"3 calls in 1 h.*different names"):
        fresh(path, MINUTELY)
    assert slot.take() == 0


@posix
def test_another_rule_while_a_program_uses_the_file_is_an_error_with_the_fix(path):
    holder = run(HOLDER.replace("file_lock.lock", "id"), path, f"2 {HOUR} 3 0", "pass")
    assert holder.stdout
    holder.stdout.readline()
    with pytest.raises(
        OperoUsageError, match=r"another program.*one call each 60 s.*different names"
    ):
        fresh(path, MINUTELY)
    holder.communicate("")
    assert fresh(path, MINUTELY).take() == 0


# --- where files lie ------------------------------------------------------------------------------


class Owner:
    """Somebody whose file it is."""


@posix
def test_a_private_file_lies_in_a_private_folder_and_goes_with_its_owner():
    owner = Owner()
    path = Path(private_path(owner))
    path.write_bytes(b"")
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.parent.name.startswith("opero-")
    del owner
    gc.collect()
    assert not path.parent.exists()


@posix
def test_a_private_file_is_removed_by_the_end_of_its_creator_and_by_no_forked_child():
    script = """
import os, sys
from pathlib import Path
from opero.limits.state.file import private_path
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


def test_named_files_lie_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("OPERO_STATE_DIR", str(tmp_path / "state"))
    one, other = Path(state_path("geo/coder")), Path(state_path("geo_coder"))
    assert one.parent == tmp_path / "state"
    assert one != other
    assert one.name.startswith("limiter-geo_coder-")


def test_named_files_lie_in_the_users_state_directory_otherwise(tmp_path, monkeypatch):
    monkeypatch.delenv("OPERO_STATE_DIR", raising=False)
    monkeypatch.setattr("platformdirs.user_state_dir", lambda *_, **__: str(tmp_path / "home"))
    assert Path(state_path("x")).parent == tmp_path / "home"


def test_taking_is_fast_enough_for_a_clock_that_runs_on(path):
    assert most(fresh(path, Gcra(SECOND, 1, 0))) == 20


def test_the_clocks_are_written_down_each_second(path, monkeypatch):
    slot = fresh(path, Gcra(SECOND, 1, 0))
    now = time.monotonic_ns()
    clocks = SimpleNamespace(monotonic_ns=lambda: now, time_ns=lambda: 10**18 + now)
    monkeypatch.setattr(shared_slot, "time", clocks)
    for _ in range(50):
        now += SECOND // 10
        assert slot.take() == 0
        assert 0 <= now - slot._header[MONOTONIC] < SECOND
    assert slot._header[WALL] - slot._header[MONOTONIC] == 10**18
