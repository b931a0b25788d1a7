# this_file: src/opero/concurrency/recorder.py
"""Where somebody remembers what the items of a map gave, and gives it back when the map is run again.

Two kinds of memory plug in here: the checkpoint of a map, and whoever surrounds maps with a journal of their own, such
as a durable workflow. The latter sets `recording` in its context; every map that is called there asks it once for a
recorder. While it does:

- Items run in this process whatever the mode says: those of a plain function in threads, those of a coroutine function
  on the running loop (one after the other with `sequential=True`).
- Each attempt at an item runs in a copy of its own of the context in which the map was called; `enter` is called in it
  before the function is.
- `recall` is asked before the cache is. An item it knows is not looked up, not run, and counts as "resumed".
- `keep` is told every other item once, with its final outcome, whether that was computed, found in the cache or shared
  with an equal item, before the caller can see it. A failure is an outcome too. Items that were cut short, because the
  map ended early, are not told; nor is what no `Exception` is (KeyboardInterrupt, a workflow that is being parked):
  that ends the map and is raised to its caller.

All but `enter` are called from one thread at a time, in the order of completion: in the thread of the map, or, for an
asynchronous map and a recorder that says that it blocks, in another thread. What they raise ends the map.

Example:
    >>> from opero import operomap
    >>> from opero.concurrency.engine import Outcome
    >>> class Memory:
    ...     blocking = False
    ...     known = {}
    ...     def enter(self, index, item):
    ...         pass
    ...     def recall(self, idx, items):
    ...         return {n: Outcome(value=self.known[n]) for n in idx if n in self.known}
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
from typing import TYPE_CHECKING, Any, Final, Protocol

from opero.concurrency.engine import Outcome
from opero.concurrency.errand import InThread, Steps
from opero.concurrency.order import Batch

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Finished", "ItemRecorder", "MakeRecorder", "recall_items", "record_items", "recording"]

Finished = tuple[int, Any, Outcome]
"""Index, item and what became of it."""


class ItemRecorder(Protocol):
    """The memory of one map.

    Attributes:
        blocking: Whether `recall`, `keep` and `close` may take long, as a disk does.
    """

    blocking: bool

    def enter(self, index: int, item: Any, /) -> object:
        """An attempt at an item begins in this context; called in the thread or task that runs it."""
        ...

    def recall(self, idx: Sequence[int], items: Sequence[Any], /) -> Mapping[int, Outcome]:
        """Return what is known of these items, by index.

        An `Outcome` has a `value`, or an `error` that is the item's again.
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
"""Who records the maps of this context."""


# --- the map's side -------------------------------------------------------------------------------


def recall_items(
    recorder: ItemRecorder, idx: Sequence[int], items: list[Any]
) -> Steps[tuple[Batch | None, Sequence[int], list[Any]]]:
    """Ask for what is known; return that, and the indices and items of the rest."""
    if recorder.blocking:
        known: Mapping[int, Outcome] = yield InThread(lambda: recorder.recall(idx, items))
    else:
        known = recorder.recall(idx, items)
    if not known:
        return None, idx, items
    found = [(index, item) for index, item in zip(idx, items, strict=True) if index in known]
    outcomes = [known[index] for index, _ in found]
    batch = Batch(
        [index for index, _ in found],
        [item for _, item in found],
        [outcome.value for outcome in outcomes],
        {n: outcome for n, outcome in enumerate(outcomes) if outcome.error is not None},
        "resumed",
    )
    rest = [(index, item) for index, item in zip(idx, items, strict=True) if index not in known]
    return batch, [index for index, _ in rest], [item for _, item in rest]


def record_items(recorder: ItemRecorder, batches: Iterable[Batch]) -> Steps[None]:
    """Hand on what became of items."""
    finished = [one for batch in batches if batch.origin != "resumed" for one in _told(batch)]
    if not finished:
        return
    if recorder.blocking:
        yield InThread(lambda: recorder.keep(finished))
    else:
        recorder.keep(finished)


def _told(batch: Batch) -> Iterable[Finished]:
    plain = 1 if batch.origin == "fresh" else 0
    for n, (index, item) in enumerate(zip(batch.idx, batch.items, strict=True)):
        outcome = batch.odd.get(n)
        if outcome is None:
            outcome = Outcome(value=batch.values[n], attempts=plain, calls=plain)
        if outcome.error is None or isinstance(outcome.error, Exception):
            yield index, item, outcome
