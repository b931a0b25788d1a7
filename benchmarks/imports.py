# this_file: benchmarks/imports.py
"""What a library costs before its first call or map returns: milliseconds over the bare interpreter."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from time import perf_counter

from benchmarks.harness import USERS_ENVIRONMENT, Effort, missing, significant
from benchmarks.map_work import WORKERS
from benchmarks.results import Bar, Cell, RowResult, at_most_times

BARE = "bare interpreter"
_FUNCTION = "\ndef f(x): return x\n"
_CALL = f"{_FUNCTION}f(1)"
_IN_A_NEW_FOLDER = "import tempfile\nnew = tempfile.TemporaryDirectory()"
_DISK = ("import-first-disk-call",)
_MAP = ("import-first-map",)


@dataclass(frozen=True, slots=True)
class Program:
    """What a user of one library writes first.

    Attributes:
        name: As it stands in the table.
        requires: Top-level modules that must be installed.
        imports: The import line.
        decorator: The decorator line, if there is one.
        rows: The rows that it takes part in.
        call: Calls the function, or maps it.
    """

    name: str
    requires: tuple[str, ...]
    imports: str
    decorator: str = ""
    rows: tuple[str, ...] = ("import", "import-first-call")
    call: str = "f(1)"


PROGRAMS = (
    Program("opero", ("opero",), "from opero import opero", "@opero"),
    Program("nopanic", ("nopanic",), "import nopanic", "@nopanic.retry()"),
    Program("tenacity", ("tenacity",), "import tenacity", "@tenacity.retry"),
    Program("stamina", ("stamina",), "import stamina", "@stamina.retry(on=Exception)"),
    Program(
        "pyresilience",
        ("pyresilience",),
        "from pyresilience import RetryConfig, resilient",
        "@resilient(retry=RetryConfig())",
    ),
    Program(
        "cachebox",
        ("cachebox",),
        "import cachebox",
        "@cachebox.cached(cachebox.TTLCache(10000, 3600))",
    ),
    Program(
        "cachetools + tenacity",
        ("cachetools", "tenacity"),
        "import cachetools, tenacity",
        "@cachetools.cached(cachetools.TTLCache(10000, 3600))\n@tenacity.retry",
    ),
    Program(
        "opero",
        ("opero",),
        "from opero import opero",
        "@opero(cache_backend='disk:' + new.name)",
        _DISK,
    ),
    Program(
        "diskcache",
        ("diskcache",),
        "import diskcache",
        "@diskcache.Cache(new.name).memoize()",
        _DISK,
    ),
    Program(
        "opero",
        ("opero",),
        "from opero import operomap",
        f"@operomap(mode='process', workers={WORKERS}, cache=False)",
        _MAP,
        "f([1])",
    ),
    Program(
        "multiprocessing",
        (),
        "import multiprocessing",
        rows=_MAP,
        call=f"with multiprocessing.Pool({WORKERS}) as pool: pool.map(f, [1])",
    ),
    Program(
        "concurrent.futures",
        (),
        "from concurrent.futures import ProcessPoolExecutor",
        rows=_MAP,
        call=f"with ProcessPoolExecutor({WORKERS}) as pool: list(pool.map(f, [1]))",
    ),
    Program(
        "loky",
        ("loky",),
        "import loky",
        rows=_MAP,
        call=f"with loky.ProcessPoolExecutor({WORKERS}) as pool: list(pool.map(f, [1]))",
    ),
    Program(
        "joblib",
        ("joblib",),
        "from joblib import Parallel, delayed",
        rows=_MAP,
        call=f"with Parallel(n_jobs={WORKERS}) as parallel: parallel([delayed(f)(1)])",
    ),
    Program(
        "mpire",
        ("mpire",),
        "from mpire import WorkerPool",
        rows=_MAP,
        call=f"with WorkerPool({WORKERS}) as pool: pool.map(f, [1])",
    ),
    Program(
        "pebble",
        ("pebble",),
        "from pebble import ProcessPool",
        rows=_MAP,
        call=f"with ProcessPool({WORKERS}) as pool: list(pool.map(f, [1]).result())",
    ),
    Program(
        "twat-mp",
        ("twat_mp",),
        "from twat_mp import ProcessPool",
        rows=_MAP,
        call=f"with ProcessPool(nodes={WORKERS}) as pool: list(pool.map(f, [1]))",
    ),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the page.

    Attributes:
        title: In words.
        source: Makes the program's source.
        peer: The library of the comparison.
        bar: What opero is held to.
        note: Why another one may be quicker.
    """

    title: str
    source: Callable[[Program], str]
    peer: str | None = None
    bar: Bar | None = None
    note: str = ""


def _first_call(program: Program) -> str:
    return f"{program.imports}\n{program.decorator}{_FUNCTION}{program.call}"


ROWS: Mapping[str, Row] = {
    "import": Row("import alone, over the bare interpreter", lambda program: program.imports),
    "import-first-call": Row(
        "import, decorate, first sync call, over the bare interpreter",
        _first_call,
        peer="nopanic",
        bar=at_most_times(0.6),
    ),
    "import-first-disk-call": Row(
        "the same with a cache on disk in a new folder",
        lambda program: f"{_IN_A_NEW_FOLDER}\n{_first_call(program)}",
        peer="diskcache",
        bar=at_most_times(2),
    ),
    "import-first-map": Row(
        "import, process map of one item, end of the program, over the bare interpreter",
        _first_call,
        peer="multiprocessing",
        bar=at_most_times(2.5),
        note="opero and twat-mp are imported, and a server process begun from which workers are forked",
    ),
}


def measure(name: str, effort: Effort, random: Random) -> RowResult:
    """Start every program afresh in every round; the bare one's time of the round is taken off."""
    row = ROWS[name]
    cells: dict[str, Cell] = {}
    sources = {BARE: f"{_IN_A_NEW_FOLDER}{_CALL}" if name in _DISK else _CALL}
    for program in PROGRAMS:
        if name not in program.rows:
            continue
        absent = missing(program.requires)
        cells[program.name] = {"status": "not installed" if absent else "ok", "samples": []}
        if not absent:
            sources[program.name] = row.source(program)
    for contender, text in list(sources.items()):
        # The first start also writes the bytecode; an error is shown in its own cell.
        failure = _first_run(text)
        if failure:
            cells[contender]["status"] = f"failed: {failure}"
            del sources[contender]
    order = list(sources)
    for _ in range(effort.process_rounds):
        random.shuffle(order)
        seconds = {contender: _start(sources[contender]) for contender in order}
        for contender in order:
            if contender != BARE:
                over = (seconds[contender] - seconds[BARE]) * 1e3
                cells[contender]["samples"].append(significant(over))
    return {
        "title": row.title,
        "unit": "ms",
        "peer": row.peer,
        "bar": row.bar,
        "candidates": cells,
        "note": row.note,
    }


def _start(source: str) -> float:
    start = perf_counter()
    # With descriptors left open the child is spawned by vfork, which copies nothing of this one.
    subprocess.run(  # noqa: S603 - our own programs
        [sys.executable, "-c", source], check=True, close_fds=False, env=USERS_ENVIRONMENT
    )
    return perf_counter() - start


def _first_run(source: str) -> str:
    done = subprocess.run(  # noqa: S603 - our own programs
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        check=False,
        env=USERS_ENVIRONMENT,
    )
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""
