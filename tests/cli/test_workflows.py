# this_file: tests/cli/test_workflows.py
"""`opero workflows`: a journal is looked at, and its workflows are stepped into, from outside the program."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from opero.cli import main
from opero.durable import Orchestrator, activity, get_registry, wait_for, workflow
from opero.durable.records import Acquire, Move, PutStep, State, StepRecord, StepState

pytestmark = pytest.mark.internal

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    workflows = get_registry().workflows
    before = dict(workflows)
    workflows.clear()
    yield
    workflows.clear()
    workflows.update(before)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A journal with a workflow that is done, one that failed, and one that waits."""

    @activity
    def price(item: str) -> tuple[str, int]:
        return item, len(item)

    @workflow
    def buying(items: list[str]) -> Any:
        return [price(item) for item in items]

    @workflow
    def failing() -> None:
        price("x")
        raise ValueError("no such thing\nat all")

    @workflow
    async def asking() -> Any:
        return await wait_for("answer")

    path = tmp_path / "journal.db"
    with Orchestrator(path) as orchestrator:
        orchestrator.wait(orchestrator.invoke_workflow("buying", ["tea", "milk"], workflow_id="a"))
        orchestrator.wait(orchestrator.invoke_workflow("failing", workflow_id="b"))
    # Nobody runs it any more.
    orchestrator.invoke_workflow("asking", workflow_id="c")
    orchestrator.stop()
    return path


@pytest.fixture
def run(journal: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a verb; return its exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["workflows", *arguments, "--db", str(journal)])
        return code, *capsys.readouterr()

    return run


def test_list_is_a_table(run: Run) -> None:
    code, out, _ = run("list")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split() == ["id", "name", "state", "activity", "updated", "(UTC)", "error"]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["c", "asking", "queued"],
        ["b", "failing", "failed"],
        ["a", "buying", "done"],
    ]
    assert lines[2].endswith("ValueError: no such thing at all")


def test_list_can_be_narrowed(run: Run) -> None:
    assert len(run("list", "--status", "failed")[1].splitlines()) == 2
    assert len(run("list", "--name", "buying")[1].splitlines()) == 2
    assert len(run("list", "--limit", "1")[1].splitlines()) == 2
    assert run("list", "--name", "nothing")[1] == "No workflows.\n"
    code, _, err = run("list", "--status", "faild")
    assert (code, "Did you mean 'failed'" in err) == (1, True)


def test_everything_is_there_as_json(run: Run) -> None:
    found = json.loads(run("list", "--json")[1])
    assert [one["id"] for one in found] == ["c", "b", "a"]
    shown = json.loads(run("show", "a", "--json")[1])
    assert (shown["state"], shown["output"]) == ("done", [["tea", 3], ["milk", 4]])
    steps = json.loads(run("steps", "a", "--json")[1])
    assert [step["name"] for step in steps] == ["price", "price"]


def test_one_workflow_is_shown_with_its_result_or_error(run: Run) -> None:
    _, out, _ = run("show", "a")
    assert "[('tea', 3), ('milk', 4)]" in out
    assert "ValueError" in run("show", "b")[1]
    code, _, err = run("show", "nobody")
    assert (code, err) == (1, "opero: there is no workflow with the id 'nobody'.\n")


def test_steps_are_a_table(run: Run) -> None:
    _, out, _ = run("steps", "a")
    lines = [line.split() for line in out.splitlines()]
    assert [line[:5] for line in lines[1:]] == [
        ["1", "1", "price", "done", "1"],
        ["2", "2", "price", "done", "1"],
    ]
    assert out.splitlines()[1].endswith("('tea', 3)")
    assert run("steps", "c")[1] == "No steps.\n"


def test_cancel_and_resume(run: Run) -> None:
    assert run("cancel", "c")[:2] == (0, "c is being cancelled.\n")
    assert run("cancel", "c")[:2] == (1, "c has ended already.\n")
    assert run("resume", "c")[0] == 0
    assert run("resume", "a")[:2] == (1, "a is not failed, cancelled, dead or blocked.\n")


def test_fork_prints_the_id_of_the_copy(run: Run) -> None:
    assert run("fork", "a", "2", "--id", "copy")[:2] == (0, "copy\n")
    assert len(json.loads(run("steps", "copy", "--json")[1])) == 1
    code, _, err = run("fork", "a", "9")
    assert (code, "has steps 1 to 2" in err) == (1, True)


def test_signal_reaches_the_workflow(run: Run, journal: Path) -> None:
    assert run("signal", "c", "answer", '{"n": 42}')[0] == 0
    with Orchestrator(journal) as orchestrator:
        assert orchestrator.result("c", timeout=10) == {"n": 42}
    code, _, err = run("signal", "c", "answer", "plain")
    assert (code, "is no JSON" in err) == (1, True)


@pytest.mark.parametrize(
    ("received", "status", "value"),
    [(["--result", "[7]"], "done", [7]), (["--error", "lost"], "failed", None), (["--again"], None, None)],
)  # fmt: skip
def test_step_in_doubt_is_resolved(
    run: Run, journal: Path, received: list[str], status: str | None, value: Any
) -> None:
    with Orchestrator(journal) as desk:
        pass
    desk.store.open()
    me = desk.store.join()
    (found,) = desk.store.apply([Acquire(me, ("asking",), 1)])[0]
    step = StepRecord(path="1", name="pay", hash="", state=StepState.STARTED, began=1.0, order=1)
    doubt = Move("c", me, found.epoch, State.IN_DOUBT)
    assert desk.store.apply([PutStep("c", me, found.epoch, step), doubt]) == [True, True]
    desk.store.leave(me)
    desk.stop()

    assert run("resolve", "c", "1", *received)[0] == 0
    steps = json.loads(run("steps", "c", "--json")[1])
    assert [(s["status"], s["output"]) for s in steps] == ([(status, value)] if status else [])
    assert run("resolve", "c", "1", *received)[0] == 1


def test_to_look_makes_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["workflows", "list", "--db", str(tmp_path / "none.db")]) == 1
    assert "there is no journal" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [
        "step SET ended = 'x'",
        "step SET value = CAST(x'68756e74657232ff' AS TEXT)",
        "workflow SET created = 1e300",
        "workflow SET error = x'00'",
    ],
)
def test_a_damaged_row_is_an_error_that_shows_nothing_of_it(
    run: Run, journal: Path, damage: str
) -> None:
    with closing(sqlite3.connect(journal)) as db:
        db.execute(f"UPDATE {damage}")
        db.commit()
    code, out, err = run("steps", "a") if damage.startswith("step") else run("list")
    assert (code, out) == (1, "")
    assert err.startswith("opero: ")
    assert "hunter2" not in err


def test_a_damaged_name_of_a_table_is_an_error(run: Run, journal: Path) -> None:
    with closing(sqlite3.connect(journal)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    journal.write_bytes(
        journal.read_bytes().replace(b"TABLE workflow (", b"TABLE work\xff\xfeow (")
    )
    assert run("list")[0] == 1


def test_what_is_stored_does_not_command_the_terminal(run: Run, journal: Path) -> None:
    with closing(sqlite3.connect(journal)) as db:
        db.execute("UPDATE workflow SET name = ?", ("\x1b[31mred",))
        db.commit()
    assert "\x1b" not in run("list")[1]
