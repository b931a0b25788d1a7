# this_file: src/opero/concurrency/watch.py
"""Who watches a map: its counters, the user's `on_result`, the progress bar, listeners."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from opero.concurrency.result import ItemResult, MapFailure

if TYPE_CHECKING:
    from opero.concurrency.order import Batch

__all__ = ["Bar", "Watch"]


class Bar(Protocol):
    """A progress bar."""

    def show(self, done: int, *, failed: int, hits: int, resumed: int) -> None:
        """Show so many items as done."""
        ...

    def close(self) -> None:
        """Show the last state and end."""
        ...


class Watch:
    """Sees each finished item once.

    Args:
        on_result: Called with each, in the thread of the map.
        bar: The progress bar, None for none.
        keeps: Whether failures are kept for a result; a stream hands them out instead.

    Attributes:
        failures: Items that failed, as they came.
        origins: How many results came from where, failed ones included.
        busy: Seconds of work.
    """

    def __init__(
        self,
        *,
        on_result: Callable[[ItemResult], object] | None,
        bar: Bar | None,
        keeps: bool,
    ) -> None:
        self._on_result = on_result
        self._bar = bar
        self._keeps = keeps
        self._done = 0
        self._failed = 0
        self.failures: list[MapFailure] = []
        self.origins: Counter[str] = Counter()
        self.busy: float = 0.0

    def saw(self, batch: Batch) -> None:
        """Take note of finished items."""
        self._done += len(batch)
        self.origins[batch.origin] += len(batch)
        for position, outcome in batch.odd.items():
            if outcome.error is None:
                continue
            self._failed += 1
            if self._keeps:
                failure = MapFailure(
                    index=batch.idx[position],
                    item=batch.items[position],
                    error=outcome.error,
                    attempts=outcome.attempts,
                    trace=outcome.trace,
                )
                self.failures.append(failure)
        if self._bar is not None:
            self._bar.show(
                self._done,
                failed=self._failed,
                hits=self.origins["hit"],
                resumed=self.origins["resumed"],
            )
        if self._on_result is not None:
            self._tell(batch, self._on_result)

    def _tell(self, batch: Batch, on_result: Callable[[ItemResult], object]) -> None:
        for position, index in enumerate(batch.idx):
            outcome = batch.odd.get(position)
            plain = 1 if batch.origin == "fresh" else 0
            on_result(
                ItemResult(
                    index,
                    batch.items[position],
                    batch.values[position],
                    None if outcome is None else outcome.error,
                    plain if outcome is None else outcome.attempts,
                    batch.origin,
                )
            )

    def close(self) -> None:
        """The map has ended."""
        if self._bar is not None:
            self._bar.close()
