# this_file: src/opero/concurrency/executors/local.py
"""Share a chunk's items among the workers of this process, and report what is done while a slow item runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any, Final

from opero.concurrency.executors.base import Done

if TYPE_CHECKING:
    from opero.concurrency.executors.base import Chunk, ItemOutcome, Report

__all__ = ["LocalChunk", "LocalChunks", "PartialResults", "SingleResult"]

_LOOK: Final = 0.03
"""Seconds after which finished items of a chunk that is under way are reported."""
_ONLY: Final = range(1)


class LocalChunk:
    """A chunk whose items are taken one at a time, by one worker or by several.

    Positions are taken from a deque, whose steps are atomic: no item is run twice, and none pays for a lock. A worker
    without work helps with the chunk of another one, so that a slow item never keeps its neighbours from a free worker.

    Args:
        chunk: The chunk.

    Attributes:
        chunk: As above.
        todo: Positions that no worker has taken.
        unreported: How many items are still to be reported.
    """

    __slots__ = ("chunk", "todo", "unreported")

    def __init__(self, chunk: Chunk) -> None:
        self.chunk: Final = chunk
        self.unreported: int = len(chunk.items)
        self.todo: Final = deque(range(self.unreported))

    def positions(self) -> Iterator[int]:
        """Take one position after the other, until none is left."""
        take = self.todo.popleft
        try:
            while True:
                yield take()
        except IndexError:
            # Asking first would not do: another worker may take the last one in between.
            return


class PartialResults:
    """What one worker has done of a chunk and not reported yet.

    Args:
        local: The chunk.
        worker: Name of the worker.
        owner: Reports it.
    """

    __slots__ = ("_due", "_odd", "_owner", "_places", "_since", "_values", "local", "worker")

    def __init__(self, local: LocalChunk, worker: str, owner: LocalChunks) -> None:
        self.local: Final = local
        self.worker: Final = worker
        self._owner = owner
        self._places: list[int] = []
        self._values: list[Any] = []
        self._odd: dict[int, ItemOutcome] = {}
        self._since = perf_counter()
        self._due = self._since + owner.flush_s

    def add(self, position: int, value: Any, outcome: ItemOutcome | None) -> None:
        """Add a finished item, and report what is done when it is time for that.

        Args:
            position: Its position.
            value: The plain result; None where there is an outcome.
            outcome: What became of the item if that is more than a plain result.
        """
        if outcome is not None:
            self._odd[position] = outcome
            value = None
        self._places.append(position)
        # Last, because an item whose value is here counts as done for the thread that reports.
        self._values.append(value)
        if perf_counter() >= self._due:
            self._owner.report(self)

    def drain(self) -> Done | None:
        """Return what is not reported yet, None if that is nothing."""
        count = len(self._values)
        if not count:
            return None
        now = perf_counter()
        busy, self._since = now - self._since, now
        self._due = now + self._owner.flush_s
        places: Sequence[int] = self._places[:count]
        values = self._values[:count]
        del self._places[:count], self._values[:count]
        odd: dict[int, ItemOutcome] = {}
        if self._odd:
            odd = {n: self._odd.pop(place) for n, place in enumerate(places) if place in self._odd}
        first, last = places[0], places[-1]
        if last - first + 1 == count:
            places = range(first, last + 1)
        return Done(self.local.chunk.id, places, values, odd, busy, self.worker)


class SingleResult:
    """The result of a chunk of one item, which has no neighbours: it is reported at once.

    Args:
        number: Id of the chunk.
        worker: Name of the worker.
        report: Called with the report.
    """

    __slots__ = ("_began", "_number", "_report", "_worker")

    def __init__(self, number: int, worker: str, report: Callable[[Report], object]) -> None:
        self._number = number
        self._worker = worker
        self._report = report
        self._began = perf_counter()

    def add(self, position: int, value: Any, outcome: ItemOutcome | None) -> None:
        """Report the item; arguments as for several."""
        values, odd = ([value], {}) if outcome is None else ([None], {position: outcome})
        busy = perf_counter() - self._began
        self._report(Done(self._number, _ONLY, values, odd, busy, self._worker))


class LocalChunks:
    """The chunks of several items that workers of this process have under way.

    Args:
        report: Called with each report, from any worker.

    Attributes:
        flush_s: Seconds after which a worker reports what it has done.
    """

    def __init__(self, report: Callable[[Report], object]) -> None:
        self.flush_s: float = 0.0
        self._report = report
        self._lock = Lock()
        self._open: dict[int, LocalChunk] = {}
        self._partial: dict[str, PartialResults] = {}
        self._due = 0.0

    def add(self, chunk: Chunk) -> LocalChunk:
        """Return a chunk for workers to take."""
        local = LocalChunk(chunk)
        if local.unreported > 1:
            self._open[chunk.id] = local
        return local

    def begin(self, local: LocalChunk, worker: str) -> PartialResults | SingleResult:
        """Return the place for what a worker does of a chunk."""
        if len(local.chunk.items) == 1:
            return SingleResult(local.chunk.id, worker, self._report)
        partial = self._partial[worker] = PartialResults(local, worker, self)
        return partial

    def end(self, partial: PartialResults | SingleResult) -> None:
        """Report what a worker has done; it takes no further item of the chunk."""
        if isinstance(partial, PartialResults):
            self.report(partial)
            self._partial.pop(partial.worker, None)

    def report(self, partial: PartialResults) -> None:
        """Report what a worker has done so far."""
        with self._lock:
            done = partial.drain()
            if done is None:
                return
            local = partial.local
            local.unreported -= len(done.values)
            if not local.unreported:
                self._open.pop(done.chunk, None)
            self._report(done)

    def patience(self, timeout: float | None) -> float | None:
        """Report what workers have done while they are busy with slow items, if it is time for that.

        Args:
            timeout: Longest wait for reports in seconds, None for ever.

        Returns:
            How long to wait before the next call.
        """
        if not self._open:
            return timeout
        if (now := monotonic()) >= self._due:
            self._due = now + _LOOK
            # A copy, because workers come and go meanwhile.
            for partial in list(self._partial.values()):
                self.report(partial)
        return _LOOK if timeout is None else min(timeout, _LOOK)

    def close(self) -> None:
        """Let no further item begin."""
        for local in list(self._open.values()):
            local.todo.clear()
