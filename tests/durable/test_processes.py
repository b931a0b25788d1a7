# this_file: tests/durable/test_processes.py
"""Programs that end without a stop, that fork, and that run several engines."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from opero.durable import Orchestrator, activity, get_registry, workflow
from opero.errors import OperoWarning

Start = Callable[..., subprocess.Popen[str]]

UNSTOPPED = """
import sys, time, threading
from opero.durable import Orchestrator, activity, sleep, workflow

went = threading.Event()

@activity
def step(seconds):
    went.set()
    time.sleep(seconds)
    return seconds

@workflow
def steps(seconds, n):
    return [step(seconds) for _ in range(n)]

@workflow
async def sleeper():
    await sleep(3600)

orchestrator = Orchestrator("journal.db")
orchestrator.start()
if len(sys.argv) > 1:
    orchestrator.invoke_workflow("sleeper")
    orchestrator.invoke_workflow("steps", float(sys.argv[1]), 1000, workflow_id="steps")
    went.wait()
else:
    print(orchestrator.state("steps"))
"""


@pytest.mark.parametrize("seconds", [0.0, 0.05, 300.0])
def test_program_may_end_without_a_stop(program: Start, seconds: float) -> None:
    process = program(UNSTOPPED, seconds)
    assert process.wait(timeout=100) == 0
    again = program(UNSTOPPED)
    reported, _ = again.communicate(timeout=100)
    assert again.returncode == 0
    assert reported.strip() in ("running", "done")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_forked_child_hands_its_workflows_to_its_parent(journal: Path, program: Start) -> None:
    process = program(
        """
        import os, threading, time
        from opero.durable import Orchestrator, activity, workflow

        @activity
        def whoami():
            return os.getpid()

        @workflow
        def where():
            return whoami()

        @workflow
        def forking():
            child = os.fork()
            if not child:
                # No part of the workflow: a plain call.
                os._exit(0 if whoami() == os.getpid() else 1)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

        with Orchestrator("journal.db") as orchestrator:
            parent = os.getpid()
            assert orchestrator.result(orchestrator.invoke_workflow("where")) == parent
            child = os.fork()
            if not child:
                found = orchestrator.result(orchestrator.invoke_workflow("where"), timeout=60)
                os._exit(0 if found == parent else 1)
            assert os.waitpid(child, 0)[1] == 0
            assert orchestrator.result(orchestrator.invoke_workflow("forking"), timeout=60) == 0
            assert orchestrator.result(orchestrator.invoke_workflow("where")) == parent
        print("well")
        """.replace("\n        ", "\n")
    )
    reported, _ = process.communicate(timeout=100)
    assert reported == "well\n"


def test_several_engines_in_one_process(tmp_path: Path) -> None:
    @activity
    def plus(n: int) -> int:
        return n + 1

    @workflow
    def counted(n: int) -> int:
        return plus(plus(n))

    with (
        Orchestrator(tmp_path / "a.db") as a,
        Orchestrator(tmp_path / "a.db") as b,
        Orchestrator(tmp_path / "c.db") as c,
    ):
        found = [o.invoke_workflow("counted", n) for n in range(20) for o in (a, b)]
        assert [b.result(f, timeout=60) for f in found[::2]] == [n + 2 for n in range(20)]
        assert [a.result(f, timeout=60) for f in found[1::2]] == [n + 2 for n in range(20)]
        assert c.list_workflows() == []
        assert len(a.list_workflows()) == 40


def test_import_of_the_front_door_is_light() -> None:
    heavy = {"asyncio", "sqlite3", "logging", "concurrent.futures"}
    source = f"import sys, opero.durable; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


POISON = """
import os, sys, time
from opero.durable import Orchestrator, activity, workflow

@activity
def die(seconds):
    time.sleep(seconds)
    os._exit(7)

@activity
def work(seconds):
    time.sleep(seconds)
    return "done"

@workflow
def poison(seconds):
    die(seconds)

@workflow
def innocent(seconds):
    return work(seconds)

orchestrator = Orchestrator("journal.db", max_recoveries=3)
if not os.path.exists("journal.db"):
    for n in range(2):
        orchestrator.invoke_workflow("poison", 0.05, workflow_id=f"poison {n}")
        orchestrator.invoke_workflow("innocent", 0.3, workflow_id=f"innocent {n}")
orchestrator.start()
for n in range(2):
    print(orchestrator.wait(f"poison {n}")["status"], orchestrator.wait(f"innocent {n}")["status"])
os._exit(0)
"""


@pytest.mark.timeout(120)
def test_poisonous_workflows_are_given_up_and_the_others_end(program: Start) -> None:
    for _ in range(30):
        process = program(POISON)
        printed, _ = process.communicate(timeout=100)
        if process.returncode == 0:
            break
        assert process.returncode == 7
    assert printed.split() == ["failed", "done"] * 2


def test_workflow_that_no_program_knows_waits_and_says_so(
    journal: Path, until: Callable[..., None]
) -> None:
    @workflow("nightly")
    def nightly() -> None: ...

    desk = Orchestrator(journal)
    found = desk.invoke_workflow("nightly")
    desk.stop()
    get_registry().workflows.clear()
    with Orchestrator(journal) as other:
        with pytest.warns(OperoWarning, match="registered the workflow 'nightly'"):
            until(lambda: other.get_workflow_status(found)["error_message"])
        assert other.state(found) == "queued"
        with (
            pytest.warns(OperoWarning, match="waits: no running program"),
            pytest.raises(TimeoutError, match="'nightly'"),
        ):
            other.wait(found, timeout=0.3)
        workflow("nightly")(nightly)
        until(lambda: other.state(found) == "done")
        assert other.get_workflow_status(found)["error_message"] is None


OPENING = """
import sys, time
from opero.durable import Orchestrator
time.sleep(max(0, float(sys.argv[1]) - time.time()))
for n in range(50):
    with Orchestrator(f"{n}.db"):
        pass
print("well")
"""


@pytest.mark.timeout(120)
def test_new_journals_are_opened_by_several_processes_at_once(program: Start) -> None:
    began = time.time() + 1.5
    processes = [program(OPENING, began) for _ in range(3)]
    for process in processes:
        assert (process.communicate(timeout=100)[0], process.returncode) == ("well\n", 0)
    assert time.time() - began < 60
