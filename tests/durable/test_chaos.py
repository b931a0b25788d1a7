# this_file: tests/durable/test_chaos.py
"""Two workers are killed at random, over and over, and nothing is lost, doubled or mixed up.

`OPERO_CHAOS_STEPS` sets how many steps there are (default 4,000, about ten seconds). Kills are counted by steps, not by
seconds: however slow the machine is, workers get as far between two of them.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from opero.durable import Orchestrator

Start = Callable[..., subprocess.Popen[str]]

STEPS = int(os.environ.get("OPERO_CHAOS_STEPS", "4000"))
BRANCHES = 10

WORKER = """
import asyncio, os, sys, time
from opero.durable import Orchestrator, activity, sleep, uuid, workflow

notes = os.open("notes", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

@activity
def square(run, n):
    os.write(notes, f"s {run} {n}\\n".encode())
    time.sleep(0.001)
    return n * n

@activity(retries=3, min_delay=0, max_delay=0.001)
async def cube(run, branch, n):
    os.write(notes, f"c {run} {branch} {n}\\n".encode())
    await asyncio.sleep(0.001 * (branch % 3))
    return n ** 3

@workflow
def squares(run, n):
    return [square(run, i) for i in range(n)]

@workflow
async def cubes(run, branches, n):
    async def branch(b):
        found = []
        for i in range(n):
            found.append(await cube(run, b, 100 * b + i))
            if i % 7 == 0:
                await sleep(0.001)
        return found
    return await asyncio.gather(*(branch(b) for b in range(branches)))

if __name__ == "__main__":
    with Orchestrator("journal.db", max_recoveries=1000):
        print("started", flush=True)
        sys.stdin.read()
"""


@pytest.mark.timeout(max(300, STEPS // 20))
def test_random_kills_of_two_workers_lose_and_double_nothing(
    program: Start, journal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(WORKER, {"__name__": "desk"})  # the names of the workflows, for the desk
    desk = Orchestrator(journal)
    draw = random.Random(11)
    share = STEPS // 8
    loops = [desk.invoke_workflow("squares", run, share) for run in range(4)]
    fans = [desk.invoke_workflow("cubes", run, BRANCHES, share // BRANCHES) for run in range(4)]

    notes = tmp_path / "notes"
    notes.touch()

    def runs_on(steps: int) -> bool:
        """Wait for so many more calls of activities; return whether there were as many."""
        end = notes.read_bytes().count(b"\n") + steps
        while notes.read_bytes().count(b"\n") < end:
            if not desk.list_workflows(status="processing", limit=1):
                return False
            time.sleep(0.05)
        return True

    workers = [program(WORKER) for _ in range(2)]
    kills = 0
    while runs_on(draw.randrange(STEPS // 40, STEPS // 8)):
        victim = draw.randrange(2)
        started = workers[victim].stdout
        if draw.random() < 0.8 and started is not None:
            # The others die while they start.
            assert started.readline() == "started\n"
        if draw.random() < 0.2:
            # A process that is only suspended keeps its workflows.
            os.kill(workers[victim].pid, signal.SIGSTOP)
            time.sleep(draw.uniform(0, 0.3))
        workers[victim].kill()
        workers[victim].wait()
        kills += 1
        workers[victim] = program(WORKER)

    for found in loops:
        assert desk.result(found) == [n * n for n in range(share)]
    right = [[(100 * b + i) ** 3 for i in range(share // BRANCHES)] for b in range(BRANCHES)]
    for found in fans:
        assert desk.result(found) == right
    ran = Counter(notes.read_text().splitlines())
    assert len(ran) == 4 * share + 4 * BRANCHES * (share // BRANCHES)
    # A kill repeats at most the step that was under way: one of each loop, one of each branch.
    assert max(ran.values()) <= 1 + kills
    again = sum(count - 1 for count in ran.values())
    assert again <= kills * (4 + 4 * BRANCHES)
    assert kills >= 3
    desk.stop()
    with closing(sqlite3.connect(journal)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
