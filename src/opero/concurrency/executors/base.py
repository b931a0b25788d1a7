# this_file: src/opero/concurrency/executors/base.py
"""Define what the scheduler of a map, its executors and the recorders of its items exchange.

The scheduler owns every policy: window, order, chunks, cache, retries that wait long, errors. An executor owns workers:
it takes chunks, runs their items and reports. It decides nothing, keeps nothing, and never calls the scheduler.

None of the classes is a dataclass: `dataclasses` and what it imports would take a third of the time in which a fresh
worker process is ready.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from opero.utils.lazy import NamedTuple
from opero.utils.steps import in_thread

if TYPE_CHECKING:
    from opero.core.pipeline import Pipeline
    from opero.events import Event
    from opero.utils.steps import StepLogic


worker_process: Final[list[bool]] = []
"""Not empty in a worker process, which shares its terminal with the map that it works for and draws no bar."""

Why = Literal["crash", "timeout", "deadline", "memory", "stopped", "slow"]
"""What ended a worker: it died, its item took too long (for its own limit, or for a deadline) or too much memory, or it
ended through no fault of an item; or why it gave items back: the one before them is slow."""


def find_error(
    error: BaseException, types: type[BaseException] | tuple[type[BaseException], ...]
) -> BaseException | None:
    """Return an error, or the first member of an exception group, that is of one of some types; None if none is."""
    if isinstance(error, types):
        return error
    for member in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
        if (found := find_error(member, types)) is not None:
            return found
    return None


class MapJob(NamedTuple):
    """What is done with each item.

    Attributes:
        function: The user's function itself.
        pipeline: The pipeline around it, without the map's cache, for executors in this process; its counters, limiter
            and listeners are the map's own.
        before, after, kwargs: Arguments around the item, the same for all: `function(*before, item,
            *after, **kwargs)`; `before` is the instance of a method.
        item_timeout: Longest time of one real call in seconds, for executors that can kill.
        target_s: Work that one chunk should hold, in seconds; one that takes 5 times as long gives back what has not
            started.
        parks: Longest pause before a retry, in seconds, that a worker sleeps itself; before a longer
            one it reports the item with `ItemOutcome.retry_in` and takes the next.
        details: Whether plain successes too are wanted as `ItemOutcome`s.
        worker_init: Called once in each new worker.
        memory_limit: Most bytes a worker process may take.
        max_tasks_per_worker: Items after which a worker process is replaced.
        deadline: Clock reading by which all must be done, from where the map was called; None if there is none.
        in_flight: Coroutines that one worker process has under way at once.
        relays_all: Whether events of functions that the mapped one calls are wanted, too.
        leads: Whether other callers wait for these results, so that the function, where it calls itself in a foreign
            worker, must not wait for another caller.
        stopped: Returns whether no further item is to begin; None for a map that cannot be stopped so.
        ends_on: Types of errors that end the map: after an item that fails with one, no other begins.
        enter: Called with index and item in the context of each attempt, a copy of its own; only for executors in
            this process.
    """

    function: Callable[..., Any]
    pipeline: Pipeline
    before: tuple[Any, ...] = ()
    after: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012 - a default that is never changed
    item_timeout: float | None = None
    target_s: float = 0.03
    parks: float = 0.05
    details: bool = False
    worker_init: Callable[[], object] | None = None
    memory_limit: int | None = None
    max_tasks_per_worker: int | None = None
    deadline: float | None = None
    in_flight: int = 1
    relays_all: bool = False
    leads: bool = False
    stopped: Callable[[], bool] | None = None
    ends_on: type[BaseException] | tuple[type[BaseException], ...] = ()
    enter: Callable[[int, Any], object] | None = None

    def ends(self, outcome: ItemOutcome) -> bool:
        """Return whether the map ends with what became of an item."""
        error = outcome.error
        return error is not None and find_error(error, self.ends_on) is not None


class Parked(NamedTuple):
    """What an unfinished call takes with it to its next attempt; small and picklable.

    Attributes:
        attempts: Attempts started, the coming one included.
        calls: Real calls made.
        slept: Seconds of pauses, the coming one included.
        elapsed: Seconds since the call began, the coming pause included.
        failures: Label and error of each failed real call.
    """

    attempts: int = 1
    calls: int = 0
    slept: float = 0.0
    elapsed: float = 0.0
    failures: tuple[tuple[str | None, Exception], ...] = ()


class ItemOutcome:
    """What became of one item: a value, an error, or a pause before its next attempt.

    Attributes:
        value: The result.
        error: Why there is none; None for a result. Only `Exception`s and what a worker made of the
            others; never a cancellation.
        attempts, calls: Attempts and real calls made.
        seconds: Time it took.
        slept, waited: Seconds of it in pauses and in the rate limiter.
        label, fallback: The fallback value in use, as opero shows it and itself.
        rejected: Whether `retry_if_result` refused the value and all was spent.
        trace: The traceback in the worker as text, where the error itself came without it.
        retry_in: Seconds until the item shall be tried again; None if this is final.
        parked: What that next attempt must know.
    """

    value: Any = None
    error: BaseException | None = None
    attempts: int = 1
    calls: int = 1
    seconds: float = 0.0
    slept: float = 0.0
    waited: float = 0.0
    label: str | None = None
    fallback: Any = None
    rejected: bool = False
    trace: str | None = None
    retry_in: float | None = None
    parked: Parked | None = None

    def __init__(self, **made: Any) -> None:
        vars(self).update(made)


class Chunk(NamedTuple):
    """Some items on their way to a worker.

    Attributes:
        id: Its number; items that come back go out again in a chunk of another one.
        idx: Indices of the items in the input; a `range` where they are neighbours.
        items: The items.
        attempt: How often these items were lost with a worker before.
        parked: What items that were tried before take with them, by position.
    """

    id: int
    idx: Sequence[int]
    items: list[Any]
    attempt: int = 0
    parked: dict[int, Parked] | None = None


class WorkerFacts(NamedTuple):
    """What happened in a worker that does not share the map's counters and listeners.

    Attributes:
        stats: Amounts to add to the counters, by name.
        events: Events, in order.
    """

    stats: dict[str, float]
    events: tuple[Event, ...] = ()


class Done(NamedTuple):
    """Results of some items of a chunk, in the order in which they have finished.

    Plain successes stand in `values` and nowhere else, so that a map of tiny items pays for one list
    per chunk and not for an object per item.

    Attributes:
        chunk: Its id.
        places: Their positions in the chunk; a `range` where they are neighbours.
        values: One per item.
        odd: What is more than a plain value of a first attempt, by position in `values`, where None
            stands for it.
        busy_s: Seconds of work on these items.
        facts: Counters and events of workers elsewhere.
        weight: Bytes that large parts of the items and results of the whole chunk took, so far, beside its frames.
    """

    chunk: int
    places: Sequence[int]
    values: list[Any]
    odd: dict[int, ItemOutcome]
    busy_s: float
    facts: WorkerFacts | None = None
    weight: int = 0


class Lost(NamedTuple):
    """Items of a chunk that its worker had not reported and never will: it died, or has given them back.

    Attributes:
        chunk: Its id.
        places: Their positions in the chunk, ascending.
        culprit: Position of the item that the worker died of; None if the executor does not know.
        why: Why it ended, or why it gave the items back.
        pid, exitcode: The process, where there was one.
        said: Its last output, for the message.
        only_chunk: Whether nothing of other chunks was under way in the worker, so that it died of this one.
    """

    chunk: int
    places: Sequence[int]
    culprit: int | None
    why: Why
    pid: int | None = None
    exitcode: int | None = None
    said: str = ""
    only_chunk: bool = True


Report = Done | Lost
"""A chunk is over when each of its items was reported as `Done` or `Lost`."""


class MapExecutor(Protocol):
    """Workers of one kind. All methods but `wake` are called from one thread at a time.

    An executor of an event loop has the same methods, but `poll` and `close` (with `grace` for `timeout`) are coroutine
    functions.

    Attributes:
        slots: How many chunks it wants to hold: one at work and one at hand for each worker.
    """

    slots: int

    def open(self, job: MapJob) -> None:
        """Get ready for a job; called once, before the first chunk. `close` follows, also where this fails.

        Raises:
            OperoError: The job cannot be shipped, or no worker comes up.
        """
        ...

    def submit(self, chunk: Chunk) -> None:
        """Take a chunk; never blocks on a busy worker."""
        ...

    def poll(self, timeout: float | None) -> list[Report]:
        """Return what was reported since the last time; wait for the first report if there is none.

        Args:
            timeout: Longest wait in seconds, 0 for none, None for ever.

        Returns:
            Reports in order; an empty list after `timeout` seconds or a `wake`.

        Raises:
            OperoError: Workers die before their first item, so that there is no point in going on.
        """
        ...

    def halt(self) -> None:
        """Begin no other item, as after one that ends the map; what has not begun is given back as `Lost`."""
        ...

    def wake(self) -> None:
        """Let a `poll` under way return, or the next one; from any thread, also after `close`."""
        ...

    def close(self, *, graceful: bool, timeout: float) -> None:
        """End all workers; calling it again does nothing.

        Args:
            graceful: Let running items finish; otherwise stop them where that is possible.
            timeout: Longest wait in seconds.
        """
        ...


# --- finished items -------------------------------------------------------------------------------

Origin = Literal["fresh", "hit", "shared", "stale", "resumed"]
"""Where a result came from: computed by this map, found in the cache, computed by another caller or for an equal item,
found expired in the cache while computing it failed, or found in the checkpoint."""


class Batch:
    """Finished items.

    Attributes:
        idx: Their indices in the input; a `range` where they are neighbours.
        items: The items.
        values: Their results; None where there is none.
        odd: What is more than a plain result, by position.
        origin: Where the results came from.
    """

    __slots__ = ("idx", "items", "odd", "origin", "values")

    def __init__(
        self,
        idx: Sequence[int],
        items: list[Any],
        values: list[Any],
        odd: dict[int, ItemOutcome] | None = None,
        origin: Origin = "fresh",
    ) -> None:
        self.idx: Sequence[int] = idx
        self.items: list[Any] = items
        self.values: list[Any] = values
        self.odd: dict[int, ItemOutcome] = {} if odd is None else odd
        self.origin: Origin = origin

    def __len__(self) -> int:
        return len(self.items)

    def add(self, index: int, item: Any, result: Any) -> None:
        """Add an item with its result, or with an `ItemOutcome`, to a batch whose indices are a list."""
        idx: Any = self.idx
        if isinstance(result, ItemOutcome):
            self.odd[len(self.items)] = result
            result = result.value
        idx.append(index)
        self.items.append(item)
        self.values.append(result)

    def outcome(self, position: int) -> ItemOutcome:
        """Return what became of an item."""
        if (outcome := self.odd.get(position)) is not None:
            return outcome
        calls = 1 if self.origin == "fresh" else 0
        return ItemOutcome(value=self.values[position], attempts=calls, calls=calls)

    def without(self, positions: Collection[int]) -> Batch:
        """Return the items at all other positions."""
        kept = [n for n in range(len(self)) if n not in positions]
        return Batch(
            [self.idx[n] for n in kept],
            [self.items[n] for n in kept],
            [self.values[n] for n in kept],
            {place: self.odd[n] for place, n in enumerate(kept) if n in self.odd},
            self.origin,
        )

    def runs(self) -> Iterator[Batch]:
        """Split into runs of neighbours."""
        if isinstance(self.idx, range):
            yield self
            return
        start = 0
        for end in range(1, len(self.idx) + 1):
            if end < len(self.idx) and self.idx[end] == self.idx[end - 1] + 1:
                continue
            yield Batch(
                range(self.idx[start], self.idx[start] + end - start),
                self.items[start:end],
                self.values[start:end],
                {n - start: self.odd[n] for n in range(start, end) if n in self.odd},
                self.origin,
            )
            start = end


# --- recorders ------------------------------------------------------------------------------------

Finished = tuple[int, Any, ItemOutcome]
"""Index, item and what became of it."""


class ItemRecorder(Protocol):
    """Remembers what became of the items of a map, and is asked for it when the map is run again.

    Two kinds of recorders plug in here: the checkpoint of a map, and code that surrounds maps with a journal of its
    own, such as a durable workflow. The latter sets `recording` in its context; every map that is called there asks
    it once for a recorder. While it does:

    - Items run in this process whatever the mode says: those of a plain function in threads, those of a coroutine
      function on the running loop (one after the other with `sequential=True`).
    - Each attempt at an item runs in a copy of its own of the context in which the map was called; `enter` is called
      in it before the function is.
    - `find_known` is asked before the cache is. An item it knows is not looked up, not run, and counts as "resumed".
    - `keep` gets every other item once, with its final outcome, whether that was computed, found in the cache or
      shared with an equal item, before the caller can see it. A failure is an outcome too. It does not get items that
      were cut short because the map ended early, nor errors that are no `Exception` (KeyboardInterrupt, a workflow
      that is being parked): these end the map and are raised to its caller.

    All but `enter` are called from one thread at a time, in the order of completion: in the thread of the map, or for
    an asynchronous map, because they may take as long as a disk does, in another thread. What they raise ends the map.

    Example:
        >>> from opero import operomap
        >>> from opero.concurrency.executors.base import ItemOutcome
        >>> class Memory:
        ...     known = {}
        ...     def enter(self, index, item):
        ...         pass
        ...     def find_known(self, idx, items):
        ...         return {n: ItemOutcome(value=self.known[n]) for n in idx if n in self.known}
        ...     def keep(self, finished):
        ...         for index, item, outcome in finished:
        ...             self.known[index] = outcome.value
        ...     def close(self):
        ...         pass
        >>> @operomap(cache=False, on_result=lambda one: print(one.origin, end=" "))
        ... def double(x):
        ...     return 2 * x
        >>> token = recording.set(lambda name: Memory())
        >>> double([1, 2])
        fresh fresh [2, 4]
        >>> double([1, 2, 3])
        resumed resumed fresh [2, 4, 6]
        >>> recording.reset(token)
    """

    def enter(self, index: int, item: Any, /) -> object:
        """An attempt at an item begins in this context; called in the thread or task that runs it."""
        ...

    def find_known(self, idx: Sequence[int], items: Sequence[Any], /) -> Mapping[int, ItemOutcome]:
        """Return what is known of these items, by index.

        An `ItemOutcome` has a `value`, or an `error` that is the item's again.
        """
        ...

    def keep(self, finished: Sequence[Finished], /) -> object:
        """Remember what became of items."""
        ...

    def close(self) -> object:
        """The map is over, however it ended."""
        ...


MakeRecorder = Callable[[str], ItemRecorder | None]
"""Gets the qualified name of the function that is mapped; None for a map that is not recorded."""

recording: Final[ContextVar[MakeRecorder | None]] = ContextVar("opero_recording", default=None)
"""Makes the recorders of the maps of this context."""


# --- the map's side -------------------------------------------------------------------------------


def find_known_items(
    recorder: ItemRecorder, idx: Sequence[int], items: list[Any]
) -> StepLogic[tuple[Batch | None, Sequence[int], list[Any]]]:
    """Ask for known items; return these, and the indices and items of the others."""
    known: Mapping[int, ItemOutcome] = yield in_thread(lambda: recorder.find_known(idx, items))
    if not known:
        return None, idx, items
    found, others = Batch([], [], [], {}, "resumed"), list[tuple[int, Any]]()
    for index, item in zip(idx, items, strict=True):
        if (outcome := known.get(index)) is None:
            others.append((index, item))
        else:
            found.add(index, item, outcome.value if outcome.error is None else outcome)
    return found, [index for index, _ in others], [item for _, item in others]


def record_items(recorder: ItemRecorder, batches: Iterable[Batch]) -> StepLogic[None]:
    """Record what became of items, but for errors that end the map."""
    finished: list[Finished] = [
        (index, item, outcome)
        for batch in batches
        if batch.origin != "resumed"
        for n, (index, item) in enumerate(zip(batch.idx, batch.items, strict=True))
        if (outcome := batch.outcome(n)).error is None or isinstance(outcome.error, Exception)
    ]
    if finished:
        yield in_thread(lambda: recorder.keep(finished))
