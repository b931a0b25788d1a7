# this_file: tests/durable/test_blocked.py
"""A record that cannot be rebuilt blocks its run: the workflow never sees it, and the journal stays as it is."""

from __future__ import annotations

import dataclasses
import sqlite3
import sys
import types
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from opero import operomap
from opero.durable import Orchestrator, activity, wait_for, workflow
from opero.durable.values import decode, encode
from opero.errors import OperoWarning, UnserializableError

pytestmark = pytest.mark.internal

HERE = sys.modules[__name__]


@dataclasses.dataclass
class Receipt:
    id: str


class RefusedError(Exception):
    pass


@activity
def charge() -> Receipt:
    return Receipt("r1")


@activity
def refuse() -> None:
    raise RefusedError("no")


@operomap(cache=False, progress=False)
def receipts(item: str) -> Receipt:
    return Receipt(item)


def compensating(step: Callable[[], object]) -> Callable[..., str]:
    def program(order: object = None) -> str:
        try:
            step()
        except RefusedError:
            pass
        except Exception:  # noqa: BLE001 - a compensation, which must not run
            return "refunded"
        wait_for("go")
        return "shipped"

    return program


PROGRAMS: dict[str, tuple[Callable[..., Any], str, tuple[Any, ...]]] = {
    "result": (compensating(charge), "Receipt", ()),
    "error": (compensating(refuse), "RefusedError", ()),
    "argument": (compensating(lambda: None), "Receipt", (Receipt("r0"),)),
    "signal": (compensating(lambda: wait_for("first")), "Receipt", ()),
    "item": (compensating(lambda: receipts(["a", "b"])), "Receipt", ()),
}


def steps_in(journal: Path) -> list[Any]:
    with closing(sqlite3.connect(journal)) as db:
        return db.execute("SELECT * FROM step ORDER BY path").fetchall()


@pytest.mark.parametrize("kind", PROGRAMS)
def test_class_that_is_gone_blocks_the_run_until_it_is_back(
    journal: Path, monkeypatch: pytest.MonkeyPatch, kind: str, until: Callable[..., None]
) -> None:
    program, name, args = PROGRAMS[kind]
    workflow(f"order {kind}")(program)
    with Orchestrator(journal) as one:
        run = one.invoke_workflow(f"order {kind}", *args)
        if kind == "signal":
            one.signal(run, "first", Receipt("r2"))
        until(lambda: one.state(run) == "waiting" and one.steps(run)[-1]["name"] == "wait for go")
    before = steps_in(journal)
    with monkeypatch.context() as patch, Orchestrator(journal) as two:
        patch.delattr(HERE, name)
        two.signal(run, "go")
        status = two.wait(run, timeout=60)
        assert two.state(run) == "blocked"
        assert name in status["error_message"]
        assert ("arguments of" if kind == "argument" else "step 1") in status["error_message"]
    assert steps_in(journal) == before
    with Orchestrator(journal) as three:
        assert three.result(run, timeout=60) == "shipped"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ('value = \'{"$": "data", "t"\'', "step 1, charge"),
        ("state = 'lost'", "its state"),
        ("attempts = 'many'", "its attempts"),
    ],
)
def test_damaged_row_blocks_the_run(
    journal: Path, until: Callable[..., None], damage: str, reason: str
) -> None:
    workflow("order")(compensating(charge))
    with Orchestrator(journal) as one:
        run = one.invoke_workflow("order")
        until(lambda: one.state(run) == "waiting")
    with closing(sqlite3.connect(journal)) as db:
        db.execute(f"UPDATE step SET {damage} WHERE path = '1'")
        db.commit()
    with Orchestrator(journal) as two:
        two.signal(run, "go")
        until(lambda: two.state(run) == "blocked")
    with closing(sqlite3.connect(journal)) as db:
        assert reason in db.execute("SELECT error FROM workflow").fetchone()[0]


# --- classes that have changed ------------------------------------------------------------------------------------


def as_written(cls: type, *values: Any) -> str:
    return encode(cls(*values))


def test_field_with_a_default_may_be_added_to_a_dataclass(monkeypatch: pytest.MonkeyPatch) -> None:
    text = as_written(Receipt, "r1")
    more = dataclasses.make_dataclass(
        "Receipt",
        ["id", ("cents", int, 0), ("notes", list, dataclasses.field(default_factory=list))],
        namespace={"__module__": __name__},
    )
    monkeypatch.setattr(HERE, "Receipt", more)
    assert decode(text) == more("r1", 0, [])


@pytest.mark.parametrize(
    ("fields", "reported"), [(["id", "cents"], "new field 'cents'"), (["cents"], "no field 'id'")]
)
def test_other_changes_of_a_dataclass_are_named(
    monkeypatch: pytest.MonkeyPatch, fields: list[str], reported: str
) -> None:
    text = as_written(Receipt, "r1")
    monkeypatch.setattr(
        HERE,
        "Receipt",
        dataclasses.make_dataclass("Receipt", fields, namespace={"__module__": __name__}),
    )
    with pytest.raises(UnserializableError, match=reported):
        decode(text)


def test_reading_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planted.py").write_text("raise SystemExit('executed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnserializableError, match="import the module 'planted'"):
        decode('{"$": "data", "t": "planted:Result", "v": {}}')
    lazy: Any = types.ModuleType("lazy_planted")
    lazy.__getattr__ = lambda name: __import__("planted")
    monkeypatch.setitem(sys.modules, "lazy_planted", lazy)
    with pytest.raises(UnserializableError, match="is gone"):
        decode('{"$": "enum", "t": "lazy_planted:Result", "v": "x"}')
    assert "planted" not in sys.modules


# --- programs that have changed -----------------------------------------------------------------------------------


def test_recorded_steps_that_are_not_asked_for_are_reported(
    journal: Path, until: Callable[..., None]
) -> None:
    steps = 3

    @activity
    def part(n: int) -> int:
        return n

    @workflow
    def program() -> list[int]:
        found = [part(n) for n in range(steps)]
        if steps == 3:
            wait_for("go")
        return found

    with Orchestrator(journal) as one:
        run = one.invoke_workflow("program")
        until(lambda: one.state(run) == "waiting")
        steps = 1
        with pytest.warns(OperoWarning, match=r"for 2 recorded steps: 2 \(part\), 3 \(part\)"):  # noqa: PT031 - what happens in the engine
            one.signal(run, "go")
            assert one.result(run, timeout=60) == [0]
            until(lambda: not one._engine._runs)  # type: ignore[union-attr]
