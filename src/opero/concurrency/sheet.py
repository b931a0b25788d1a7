# this_file: src/opero/concurrency/sheet.py
"""What a worker has to do of one chunk, and what it has to report of it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from opero.concurrency.executors.base import Done, GaveBack

if TYPE_CHECKING:
    from opero.concurrency.executors.base import Chunk, ItemOutcome, MapJob, Report

__all__ = ["PATIENCE", "Sheet", "Slip", "sheet_of"]

PATIENCE: Final = 5
"""A chunk that takes so many times its target gives back what has not begun."""


class Sheet:
    """The positions of a chunk that have not begun, and what became of those that have.

    Its worker takes positions and writes down results. Somebody else may `look` at it meanwhile, from any thread: what
    is done is reported then, and what has not begun is given back, while the worker is busy with a slow item. Positions
    are taken from one end of a deque and given back from the other, so that none is done twice or forgotten and no
    item pays for a lock; reports, which are few, have one.

    Args:
        chunk: The chunk.
        job: Whose target counts.
        worker: Name of the worker.
        tell: Takes each report, one at a time.
        flush_s: Seconds after which what is done is reported; None for the job's target.

    Attributes:
        number: Id of the chunk.
    """

    __slots__ = (
        "_due", "_flush_s", "_flushed", "_held", "_kept", "_late", "_lock", "_odd", "_order", "_tell", "_todo", "_told",
        "_values", "_worker", "number",
    )  # fmt: skip

    def __init__(
        self,
        chunk: Chunk,
        job: MapJob,
        worker: str,
        tell: Callable[[Report], object],
        *,
        flush_s: float | None = None,
    ) -> None:
        count = len(chunk)
        self.number: int = chunk.id
        self._kept = count
        self._flush_s = job.target_s if flush_s is None else flush_s
        self._worker = worker
        self._tell = tell
        self._todo = deque(range(count))
        self._values: list[Any] = []
        self._odd: dict[int, ItemOutcome] | None = None
        # Where one is done after the other, they are done in their order.
        self._order: list[int] | None = None if job.in_flight == 1 else []
        self._told = 0
        self._lock = threading.Lock()
        self._held = False
        self._flushed = perf_counter()
        self._due = self._flushed + self._flush_s
        self._late = self._flushed + PATIENCE * job.target_s

    # --- the worker's side ------------------------------------------------------------------------

    def positions(self, stopped: Callable[[], object] | None = None) -> Iterator[int]:
        """Take one position after the other, until none is left.

        Args:
            stopped: Whether no further item shall begin; None if nobody will say so.
        """
        take = self._todo.popleft
        try:
            for _ in range(self._kept):
                if stopped is not None and stopped():
                    return
                yield take()
        except IndexError:
            # Asking first would not do: somebody may take the last one in between.
            return

    def add(self, position: int, value: Any, outcome: ItemOutcome | None) -> None:
        """Write down one item; report what is done and give back the rest when it is time for that.

        Args:
            position: Its position.
            value: The plain result; not looked at where there is an outcome.
            outcome: What became of the item if that is more than a plain result.
        """
        if outcome is not None:
            if self._odd is None:
                self._odd = {}
            self._odd[position] = outcome
            value = None
        if self._order is not None:
            self._order.append(position)
        # Last, because an item whose value stands here is done for whoever looks.
        self._values.append(value)
        self._held = False
        if (now := perf_counter()) < self._due:
            return
        count = len(self._values)
        if count == self._kept:
            return
        with self._lock:
            self._report(now, self._tell, count)
            if now >= self._late:
                self._give_back(self._tell)

    def hold(self) -> None:
        """Let nobody else report until the next item is written down: its result is being made ready to travel."""
        with self._lock:
            self._held = True

    def flush(self) -> None:
        """Report what is done so far."""
        with self._lock:
            self._report(perf_counter(), self._tell, len(self._values))

    def end(self) -> None:
        """Report what is done and give back what was not begun."""
        with self._lock:
            self._report(perf_counter(), self._tell, len(self._values))
            if self._todo:
                self._give_back(self._tell)

    @property
    def over(self) -> bool:
        """Whether every item is done that is not given back."""
        return len(self._values) == self._kept

    # --- from outside -----------------------------------------------------------------------------

    def look(self, tell: Callable[[Report], object] | None = None) -> bool:
        """Report what is done while the worker is at something else, and give back the rest of a slow chunk.

        The last report of a chunk is always left to the worker itself.

        Args:
            tell: Takes these reports in place of the worker's own.

        Returns:
            Whether another look may be of use.
        """
        tell, now = tell or self._tell, perf_counter()
        with self._lock:
            done = len(self._values)
            if self._at_work(done):
                if not self._held:
                    self._report(now, tell, done)
                if now >= self._late:
                    self._give_back(tell, busy=True)
            return self._kept - self._told > 1

    def _at_work(self, done: int) -> bool:
        """Tell whether an item has begun beside those that were done before this was asked."""
        try:
            begun = self._todo[0]
        except IndexError:
            begun = self._kept
        return begun > done

    # --- reports, under the lock ------------------------------------------------------------------

    def _give_back(self, tell: Callable[[Report], object], *, busy: bool = False) -> None:
        """Take back what has not begun.

        Args:
            tell: Takes the report.
            busy: Whether that is only done if the worker is at an item, and so has something to report afterwards.
        """
        kept = self._kept
        try:
            while True:
                kept = self._todo.pop()
        except IndexError:
            pass
        if busy and kept == len(self._values):
            # It is between two items: it goes on, or finds nothing and gives this back itself.
            self._todo.extend(range(kept, self._kept))
        elif kept < self._kept:
            self._kept = kept
            tell(GaveBack(self.number, kept))

    def _report(self, now: float, tell: Callable[[Report], object], count: int) -> None:
        """Report so many items, those included that were reported before."""
        told = self._told
        if count == told:
            return
        places: Sequence[int] = range(told, count)
        values = self._values[told:count]
        if self._order is not None:
            places, values = _sorted(self._order[told:count], values)
        odd, known = {}, self._odd
        if known:
            odd = {n: known[place] for n, place in enumerate(places) if place in known}
        tell(Done(self.number, places, values, odd, now - self._flushed, self._worker))
        # Only now: what could not be told stays to be told.
        self._told, self._flushed, self._due = count, now, now + self._flush_s
        if count < self._kept:
            # They may be large, and the chunk may take long.
            self._values[told:count] = [None] * (count - told)


class Slip(Sheet):
    """The sheet of a single item, which has no neighbours: it is reported when it is done, whoever looks.

    Args:
        number: Id of the chunk.
        worker: Name of the worker.
        tell: Takes the report.
    """

    __slots__ = ("_began", "_done")

    def __init__(self, number: int, worker: str, tell: Callable[[Report], object]) -> None:
        self.number = number
        self._worker = worker
        self._tell = tell
        self._began = perf_counter()
        self._done: tuple[Any, ItemOutcome | None] | None = None

    def positions(self, stopped: Callable[[], object] | None = None) -> Iterator[int]:
        """As for a chunk of several."""
        if stopped is None or not stopped():
            yield 0

    def add(self, position: int, value: Any, outcome: ItemOutcome | None) -> None:
        """As for a chunk of several."""
        self._done = value, outcome

    def hold(self) -> None:
        """Do nothing: nobody else reports."""

    def flush(self) -> None:
        """Do nothing: what is done is the whole chunk."""

    def end(self) -> None:
        """Report the item, or give it back."""
        if self._done is None:
            self._tell(GaveBack(self.number, 0))
            return
        value, outcome = self._done
        values, odd = ([value], {}) if outcome is None else ([None], {0: outcome})
        seconds = perf_counter() - self._began
        self._tell(Done(self.number, _ONLY, values, odd, seconds, self._worker))

    @property
    def over(self) -> bool:
        """Whether it is done."""
        return self._done is not None

    def look(self, tell: Callable[[Report], object] | None = None) -> bool:
        """Do nothing, and want no other look."""
        return False


_ONLY: Final = range(1)


def sheet_of(
    chunk: Chunk,
    job: MapJob,
    worker: str,
    tell: Callable[[Report], object],
    *,
    flush_s: float | None = None,
) -> Sheet:
    """Return the sheet of a chunk; arguments as for `Sheet`."""
    if len(chunk) == 1:
        return Slip(chunk.id, worker, tell)
    return Sheet(chunk, job, worker, tell, flush_s=flush_s)


def _sorted(places: list[int], values: list[Any]) -> tuple[Sequence[int], list[Any]]:
    """Bring results into the order of their positions."""
    ranks = sorted(range(len(places)), key=places.__getitem__)
    first, last = places[ranks[0]], places[ranks[-1]]
    block = last - first + 1 == len(places)
    found = range(first, last + 1) if block else [places[rank] for rank in ranks]
    return found, [values[rank] for rank in ranks]
