# this_file: benchmarks/imports.py
"""What a library costs before its first call returns: milliseconds over the bare interpreter."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from time import perf_counter

from benchmarks.harness import USERS_ENVIRONMENT, Effort, missing, significant
from benchmarks.results import Bar, Cell, RowResult, at_most

BARE = "bare interpreter"
_CALL = "\ndef f(x): return x\nf(1)"


@dataclass(frozen=True, slots=True)
class Program:
    """What a user of one library writes first.

    Attributes:
        name: As it stands in the table.
        requires: Top-level modules that must be installed.
        imports: The import line.
        decorator: The decorator line.
    """

    name: str
    requires: tuple[str, ...]
    imports: str
    decorator: str


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
)

ROWS: Mapping[str, tuple[str, Bar | None, Callable[[Program], str]]] = {
    "import": ("import alone, over the bare interpreter", None, lambda program: program.imports),
    "import-first-call": (
        "import, decorate, first sync call, over the bare interpreter",
        at_most(30),
        lambda program: f"{program.imports}\n{program.decorator}{_CALL}",
    ),
}


def measure(name: str, effort: Effort, random: Random) -> RowResult:
    """Start every program afresh in every round; the bare one's time of the round is taken off."""
    title, bar, source = ROWS[name]
    cells: dict[str, Cell] = {}
    sources = {BARE: _CALL}
    for program in PROGRAMS:
        absent = missing(program.requires)
        cells[program.name] = {"status": "not installed" if absent else "ok", "samples": []}
        if not absent:
            sources[program.name] = source(program)
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
    return {"title": title, "unit": "ms", "peer": None, "bar": bar, "candidates": cells}


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
