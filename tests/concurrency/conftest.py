# this_file: tests/concurrency/conftest.py
"""A scheduler of a few lines for engines of processes, and the ways in which these begin."""

from __future__ import annotations

import gc
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from opero.concurrency.executors.base import Chunk, Done, MapJob, Report
from opero.concurrency.executors.process.worker_pool import ProcessEngine
from opero.core.function import FunctionInfo
from opero.core.options import Options
from opero.core.pipeline import Pipeline

if TYPE_CHECKING:
    from opero.concurrency.executors.process.start import StartMethod

OF_THE_JOB = frozenset(MapJob._fields)


@dataclass
class Ran:
    """What became of the items of a small map: values, `ItemOutcome`s, or the `Lost` that named them."""

    items: list[Any] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)

    def errors(self) -> list[BaseException | None]:
        return [getattr(one, "error", None) for one in self.items]


def drive(
    engine: ProcessEngine, items: Iterable[Any], chunk: int, seen: Callable[[], object]
) -> Ran:
    """Run items through an open engine."""
    waiting = list(enumerate(items))
    ran = Ran([None] * len(waiting))
    flying: dict[int, tuple[list[tuple[int, Any]], set[int]]] = {}
    number = 0
    while waiting or flying:
        while waiting and len(flying) < engine.slots:
            part, waiting = waiting[:chunk], waiting[chunk:]
            number += 1
            flying[number] = part, set(range(len(part)))
            engine.submit(Chunk(number, [i for i, _ in part], [item for _, item in part]))
        reports = engine.poll(60)
        assert reports, "nothing was reported for 60 s"
        seen()
        for report in reports:
            ran.reports.append(report)
            part, open_places = flying[report.chunk]
            assert open_places >= set(report.places)
            open_places -= set(report.places)
            if isinstance(report, Done):
                for n, place in enumerate(report.places):
                    assert ran.items[part[place][0]] is None
                    ran.items[part[place][0]] = report.odd.get(n, report.values[n])
            else:
                left = list(report.places)
                if report.why not in ("stopped", "slow"):
                    at = left[0] if report.culprit is None else report.culprit
                    ran.items[part[at][0]] = report
                    left.remove(at)
                waiting = [part[n] for n in left] + waiting
            if not open_places:
                del flying[report.chunk]
    return ran


class Maps:
    """Runs maps on processes that begin in one way."""

    def __init__(self, method: StartMethod) -> None:
        self.method: StartMethod = method
        self._engines: list[ProcessEngine] = []

    def __reduce__(self) -> tuple[type[Maps], tuple[StartMethod]]:
        # A function that maps takes it along to its worker.
        return Maps, (self.method,)

    def engine(self, workers: int) -> ProcessEngine:
        """Make an engine."""
        engine = ProcessEngine(workers, method=self.method)
        self._engines.append(engine)
        return engine

    @staticmethod
    def job_of(fn: Callable[..., Any], **given: Any) -> MapJob:
        """Make a job: retries off, if nothing else is said."""
        of_job = {name: given.pop(name) for name in list(given) if name in OF_THE_JOB}
        options = Options.of("test", **{"cache": False, "retries": 0, **given})
        pipeline = Pipeline(FunctionInfo(fn), options)
        return MapJob(**{"function": fn, "pipeline": pipeline, **of_job})

    @staticmethod
    def children(pid: int | str = "self") -> list[int]:
        """Return the processes that a process has begun, zombies included."""
        found = []
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        except FileNotFoundError:
            pass
        return found

    def workers(self) -> list[int]:
        """Return the worker processes of the engines that are open."""
        handles = [handle for engine in self._engines for handle in list(vars(engine)["_workers"])]
        return [handle.pid for handle in handles if handle.pid]

    def servers(self) -> list[int]:
        """Return the fork servers of these workers."""
        found = {self.parent(pid) for pid in self.workers()}
        return [pid for pid in found if pid > 1 and pid != os.getpid()]

    @staticmethod
    def parent(pid: int) -> int:
        """Return the parent of a process, 0 if it has ended."""
        try:
            return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            return 0

    @staticmethod
    def alive(pid: int) -> bool:
        """Tell whether a process runs; a zombie does not."""
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    @staticmethod
    def until(reached: Callable[[], object], seconds: float = 100) -> bool:
        """Wait for something that other processes do."""
        end = time.monotonic() + seconds
        while not reached():
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        return True

    def __call__(
        self,
        fn: Callable[..., Any],
        items: Iterable[Any],
        *,
        workers: int = 2,
        chunk: int = 1,
        seen: Callable[[], object] = lambda: None,
        **given: Any,
    ) -> Ran:
        """Run a map."""
        engine = self.engine(workers)
        try:
            engine.open(self.job_of(fn, **given))
            return drive(engine, items, chunk, seen)
        finally:
            engine.close(graceful=True, timeout=5)


@pytest.fixture
def maps(request: pytest.FixtureRequest) -> Iterator[Maps]:
    """Maps on forked processes, or on those that the test asks for; nothing may stay behind."""
    method = getattr(request, "param", "fork")
    with warnings.catch_warnings():
        # Other tests leave idle threads in this process.
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        Maps(method)(abs, [1])  # what is imported once may stay
        before = left_behind()
        yield Maps(method)
        assert not left_behind() - before


def left_behind() -> Counter[str]:
    """Return what a map might forget to clean up: open files, children, files in shared memory."""
    gc.collect()
    if sys.platform != "linux":
        return Counter()
    fds = [str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    # The file of a limiter goes with the limiter, and a test may hold that still.
    kinds = [re.sub(r"\d+", "", fd) for fd in fds if "/opero-" not in fd or "/state" not in fd]
    # Only files with such names: other programs of this machine come and go there.
    shared = [
        str(file) for name in ("opero*", "psm_*", "pym-*") for file in Path("/dev/shm").glob(name)
    ]
    return Counter([*kinds, *map(str, Maps.children()), *shared])
