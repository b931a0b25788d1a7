# this_file: benchmarks/memory.py
"""Bytes that one decorated function keeps, the function itself included.

Each contender is measured in an interpreter of its own (`python -m benchmarks.memory ROW
CONTENDER`), so that caches filled by one do not flatter the next.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import candidates as c
from benchmarks.candidates import Candidate, Function
from benchmarks.harness import missing

if TYPE_CHECKING:
    from benchmarks.results import Cell, RowResult

_ROOT = Path(__file__).resolve().parents[1]
_WARM_UP = 20
_FUNCTIONS = 1000

ROWS: Mapping[str, tuple[str, tuple[Candidate, ...]]] = {
    "memory-retry": (
        "memory per decorated function, retry",
        (
            Candidate("bare function", (), c.bare),
            Candidate("opero", ("opero",), c.opero_retry),
            Candidate("nopanic retry", ("nopanic",), c.nopanic_retry),
            Candidate("pyresilience retry", ("pyresilience",), c.pyresilience_retry),
            Candidate("stamina", ("stamina",), c.stamina_retry),
            Candidate("tenacity", ("tenacity",), c.tenacity_retry),
        ),
    ),
    "memory-cache": (
        "memory per decorated function, empty cache",
        (
            Candidate("bare function", (), c.bare),
            Candidate("opero", ("opero",), c.opero_cache),
            Candidate("functools.lru_cache", (), c.functools_lru),
            Candidate("cachebox TTL", ("cachebox",), c.cachebox_ttl),
            Candidate("cachetools TTL + lock", ("cachetools",), c.cachetools_ttl),
            Candidate("nopanic cache", ("nopanic",), c.nopanic_cache),
            Candidate("pyresilience cache", ("pyresilience",), c.pyresilience_cache),
        ),
    ),
}


def measure(name: str) -> RowResult:
    """Ask a fresh interpreter per contender."""
    title, contenders = ROWS[name]
    return {
        "title": title,
        "unit": "B",
        "peer": None,
        "bar": None,
        "candidates": {contender.name: _ask(name, contender) for contender in contenders},
    }


def bytes_per_function(contender: Candidate) -> float:
    """Decorate many functions in this interpreter and divide."""
    kept = [contender.build(_function()) for _ in range(_WARM_UP)]
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    kept.extend(contender.build(_function()) for _ in range(_FUNCTIONS))
    gc.collect()
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return used / _FUNCTIONS


def _function() -> Function:
    def body(x: int) -> int:
        return x

    return body


def _ask(name: str, contender: Candidate) -> Cell:
    if missing(contender.requires):
        return {"status": "not installed", "samples": []}
    command = [sys.executable, "-m", "benchmarks.memory", name, contender.name]
    done = subprocess.run(  # noqa: S603 - this very module
        command, cwd=_ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"status": f"failed: {done.stderr.strip().splitlines()[-1]}", "samples": []}
    return {"status": "ok", "samples": [round(float(done.stdout))]}


def _main(name: str, contender: str) -> None:
    by_name = {candidate.name: candidate for candidate in ROWS[name][1]}
    print(bytes_per_function(by_name[contender]))


if __name__ == "__main__":
    _main(*sys.argv[1:])
