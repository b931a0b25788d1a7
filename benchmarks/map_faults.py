# this_file: benchmarks/map_faults.py
"""What a crash, a hang and a Ctrl-C cost: milliseconds, if every good item is kept and nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from benchmarks import map_work as w

if TYPE_CHECKING:
    from benchmarks.map_engines import Engine

_ROOT = Path(__file__).resolve().parents[1]
_ITEMS = range(8)
_GOOD = len(_ITEMS) - 1


def _kept(results: Sequence[Any]) -> int:
    return sum(isinstance(one, int) for one in results)


def _judged(run: Callable[[], Sequence[Any]]) -> float:
    """Return the milliseconds; a library that loses good items has no figure but says how many it keeps."""
    began = perf_counter()
    try:
        kept = _kept(run())
    except Exception as error:  # noqa: BLE001 - whatever a library raises when all is lost
        sys.exit(f"all is lost: {type(error).__name__}")
    milliseconds = (perf_counter() - began) * 1e3
    if kept != _GOOD:
        sys.exit(f"keeps {kept} of {_GOOD}")
    return milliseconds


def crash(engine: Engine) -> float:
    """One worker is killed by its item."""
    _with(engine, w.trivial, None)  # what is imported once is not what is asked for here
    return _judged(lambda: _with(engine, w.crash, None))


def timeout(engine: Engine) -> float:
    """One item never ends."""
    _with(engine, w.trivial, None)  # as above
    return _judged(lambda: _with(engine, w.hang, 1.0))


def _with(engine: Engine, function: Callable[..., Any], seconds: float | None) -> Sequence[Any]:
    return _WAYS.get(engine.name, _plainly)(engine, function, seconds)


def _plainly(engine: Engine, function: Callable[..., Any], seconds: float | None) -> Sequence[Any]:
    with engine.block() as collect:
        found: Sequence[Any] = collect(function, _ITEMS)
    return found


def _futures(engine: Engine, function: Callable[..., Any], seconds: float | None) -> Sequence[Any]:
    from concurrent.futures import ProcessPoolExecutor

    if engine.name == "loky":
        from loky import ProcessPoolExecutor
    with ProcessPoolExecutor(w.WORKERS) as pool:
        found = [pool.submit(function, item) for item in _ITEMS]
        return [one.exception() or one.result() for one in found]


def _joblib(engine: Engine, function: Callable[..., Any], seconds: float | None) -> Sequence[Any]:
    from joblib import Parallel, delayed

    found: Sequence[Any] = Parallel(n_jobs=w.WORKERS, timeout=seconds)(
        map(delayed(function), _ITEMS)
    )
    return found


def _mpire(engine: Engine, function: Callable[..., Any], seconds: float | None) -> Sequence[Any]:
    from mpire import WorkerPool

    with WorkerPool(w.WORKERS) as pool:
        found: Sequence[Any] = pool.map(function, _ITEMS, task_timeout=seconds)
    return found


def _pebble(engine: Engine, function: Callable[..., Any], seconds: float | None) -> Sequence[Any]:
    from pebble import ProcessPool

    with ProcessPool(w.WORKERS) as pool:
        found = [pool.schedule(function, args=[item], timeout=seconds) for item in _ITEMS]
        return [one.exception() or one.result() for one in found]


def _opero(engine: Engine, function: Callable[..., Any], seconds: float | None) -> Sequence[Any]:
    from opero import operomap

    mapped = operomap(
        mode="process",
        workers=w.WORKERS,
        cache=False,
        retries=0,
        on_error="return",
        timeout=seconds,
        chunksize=1,
    )(function)
    found: Sequence[Any] = mapped(_ITEMS)
    return found


_WAYS: dict[str, Callable[..., Sequence[Any]]] = {
    "opero": _opero,
    "pebble": _pebble,
    "mpire": _mpire,
    "joblib": _joblib,
    "concurrent.futures": _futures,
    "loky": _futures,
}

# --- Ctrl-C ---------------------------------------------------------------------------------------

_PROGRAM = """
import sys
from benchmarks import map_engines as e, map_work as w
(engine,) = [engine for engine in e.PROCESSES if engine.name == sys.argv[1]]
with engine.block() as collect:
    collect(w.wait_long, [sys.argv[2] + "/" + str(n) for n in range(8)])
"""


def interrupt(engine: Engine) -> float:
    """A terminal's Ctrl-C goes to all processes of the program."""
    with tempfile.TemporaryDirectory() as folder:
        program = subprocess.Popen(  # noqa: S603 - the text above
            [sys.executable, "-c", _PROGRAM, engine.name, folder],
            cwd=_ROOT,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            while len(list(Path(folder).iterdir())) < w.WORKERS:
                time.sleep(0.01)
            time.sleep(0.1)
            began = perf_counter()
            os.killpg(program.pid, signal.SIGINT)
            program.wait(20)
            milliseconds = (perf_counter() - began) * 1e3
            if _group_lives(program.pid):
                time.sleep(0.5)
            if _group_lives(program.pid):
                sys.exit("leaves processes behind")
            return milliseconds
        except subprocess.TimeoutExpired:
            sys.exit("goes on for 20 s and more")
        finally:
            try:
                os.killpg(program.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
