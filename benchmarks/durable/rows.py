# this_file: benchmarks/durable/rows.py
"""What is measured of durable workflows, and how: contenders take turns, each in its own process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from benchmarks.harness import Effort, missing, significant
from benchmarks.results import Bar, Cell, RowResult, at_most, at_most_times

_ROOT = Path(__file__).resolve().parents[2]
OPERO, DBOS, PY_ORCHESTRATE = "opero", "DBOS", "py-orchestrate"
_MODULES = {
    OPERO: "opero_workflows",
    DBOS: "dbos_workflows",
    PY_ORCHESTRATE: "py_orchestrate_workflows",
}
_REQUIRES = {OPERO: "opero", DBOS: "dbos", PY_ORCHESTRATE: "py_orchestrate"}


@dataclass(frozen=True, slots=True)
class Row:
    """One way to use an engine.

    Attributes:
        title: As it stands in the report.
        job: Method of the engines.
        contenders: Those that support it.
        peer: The contender that opero is compared with in the summary.
        bar: What opero is held to.
        counts: Steps (or workflows) of one turn, and of one in a quick run.
        unit: "µs" for each of them, "ms" for the whole turn.
    """

    title: str
    job: str
    contenders: Sequence[str]
    peer: str | None
    bar: Bar
    counts: tuple[int, int]
    unit: Literal["µs", "ms"] = "µs"


_ALL = (OPERO, DBOS, PY_ORCHESTRATE)
_ASYNC = (OPERO, DBOS)

ROWS: dict[str, Row] = {
    "durable-workflows": Row(
        "workflows of one step, one after another", "sequential", _ALL, DBOS, at_most_times(0.2), (50, 10)
    ),
    "durable-sync-steps": Row(
        "steps of one synchronous workflow", "sync_steps", _ALL, DBOS, at_most_times(0.2), (200, 20)
    ),
    "durable-sync-steps-2": Row(
        "the same, by py-orchestrate's bar", "sync_steps", (OPERO, PY_ORCHESTRATE), PY_ORCHESTRATE,
        at_most_times(0.2), (200, 20),
    ),
    "durable-async-steps": Row(
        "steps of one coroutine, one after another", "async_steps", _ASYNC, DBOS, at_most_times(0.2), (200, 20)
    ),
    "durable-gather": Row(
        "steps of one coroutine, gathered", "gather", _ASYNC, DBOS, at_most_times(0.2), (200, 40)
    ),
    "durable-concurrent": Row(
        "steps of many workflows at once, twenty each", "concurrent", _ALL, DBOS, at_most_times(0.2), (400, 60)
    ),
    "durable-replay": Row(
        "replay of 5,000 steps of a synchronous workflow", "replay", _ASYNC, None, at_most(60), (5000, 500), "ms"
    ),
    "durable-replay-async": Row(
        "replay of 5,000 steps of a coroutine", "replay_async", (OPERO,), None, at_most(60), (5000, 500), "ms"
    ),
    "durable-replay-gather": Row(
        "replay of 5,000 gathered steps", "replay_gather", (OPERO,), None, at_most(60), (5000, 500), "ms"
    ),
}  # fmt: skip


def measure(name: str, effort: Effort, random: Random) -> RowResult:
    """Let the contenders of a row take turns, in shuffled order, as often as the effort says."""
    row = ROWS[name]
    quick = effort.process_rounds < Effort().process_rounds
    count = row.counts[quick]
    cells: dict[str, Cell] = {}
    with _started(row.contenders, cells) as children:
        # The first turn opens connections and warms caches.
        order = [
            contender
            for contender, child in children.items()
            if _turn(child, row, count, cells[contender]) is not None
        ]
        for _ in range(effort.process_rounds):
            random.shuffle(order)
            for contender in order:
                seconds = _turn(children[contender], row, count, cells[contender])
                if seconds is not None:
                    each = seconds * 1e6 / count if row.unit == "µs" else seconds * 1e3
                    cells[contender]["samples"].append(significant(each))
    return {
        "title": f"durable: {row.title}",
        "unit": row.unit,
        "peer": row.peer,
        "bar": row.bar,
        "candidates": cells,
    }


@contextmanager
def _started(
    contenders: Sequence[str], cells: dict[str, Cell]
) -> Iterator[dict[str, subprocess.Popen[str]]]:
    children: dict[str, subprocess.Popen[str]] = {}
    try:
        for name in contenders:
            absent = missing((_REQUIRES[name],))
            cells[name] = {"status": "not installed" if absent else "ok", "samples": []}
            if absent:
                continue
            child = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-m", "benchmarks.durable.child", _MODULES[name]],
                cwd=_ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            children[name] = child
            assert child.stdout is not None
            if child.stdout.readline() != "ready\n":
                cells[name]["status"] = "does not start"
                del children[name]
                _end(child)
        yield children
    finally:
        for child in children.values():
            _end(child)


def _turn(child: subprocess.Popen[str], row: Row, count: int, cell: Cell) -> float | None:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(f"{row.job} {count}\n")
    child.stdin.flush()
    answer = child.stdout.readline().strip()
    try:
        return float(answer)
    except ValueError:
        cell["status"] = answer or "failed: it has died"
        return None


def _end(child: subprocess.Popen[str]) -> None:
    try:
        child.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
