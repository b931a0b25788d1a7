# this_file: tests/durable/test_crash.py
"""Processes are really killed, and what they were doing goes on."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest

from opero.durable import Orchestrator, SqliteStore
from opero.durable.records import PutStep, StepRecord, StepState
from opero.errors import JournalError, OperoWarning

pytestmark = pytest.mark.internal

Start = Callable[..., subprocess.Popen[str]]

PROGRAM = """
import asyncio, os, signal, sys, time
from opero.durable import Orchestrator, activity, now, sleep, uuid, workflow

def note(text):
    fd = os.open("notes", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{text}\\n".encode())
    os.close(fd)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

@activity
def square(n):
    note(f"square {n}")
    time.sleep(PAUSE)
    return n * n

@activity
async def cube(n, step):
    note(f"cube {n} {step}")
    await asyncio.sleep(PAUSE * (1 + n % 3))
    return n ** 3 + step

@activity(idempotent=False)
def pay(cents):
    note("pay")
    if not os.path.exists("paid"):
        open("paid", "w").close()
        die()
    return cents

@activity(retries=4, min_delay=0, max_delay=0)
def shaky():
    note("shaky")
    with open("notes") as lines:
        count = len(list(lines))
    if count == 3:
        die()
    raise ConnectionError("down")

@activity
def poison():
    note("poison")
    die()

@workflow
def squares(n):
    return [square(i) for i in range(n)]

@workflow
async def cubes(n):
    async def branch(i):
        first = await cube(i, 1)
        second = await cube(i, 2)
        return first, second
    return await asyncio.gather(*(branch(i) for i in range(n)))

@workflow
def paying():
    return pay(500)

@workflow
def shaking():
    try:
        shaky()
    except ConnectionError as error:
        return str(error)

@workflow
def poisoned():
    poison()

@workflow
def facts():
    found = now(), uuid()
    note(found)
    sleep(0.3)
    note(found)
    if not os.path.exists("died"):
        open("died", "w").close()
        die()
    return found

@workflow
def naps(seconds):
    sleep(seconds)
    return time.time()

PAUSE = float(os.environ.get("PAUSE", "0.02"))
if __name__ == "__main__":
    orchestrator = Orchestrator("journal.db", max_recoveries=3)
    orchestrator.start()
    print("started", flush=True)
    sys.stdin.read()
    orchestrator.stop()
"""


@pytest.fixture
def engine(program: Start) -> Callable[[], subprocess.Popen[str]]:
    def start() -> subprocess.Popen[str]:
        process = program(PROGRAM)
        assert process.stdout is not None
        # What it finds there may kill it before it can say so.
        assert "started\n".startswith(process.stdout.readline())
        return process

    return start


@pytest.fixture
def desk(journal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Orchestrator]:
    """An orchestrator that runs nothing itself: it knows the workflows by name only."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(PROGRAM.replace('if __name__ == "__main__":', "if False:"), names)
    orchestrator = Orchestrator(journal)
    yield orchestrator
    orchestrator.stop()


def until(true: Callable[[], object], seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def notes(folder: Path) -> list[str]:
    path = folder / "notes"
    return path.read_text().splitlines() if path.exists() else []


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


@pytest.mark.parametrize(("name", "right"), [("squares", [n * n for n in range(20)])])
def test_killed_workflow_goes_on_where_it_was(
    tmp_path: Path,
    engine: Callable[[], subprocess.Popen[str]],
    desk: Orchestrator,
    name: str,
    right: Any,
) -> None:
    first = engine()
    found = desk.invoke_workflow(name, 20)
    until(lambda: len(notes(tmp_path)) >= 8)
    kill(first)
    engine()
    assert desk.result(found, timeout=60) == right
    ran = notes(tmp_path)
    assert len(ran) - len(set(ran)) <= 1
    assert set(ran) == {f"square {n}" for n in range(20)}


def test_concurrent_branches_never_swap_their_results(
    tmp_path: Path, engine: Callable[[], subprocess.Popen[str]], desk: Orchestrator
) -> None:
    found = desk.invoke_workflow("cubes", 9)
    for reached in (3, 8, 13):
        process = engine()
        until(lambda reached=reached: len(set(notes(tmp_path))) >= reached)
        kill(process)
    engine()
    assert desk.result(found, timeout=60) == [(n**3 + 1, n**3 + 2) for n in range(9)]


def test_step_that_must_not_run_twice_waits_for_a_word(
    tmp_path: Path, engine: Callable[[], subprocess.Popen[str]], desk: Orchestrator
) -> None:
    found = desk.invoke_workflow("paying")
    engine().wait()
    engine()
    status = desk.wait(found, timeout=60)
    assert (status["status"], desk.state(found)) == ("processing", "in_doubt")
    assert "step 1, pay, was running when its process died" in status["error_message"]
    desk.resolve(found, "1", result=500)
    assert desk.result(found, timeout=60) == 500
    assert notes(tmp_path) == ["pay"]


def test_step_in_doubt_can_be_run_again(
    tmp_path: Path, engine: Callable[[], subprocess.Popen[str]], desk: Orchestrator
) -> None:
    found = desk.invoke_workflow("paying")
    engine().wait()
    engine()
    desk.wait(found, timeout=60)
    desk.resolve(found, "1", again=True)
    assert desk.result(found, timeout=60) == 500
    assert notes(tmp_path) == ["pay", "pay"]


def test_attempts_survive_a_crash(
    tmp_path: Path, engine: Callable[[], subprocess.Popen[str]], desk: Orchestrator
) -> None:
    found = desk.invoke_workflow("shaking")
    engine().wait()
    engine()
    assert desk.result(found, timeout=60) == "down"
    # 1 + 4 attempts, and the one that the crash interrupted.
    assert len(notes(tmp_path)) == 6


def test_time_and_ids_are_the_same_after_a_crash(
    tmp_path: Path, engine: Callable[[], subprocess.Popen[str]], desk: Orchestrator
) -> None:
    found = desk.invoke_workflow("facts")
    engine().wait()
    engine()
    desk.result(found, timeout=60)
    assert len(set(notes(tmp_path))) == 1


def test_sleep_keeps_its_time_through_a_crash(
    engine: Callable[[], subprocess.Popen[str]], desk: Orchestrator
) -> None:
    process = engine()
    began = time.time()
    found = desk.invoke_workflow("naps", 3.0)
    until(lambda: desk.state(found) == "sleeping")
    kill(process)
    engine()
    until(lambda: desk.state(found) != "sleeping")
    again = time.time()
    woke = desk.result(found, timeout=60)
    assert woke - began >= 3.0
    assert woke - again < 2.5, "it slept anew"


def test_workflow_that_kills_its_process_is_given_up(
    tmp_path: Path, engine: Callable[[], subprocess.Popen[str]], desk: Orchestrator
) -> None:
    found = desk.invoke_workflow("poisoned")
    for _ in range(4):
        engine().wait()
    engine()
    until(lambda: desk.state(found) == "dead")
    assert "died 4 times in a row" in desk.get_workflow_status(found)["error_message"]
    assert notes(tmp_path) == ["poison"] * 4


def test_live_process_takes_over_from_a_dead_one_and_never_from_a_live_one(
    tmp_path: Path,
    engine: Callable[[], subprocess.Popen[str]],
    desk: Orchestrator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PAUSE", "0.3")
    first = engine()
    found = desk.invoke_workflow("squares", 60)  # far from its end when the other one has begun
    until(lambda: len(notes(tmp_path)) == 2)
    monkeypatch.setenv("PAUSE", "0.01")
    engine()
    os.kill(first.pid, signal.SIGSTOP)
    time.sleep(0.1)
    ran = len(notes(tmp_path))
    time.sleep(1.2)
    assert len(notes(tmp_path)) == ran, "a process that is only stopped lost its workflow"
    before = time.monotonic()
    kill(first)
    until(lambda: len(notes(tmp_path)) > ran)
    assert time.monotonic() - before < 60
    assert desk.result(found, timeout=60) == [n * n for n in range(60)]


def test_writes_of_a_zombie_are_refused(journal: Path, desk: Orchestrator) -> None:
    store = SqliteStore(journal)
    store.open()
    found = desk.invoke_workflow("squares", 1)
    with closing(sqlite3.connect(journal)) as db:
        db.execute("UPDATE workflow SET owner = 'me', epoch = 2, state = 'running'")
        db.commit()
    step = StepRecord(
        path="1", name="square", hash="", state=StepState.DONE, value="1", began=1.0, order=1
    )
    late, mine = PutStep(found, "me", 1, step), PutStep(found, "me", 2, step)
    assert store.apply([late, mine]) == [False, True]
    store.close()


# --- a journal that cannot be used -------------------------------------------------------------------------------


def test_full_disk_is_reported_and_nothing_is_lost(desk: Orchestrator) -> None:
    desk.start()
    writer = cast("SqliteStore", desk.store)._file._open_writer()

    def fill() -> None:
        for _ in range(1000):
            desk.invoke_workflow("squares", 1)
            time.sleep(0.005)

    with pytest.warns(OperoWarning, match="disk is full") as reported:  # noqa: PT031 - a story of its own
        pages = writer.execute("PRAGMA page_count").fetchone()[0]
        writer.execute(f"PRAGMA max_page_count = {pages + 3}")
        with pytest.raises(JournalError, match="disk is full"):
            fill()
        until(lambda: reported.list)
    writer.execute("PRAGMA max_page_count = 1000000")
    until(lambda: not desk.list_workflows(status="processing"))
    assert all(w["output"] == [0] for w in desk.list_workflows())


def test_read_only_file_is_reported(journal: Path, desk: Orchestrator) -> None:
    store = SqliteStore(journal)
    store.open()
    store._file._open_writer().execute("PRAGMA query_only = 1")
    step = StepRecord(path="1", name="", hash="", state=StepState.DONE)
    with pytest.raises(JournalError, match="cannot be written"):
        store.apply([PutStep("w", "o", 1, step)])
    store.close()


@pytest.mark.parametrize(
    ("content", "reported"),
    [(b"no database at all, however long" * 100, "damaged, or no SQLite database")],
)
def test_damaged_file_is_reported_and_unchanged(
    journal: Path, content: bytes, reported: str
) -> None:
    journal.write_bytes(content)
    with pytest.raises(JournalError, match=reported):
        Orchestrator(journal).start()
    assert journal.read_bytes() == content


def test_file_that_was_damaged_in_the_middle_is_reported(journal: Path, desk: Orchestrator) -> None:
    for _ in range(50):
        desk.invoke_workflow("squares", 1)
    desk.stop()
    content = bytearray(journal.read_bytes())
    content[4096 : len(content) - 4096] = b"\x5a" * (len(content) - 2 * 4096)
    journal.write_bytes(content)
    with pytest.raises(JournalError, match="damaged"):
        desk.list_workflows()
    with pytest.raises(JournalError, match="damaged"):
        desk.start()
    desk.stop()
    assert journal.read_bytes() == content
    assert not list(journal.parent.glob("*.own-*"))


def test_journal_of_a_newer_opero_is_refused(journal: Path) -> None:
    with closing(sqlite3.connect(journal)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(JournalError, match="written by a newer opero"):
        Orchestrator(journal).start()


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
def test_database_of_another_program_is_left_as_it_was(
    journal: Path, mode: str, version: int
) -> None:
    with closing(sqlite3.connect(journal)) as db:
        db.execute(f"PRAGMA journal_mode = {mode}")
        db.execute(f"PRAGMA user_version = {version}")
        db.execute("CREATE TABLE customers (id)")
    before = journal.read_bytes(), journal.stat().st_mtime_ns, journal.stat().st_mode
    with pytest.raises(JournalError, match="no journal of opero's"):
        Orchestrator(journal).start()
    assert (journal.read_bytes(), journal.stat().st_mtime_ns, journal.stat().st_mode) == before
    assert [path.name for path in journal.parent.iterdir()] == [journal.name]


@pytest.mark.parametrize("how", ["deleted", "replaced", "renamed"])
def test_journal_that_is_gone_is_an_error_at_once(
    journal: Path, desk: Orchestrator, how: str
) -> None:
    desk.start()
    desk.result(desk.invoke_workflow("squares", 1), timeout=60)
    if how == "renamed":
        journal.rename(journal.with_name("other.db"))
    else:
        for path in list(journal.parent.glob("journal.db*")):
            if ".own-" not in path.name:
                path.unlink()
    if how == "replaced":
        Orchestrator(journal).list_workflows()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OperoWarning)
        with pytest.raises(JournalError, match="deleted or replaced"):
            desk.invoke_workflow("squares", 1)
        with pytest.raises(JournalError, match="deleted or replaced"):
            desk.list_workflows()
        desk.stop()


def test_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="does not exist"):
        Orchestrator(tmp_path / "none" / "w.db").start()


def test_journal_is_readable_by_its_owner_only(journal: Path, desk: Orchestrator) -> None:
    desk.invoke_workflow("squares", 1)
    assert journal.stat().st_mode & 0o077 == 0
