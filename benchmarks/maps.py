# this_file: benchmarks/maps.py
"""Maps beside those of other libraries: each turn of each contender in an interpreter of its own.

`python -m benchmarks.maps ROW CONTENDER` is one turn; it prints its figure.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from benchmarks import map_engines as e
from benchmarks import map_faults, map_limits
from benchmarks import map_streams as s
from benchmarks import map_turns as t
from benchmarks import map_work as w
from benchmarks.harness import USERS_ENVIRONMENT, Effort, missing, significant
from benchmarks.results import Bar, Cell, RowResult, Unit, at_most, at_most_times

_ROOT = Path(__file__).resolve().parents[1]
_PATIENCE = 60
"""Seconds after which a turn counts as hung."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the page.

    Attributes:
        title: In words.
        engines: The contenders.
        turn: What is measured.
        unit: Of its figure.
        peer: The candidate of the comparison.
        bar: What opero is held to.
        note: Why another contender may be quicker.
    """

    title: str
    engines: Sequence[e.Engine]
    turn: t.Turn
    unit: Unit = "ms"
    peer: str | None = None
    bar: Bar | None = None
    note: str = ""


# --- rows -----------------------------------------------------------------------------------------


def _only(engines: Sequence[e.Engine], *names: str) -> tuple[e.Engine, ...]:
    return tuple(engine for engine in engines if engine.name in ("opero", *names))


def _tiny() -> Sequence[int]:
    return range(20_000)


_tiny_turn = t.once(w.trivial, _tiny)
_CHUNKED = tuple(engine for engine in e.PROCESSES if engine.name != "streamable")

ROWS: Mapping[str, Row] = {
    "map-tiny": Row(
        "process map, 20,000 trivial items, the peers' pool there already",
        e.PROCESSES,
        _tiny_turn,
        peer="joblib",
        bar=at_most_times(0.4),
        note=(
            "it starts and ends its processes with each map (some 10 ms), so that no stale function "
            "can run and nothing is left between maps; it reports each item by itself"
        ),
    ),
    "map-tiny-mpire": Row(
        "process map, 20,000 trivial items, beside mpire",
        _only(e.PROCESSES, "mpire"),
        _tiny_turn,
        peer="mpire",
        bar=at_most_times(0.25),
    ),
    "map-tiny-pool": Row(
        "process map, 20,000 trivial items, beside multiprocessing (static shares, no outcomes)",
        _only(e.PROCESSES, "multiprocessing"),
        _tiny_turn,
        peer="multiprocessing",
        bar=at_most_times(3.5),
        note=(
            "it starts and ends its processes with each map (some 10 ms), so that no stale function "
            "can run and nothing is left between maps; multiprocessing cuts the list into 8 static "
            "parts and knows nothing of single items"
        ),
    ),
    "map-tiny-whole": Row(
        "process map, 20,000 trivial items, each with a new pool",
        _CHUNKED,
        t.whole(w.trivial, _tiny),
        note=(
            "a server process between the program and its workers makes kills safe, and is one more to "
            "start; items are reported one by one"
        ),
    ),
    "map-cpu": Row(
        "process map, 200 × 20 ms of computing",
        e.PROCESSES,
        t.once(w.compute, lambda: range(200)),
        peer="concurrent.futures",
        bar=at_most_times(1.03),
        note="the start of the processes is part of the map",
    ),
    "map-arrays": Row(
        "process map, 200 arrays of 1 MB in and out",
        e.PROCESSES,
        t.once(w.double, lambda: w.arrays(200)),
        peer="loky",
        bar=at_most_times(0.6),
        note="the start of the processes is part of the map",
    ),
    "map-skew": Row(
        "process map, 1,992 × 0.2 ms, then 8 × 250 ms, in percent of the ideal",
        _CHUNKED,
        t.skew,
        unit="%",
        bar=at_most(110),
        note=(
            "what is dispatched one by one has no tail, and costs many times as much for tiny items"
        ),
    ),
    "map-second": Row(
        "process map of one item, second in its program, beside a new pool",
        _only(e.PROCESSES, "multiprocessing"),
        t.whole(w.trivial, lambda: range(1)),
        peer="multiprocessing",
        bar=at_most_times(1.2),
    ),
    "map-threads": Row(
        "thread map, 200 × 20 ms of sleep, 16 threads",
        e.THREAD_ENGINES,
        t.once(w.nap, lambda: range(200)),
        peer="concurrent.futures",
        bar=at_most_times(1.03),
        note="threads are started with each map",
    ),
    "map-async": Row(
        "async map, 2,000 × 10 ms of sleep, 200 at once",
        e.LOOPS,
        t.once(w.nap_async, lambda: range(2_000)),
        peer="tasklane",
        bar=at_most_times(1.03),
        note="each item is a chunk with a report of its own, which a retry or a stop could ask for",
    ),
    "map-async-pyarallel": Row(
        "async map, 2,000 × 10 ms of sleep, beside pyarallel",
        _only(e.LOOPS, "pyarallel"),
        t.once(w.nap_async, lambda: range(2_000)),
        peer="pyarallel",
        bar=at_most_times(1.05),
    ),
    "map-async-tiny": Row(
        "async map, 20,000 trivial coroutines, 200 at once",
        e.LOOPS,
        t.once(w.trivial_async, _tiny),
        peer="tasklane",
        bar=at_most_times(1.0),
        note="outcomes, order and retries are kept per item",
    ),
    "map-stream": Row(
        "stream over a generator of 1,000,000 ints, processes",
        s.STREAMS,
        t.stream,
        peer="multiprocessing",
        bar=at_most_times(1.2),
        note=(
            "chunks are measured and small results sent every 2 ms, so that a crash loses little; the "
            "others were given chunks of 1,000 by hand"
        ),
    ),
    "map-stream-memory": Row(
        "the same: memory by which the program grows",
        s.STREAMS,
        t.growth,
        unit="MB",
        bar=at_most(10),
        note="the window that is in flight",
    ),
    "map-stream-ahead": Row(
        "items read ahead of a slow consumer that has taken 50",
        s.ONE_BY_ONE,
        t.ahead,
        unit="items",
        bar=at_most(2_000),
        note="a thousand items, and what the consumer takes in a second",
    ),
    "map-crash": Row(
        "one crash among 8 items",
        _only(e.PROCESSES, "pebble", "concurrent.futures", "loky", "joblib", "mpire"),
        map_faults.crash,
        bar=at_most(150),
        note="a new process is begun, and the processes of the map are ended with it",
    ),
    "map-timeout": Row(
        "one of 8 items hangs, timeout of 1 s",
        _only(e.PROCESSES, "pebble", "joblib", "mpire"),
        map_faults.timeout,
        bar=at_most(1_100),
        note="as for the crash",
    ),
    "map-interrupt": Row(
        "Ctrl-C to the end of the program, with nothing left behind",
        _CHUNKED,
        map_faults.interrupt,
        bar=at_most(150),
        note="the map ends its workers itself and waits until they are gone",
    ),
    "map-rate": Row(
        "50/s over 4 worker processes, off by",
        e.PROCESSES[:1],
        map_limits.rate,
        unit="%",
        bar=at_most(1.0),
    ),
    "map-rate-cost": Row(
        "taking a slot that 4 processes share, uncontended",
        e.PROCESSES[:1],
        map_limits.cost,
        unit="ns",
        bar=at_most(3_000),
    ),
}


def measure(name: str, effort: Effort, random: Random) -> RowResult:
    """Let every contender have its turn in every round, in shuffled order."""
    row = ROWS[name]
    cells: dict[str, Cell] = {}
    for engine in row.engines:
        absent = missing(engine.requires)
        cells[engine.name] = {"status": "not installed" if absent else "ok", "samples": []}
    order = [name for name, cell in cells.items() if cell["status"] == "ok"]
    for _ in range(effort.map_rounds):
        random.shuffle(order)
        for contender in list(order):
            failed = _turn(name, contender, cells[contender])
            if failed:
                cells[contender]["status"] = failed
                order.remove(contender)
    return {
        "title": row.title,
        "unit": row.unit,
        "peer": row.peer,
        "bar": row.bar,
        "candidates": cells,
        "note": row.note,
    }


def _turn(name: str, contender: str, cell: Cell) -> str:
    """Run one turn; return what went wrong."""
    command = [sys.executable, "-m", "benchmarks.maps", name, contender]
    try:
        done = subprocess.run(  # noqa: S603 - this very module
            command,
            cwd=_ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=_PATIENCE,
            env=USERS_ENVIRONMENT,
        )
    except subprocess.TimeoutExpired:
        return "hangs"
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines()
        return said[-1][:80] if said else f"exit code {done.returncode}"
    cell["samples"].append(significant(json.loads(lines[-1])))
    return ""


def _main(name: str, contender: str) -> None:
    row = ROWS[name]
    (engine,) = [engine for engine in row.engines if engine.name == contender]
    print(json.dumps(row.turn(engine)), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
