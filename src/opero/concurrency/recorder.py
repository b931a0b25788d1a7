# this_file: src/opero/concurrency/recorder.py
"""Remember what became of the items of a map, and take it from there when the map is run again.

Two kinds of recorders plug in here: the checkpoint of a map, and code that surrounds maps with a journal of its own,
such as a durable workflow. The latter sets `recording` in its context; every map that is called there asks it once for
a recorder. While it does:

- Items run in this process whatever the mode says: those of a plain function in threads, those of a coroutine function
  on the running loop (one after the other with `sequential=True`).
- Each attempt at an item runs in a copy of its own of the context in which the map was called; `enter` is called in it
  before the function is.
- `find_known` is asked before the cache is. An item it knows is not looked up, not run, and counts as "resumed".
- `keep` gets every other item once, with its final outcome, whether that was computed, found in the cache or shared
  with an equal item, before the caller can see it. A failure is an outcome too. It does not get items that were cut
  short because the map ended early, nor errors that are no `Exception` (KeyboardInterrupt, a workflow that is being
  parked): these end the map and are raised to its caller.

All but `enter` are called from one thread at a time, in the order of completion: in the thread of the map, or, for an
asynchronous map and a recorder that says that it blocks, in another thread. What they raise ends the map.

Example:
    >>> from opero import operomap
    >>> from opero.concurrency.executors.base import ItemOutcome
    >>> class Memory:
    ...     blocking = False
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

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from opero.concurrency.executors.base import Batch, ItemOutcome
from opero.utils.steps import in_thread

if TYPE_CHECKING:
    from collections.abc import Iterable

    from opero.utils.steps import StepLogic


T = TypeVar("T")

Finished = tuple[int, Any, ItemOutcome]
"""Index, item and what became of it."""


class ItemRecorder(Protocol):
    """The memory of one map.

    Attributes:
        blocking: Whether `find_known`, `keep` and `close` may take long, as a disk does.
    """

    blocking: bool

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


def ask(recorder: ItemRecorder, call: Callable[[], T]) -> StepLogic[T]:
    """Call a recorder's method; in an event loop in another thread, if it may take long."""
    if not recorder.blocking:
        return call()
    found: T = yield in_thread(call)
    return found


def find_known_items(
    recorder: ItemRecorder, idx: Sequence[int], items: list[Any]
) -> StepLogic[tuple[Batch | None, Sequence[int], list[Any]]]:
    """Ask for known items; return these, and the indices and items of the others."""
    known = yield from ask(recorder, lambda: recorder.find_known(idx, items))
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
        yield from ask(recorder, lambda: recorder.keep(finished))
