# this_file: src/opero/concurrency/scheduler.py
"""Decide what a map does next: a state machine without clock, threads or I/O of its own.

The loop, synchronous or asynchronous, pulls the input, asks `next_chunk` what to submit, passes the executor's
reports to `take`, stores results (cache, checkpoint), passes them to `finish`, and hands out what `hand_out` returns.
These invariants are tested as properties:

I1  it never waits while nothing is outstanding
I2  items in flight and held back for their order are no more than the window
I3  every index ends exactly once
I4  a chunk lost without culprit is split; only a single item is ever blamed
I5  closing early frees everything
I6  user code never runs under a lock (there is none)
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, Final

from opero.concurrency.executors.base import (
    Batch,
    Chunk,
    Done,
    ItemOutcome,
    Lost,
    Parked,
    find_error,
)

if TYPE_CHECKING:
    from opero.concurrency.executors.base import Report


_SLEEPERS: Final = 1_000
"""Items that may wait beside the window, for their next attempt or for another caller's result, so that pauses do not
starve the workers."""
_AHEAD: Final = 1_000
"""Items that a stream may read ahead beside those that its consumer takes in a second."""
LARGEST: Final = 5_000
"""Most items of a chunk."""

HEAVIEST: Final = 1 << 21
"""Most bytes of a chunk's large buffers, if it is not a single item: few enough to stay in the processor's cache."""
_GROWTH: Final = 4
"""A chunk is at most so many times as large as the last one that was measured, or takes a quarter of its target."""
_SMALLEST: Final = 32
"""Towards the end of the input chunks get smaller, down to this part of their size."""
_SAMPLE: Final = 20
"""Finished items from which on a share of failures says anything."""


@dataclass
class ErrorPolicy:
    """What failed items mean for a map: it goes on, stops with what is done, or ends with the error.

    Args:
        raises: Whether a failed item ends the map with its error.
        max_errors: A number of failed items that stops the map, or a share of the finished ones between 0 and 1; None
            for no bound.
        stop_on: Types of errors that stop the map.

    Attributes:
        finished: Items that have ended.
        failed: Those that failed.

    Example:
        >>> policy = ErrorPolicy(raises=False, max_errors=0.1)
        >>> policy.count(19, failed=19), policy.count(1, failed=0)
        (None, '19 of 20 items failed, more than max_errors=0.1 allows')
        >>> ErrorPolicy(stop_on=(OSError,)).stops(TimeoutError())
        'an item failed with TimeoutError, and stop_on ends the map there'
    """

    raises: bool = True
    max_errors: float | None = None
    stop_on: type[BaseException] | tuple[type[BaseException], ...] = ()
    finished: int = 0
    failed: int = 0

    def stops(self, error: BaseException) -> str | None:
        """Return why an item's error, or a member of an exception group, stops the map; None if it does not.

        The text names the type only, so that equal ends can be counted.
        """
        found = find_error(error, self.stop_on)
        if found is None:
            return None
        return f"an item failed with {type(found).__name__}, and stop_on ends the map there"

    def ends(self, error: BaseException) -> bool:
        """Return whether the map ends with an item's error."""
        return self.raises or not isinstance(error, Exception)

    def count(self, items: int, *, failed: int) -> str | None:
        """Count items; return why the map must stop, or None."""
        self.finished += items
        self.failed += failed
        most, failures = self.max_errors, self.failed
        if most is None or not failures:
            return None
        if isinstance(most, int):
            end = f"{failures} items failed, and max_errors={most} ends the map there"
            return end if failures >= most else None
        if self.finished >= _SAMPLE and failures > most * self.finished:
            return (
                f"{failures} of {self.finished} items failed, more than max_errors={most:g} allows"
            )
        return None


Recover = Callable[[Any, Parked | None, Lost, float], ItemOutcome]
"""Judges an item that was lost with its worker, from the item, what it brought along, how it was lost and the clock
reading: returns its error, or a pause before its next attempt."""


@dataclass
class ChunkSize:
    """The size of the next chunk, from the time that items took so far.

    It starts with single items and grows towards chunks that take `target_s`.

    Args:
        target_s: Seconds of work that a chunk should hold.
        fixed: Size that the user wants; None to measure.
        least: Smallest size: how many items one worker has under way at once.

    Attributes:
        size: Items of the next chunk.

    Example:
        >>> chunks = ChunkSize(target_s=0.03)
        >>> for _ in range(3):
        ...     chunks.measured(chunks.size, 0.001 * chunks.size)  # each item takes 1 ms
        >>> chunks.size
        30
    """

    target_s: float
    fixed: int | None = None
    least: int = 1

    def __post_init__(self) -> None:
        self.size: int = self.fixed or self.least
        self._most = LARGEST
        self._wanted = 0

    def measured(self, items: int, busy_s: float) -> None:
        """Learn how long some items took; a small sample may shrink the size, not raise it."""
        if self.fixed or not items:
            return
        # Compared before it is divided: a time may be so short that the quotient is infinite.
        short = busy_s * _SMALLEST * LARGEST <= self.target_s * items
        fitting = _SMALLEST * LARGEST if short else int(self.target_s * items / busy_s)
        self._wanted = fitting
        wanted = max(self.least, min(self._most, fitting))
        if wanted < self.size:
            self.size = wanted
        elif items >= self.size:
            self.size = min(wanted, max(_GROWTH * self.size, fitting // _GROWTH))

    def weighed(self, items: int, size: int) -> None:
        """Learn how many bytes some items took that travel beside their frame."""
        self._most = min(LARGEST, max(self.least, HEAVIEST * items // size))
        if not self.fixed:
            self.size = min(self.size, self._most)

    def restart(self) -> None:
        """Start again with single items, because a chunk took far longer than it should."""
        self.size = self.fixed or self.least

    def part(self, left: int, slots: int) -> int:
        """Return the size of a part of what was given back: it is shared out, whatever size the user wants."""
        return min(self.size, ceil(left / slots))

    def share(self, left: int, slots: int) -> int:
        """Return the size that spreads the last `left` items evenly.

        As in guided self-scheduling (C. Polychronopoulos and D. Kuck, 1987), chunks become smaller
        towards the end.
        """
        # Of the quickest items a chunk holds less than it might, and a part of it would be nothing.
        whole = self._wanted if self.size == LARGEST else self.size
        least = max(1, min(self.size, whole // _SMALLEST))
        return self.fixed or max(least, min(self.size, ceil(left / max(1, slots))))


class Scheduler:
    """The state of one map.

    Args:
        size: The size of chunks.
        ordered: Whether results are handed out in the order of the input.
        errors: What failed items mean for the map.
        recover: Judges items that were lost with their worker.

    Attributes:
        errors: As above, with the counters of finished and failed items.
        ended: Whether the input is at its end.
        failed: Index and error of the item that ends the map, once there is one.
        stopped: Why no further item begins, once that is so.
        pulled: Items pulled from the input.
        open: Items pulled and not finished.
    """

    def __init__(
        self, *, size: ChunkSize, ordered: bool, errors: ErrorPolicy, recover: Recover
    ) -> None:
        self._size = size
        self._ordered = ordered
        # Finished items on their way out: how many, those that wait for no other one, and those that do, in runs of
        # neighbours, by the first index. The first of them waits for the item `_next`.
        self._held = 0
        self._ready: deque[Batch] = deque()
        self._early: dict[int, Batch] = {}
        self._next = 0
        self._recover = recover
        # Items that were pulled and not yet dispatched: runs of neighbours, in lists of the scheduler's own.
        self._queue: deque[tuple[Sequence[int], list[Any]]] = deque()
        self._queued = 0
        self._again: deque[Chunk] = deque()
        # Items that pause: when that is over, their index, and with what they go on.
        self._sleepers: list[tuple[float, int, Any, Parked]] = []
        self._out: dict[int, Chunk] = {}
        # Items at the executor, where a chunk counts by the part of a worker that it keeps busy.
        self._load = 0
        # Of chunks that are reported in part, how many items are not.
        self._left: dict[int, int] = {}
        self._ids = 0
        self.errors: ErrorPolicy = errors
        self.ended: bool = False
        self.failed: tuple[int, BaseException] | None = None
        self.stopped: str | None = None
        self._ending = False
        self.pulled: int = 0
        self.open: int = 0

    # --- input ---------------------------------------------------------------------------------------

    def room(self, slots: int, elsewhere: int = 0, streamed_s: float | None = None) -> int:
        """Return how many items to pull now.

        Args:
            slots: Chunks that the executor wants to hold.
            elsewhere: Items that wait for another caller's result.
            streamed_s: Seconds since the stream began that hands the results out; None if there is none.
        """
        if self.ended or self._ending:
            return 0
        awake = self.open - min(len(self._sleepers) + elsewhere, _SLEEPERS)
        # In flight or held back are at most a chunk for each slot, or what fills it.
        least = max(1, slots) * self._size.least
        window = max(least, slots * self._size.size)
        if streamed_s is not None and self._size.fixed is None:
            taken = self.pulled - self.open - self._held
            window = min(window, max(least, _AHEAD) + int(taken / streamed_s))
        return max(0, window - awake - self._held)

    def admit(self, count: int) -> range:
        """Give the next pulled items their indices."""
        start = self.pulled
        self.pulled += count
        self.open += count
        return range(start, self.pulled)

    def enqueue(self, idx: Sequence[int], items: list[Any]) -> None:
        """Queue admitted items that must be computed; the list is the scheduler's from now on."""
        if not items:
            return
        self._queued += len(items)
        if self._queue and isinstance(idx, range):
            last, known = self._queue[-1]
            if isinstance(last, range) and last.stop == idx.start:
                known += items
                self._queue[-1] = range(last.start, idx.stop), known
                return
        self._queue.append((idx, items))

    def stop(self, reason: str) -> None:
        """Begin no further item; those at work go on to their end."""
        if self.stopped is None:
            self.stopped = reason
            self._ending = True

    # --- dispatch ------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Chunks at the executor."""
        return len(self._out)

    def next_chunk(self, slots: int, now: float) -> Chunk | None:
        """Return a chunk to submit, None if there is none or the executor has enough."""
        if self._ending:
            return None
        if self._load >= slots * self._size.least:
            return None
        if self._sleepers and self._sleepers[0][0] <= now:
            return self._wake(now)
        if self._again:
            return self._resend(slots)
        if not self._queue:
            return None
        # The end of the input is shared by all; before that, items go to the workers that have none.
        sharers = slots if self.ended else slots - len(self._out)
        most = 1 if self._size.size == 1 else self._size.share(self._queued, sharers)
        idx, items = self._queue.popleft()
        if later := idx[most:]:
            waiting, idx, items = items, idx[:most], items[:most]
            # In place: a copy for each of many small chunks would cost more than all else.
            del waiting[:most]
            self._queue.appendleft((later, waiting))
        self._queued -= len(items)
        return self._send(idx, items)

    def _resend(self, slots: int) -> Chunk:
        """Send out what came back: suspects as they are, what a slow chunk gave back in parts for all."""
        waiting = self._again.popleft()
        count = len(waiting.items)
        most = count if waiting.attempt else self._size.part(count, slots)
        self._return(waiting, range(most, count), waiting.attempt)
        part = _some_of(waiting, range(most), waiting.attempt)
        return self._send(part.idx, part.items, part.parked, part.attempt)

    def _wake(self, now: float) -> Chunk:
        idx: list[int] = []
        items: list[Any] = []
        parked: dict[int, Parked] = {}
        while self._sleepers and self._sleepers[0][0] <= now and len(idx) < self._size.size:
            _, index, item, parked[len(idx)] = heapq.heappop(self._sleepers)
            idx.append(index)
            items.append(item)
        return self._send(idx, items, parked)

    def _send(
        self,
        idx: Sequence[int],
        items: list[Any],
        parked: dict[int, Parked] | None = None,
        attempt: int = 0,
    ) -> Chunk:
        chunk = Chunk(self._ids, idx, items, attempt, parked)
        self._ids += 1
        self._out[chunk.id] = chunk
        self._load += min(self._size.least, len(items))
        return chunk

    def next_due(self) -> float | None:
        """Return the clock reading at which an item's pause is over, None if no item pauses."""
        return self._sleepers[0][0] if self._sleepers and not self._ending else None

    # --- reports -------------------------------------------------------------------------------------

    def take(self, reports: Iterable[Report], now: float) -> list[Batch]:
        """Digest an executor's reports and return the items that are finished, not yet settled."""
        least = self._size.least
        finished: list[Batch] = []
        idx: list[int] = []
        singles, busy_s = Batch(idx, [], []), 0.0
        for report in reports:
            chunk = self._out.get(report.chunk)
            if chunk is None:
                continue
            whole = len(chunk.items)
            if isinstance(report, Lost):
                count = len(report.places)
                finished += self._lost(chunk, report, now)
            elif whole == 1 and not (report.odd or report.weight):
                # Slow items, as a rule, of which many may be done at once.
                count = 1
                idx += chunk.idx
                singles.items += chunk.items
                singles.values += report.values
                busy_s += report.busy_s
            else:
                count = len(report.values)
                finished.append(self._done(chunk, report, now))
            before = self._left.pop(chunk.id, whole)
            after = before - count
            self._load -= min(least, before) - min(least, after)
            if after > 0:
                self._left[chunk.id] = after
            else:
                del self._out[chunk.id]
        if idx:
            self._size.measured(len(idx), busy_s)
            finished.append(singles)
        return finished

    def _done(self, chunk: Chunk, done: Done, now: float) -> Batch:
        count = len(done.values)
        self._size.measured(count, done.busy_s)
        if done.weight:
            self._size.weighed(len(chunk.items), done.weight)
        idx, items = chunk.idx, chunk.items
        if done.places != range(len(items)):
            idx, items = _at(idx, done.places), _at(items, done.places)
        batch = Batch(idx, items, done.values, done.odd)
        paused: set[int] = set()
        for n, outcome in done.odd.items():
            if outcome.retry_in is not None:
                self._sleep(chunk, done.places[n], outcome, now)
                paused.add(n)
            elif outcome.error is None:
                done.values[n] = outcome.value
        return batch.without(paused) if paused else batch

    def _sleep(self, chunk: Chunk, position: int, outcome: ItemOutcome, now: float) -> None:
        due, parked = now + (outcome.retry_in or 0.0), outcome.parked or Parked()
        sleeper = due, chunk.idx[position], chunk.items[position], parked
        heapq.heappush(self._sleepers, sleeper)

    def _return(self, chunk: Chunk, places: Sequence[int], attempt: int) -> None:
        """Put items of a chunk back, before all others."""
        if places:
            self._again.appendleft(_some_of(chunk, places, attempt))

    def _lost(self, chunk: Chunk, lost: Lost, now: float) -> list[Batch]:
        left = lost.places
        if lost.why == "slow":
            self._size.restart()
        if lost.why in ("slow", "stopped") or not left:
            self._return(chunk, left, chunk.attempt)
            return []
        if not lost.only_chunk:
            self._return(chunk, left, chunk.attempt + 1)
            return []
        culprit = left[0] if len(left) == 1 else lost.culprit
        if culprit is None:
            # The culprit is unknown: halve until a single item is left.
            middle = len(left) // 2
            self._return(chunk, left[middle:], chunk.attempt + 1)
            self._return(chunk, left[:middle], chunk.attempt + 1)
            return []
        at = left.index(culprit)
        self._return(chunk, left[at + 1 :], chunk.attempt)
        self._return(chunk, left[:at], chunk.attempt)
        item = chunk.items[culprit]
        outcome = self._recover(item, (chunk.parked or {}).get(culprit), lost, now)
        if outcome.retry_in is not None:
            self._sleep(chunk, culprit, outcome, now)
            return []
        return [Batch([chunk.idx[culprit]], [item], [None], {0: outcome})]

    # --- output --------------------------------------------------------------------------------------

    def finish(self, batch: Batch) -> None:
        """Count settled items and put them where they are handed out."""
        count = len(batch.items)
        if not count:
            return
        self.open -= count
        failures = 0
        for n, outcome in batch.odd.items():
            error = outcome.error
            if error is None:
                continue
            failures += 1
            if (reason := self.errors.stops(error)) is not None:
                self.stop(reason)
            elif self.failed is None and self.errors.ends(error):
                self.failed = batch.idx[n], error
                self._ending = True
        if not (failures or self.errors.failed):
            self.errors.finished += count
        elif (reason := self.errors.count(count, failed=failures)) is not None:
            self.stop(reason)
        self._held += count
        if not self._ordered:
            self._ready.append(batch)
            return
        self._early.update((run.idx[0], run) for run in batch.runs())
        while (run := self._early.pop(self._next, None)) is not None:
            self._ready.append(run)
            self._next += len(run)

    def hand_out(self) -> Batch | None:
        """Return the next finished items, None if there are none yet."""
        if self._ending and not self._out:
            # What is missing will not come any more.
            self._ready += [self._early.pop(index) for index in sorted(self._early)]
        if not self._ready:
            return None
        batch = self._ready.popleft()
        self._held -= len(batch.items)
        return batch

    @property
    def done(self) -> bool:
        """Whether nothing more will be handed out once `hand_out` is empty."""
        return not self._out and (self._ending or (self.ended and not self.open))


def _at(entries: Sequence[Any], places: Sequence[int]) -> Any:
    """Return some entries; of a range or list a range or list where the places are neighbours."""
    if isinstance(places, range):
        return entries[places.start : places.stop]
    return [entries[n] for n in places]


def _some_of(chunk: Chunk, places: Sequence[int], attempt: int) -> Chunk:
    known = chunk.parked or {}
    parked = {n: known[place] for n, place in enumerate(places) if place in known}
    return Chunk(-1, _at(chunk.idx, places), _at(chunk.items, places), attempt, parked)
