# this_file: src/opero/core/retry_budget.py
"""Retry budget: retries may be only so large a share of the calls, of all functions together.

When a service is down, every caller's retries multiply the load that it is to recover under. A
budget stops that where counting attempts of single calls cannot.
"""

from __future__ import annotations

from typing import Final

from opero.limits.shared import SharedCells
from opero.limits.windows import StepWindow, new_cells
from opero.utils import ambient
from opero.utils.checks import is_number, must_be, text, whole
from opero.utils.units import Duration, format_seconds, parse_length

_STEPS: Final = 10
_ratio: Final = must_be(
    "a number, 0 or more: 0.1 is one retry for ten calls",
    lambda value: is_number(value) and 0 <= value <= 1000,
)


class RetryBudget(SharedCells):
    """Retries that are left, as a share of the calls in a sliding window plus a fixed number.

    In any window `retries <= minimum + ratio · calls`. The idea is that of Finagle's `RetryBudget`
    (deposits by requests, withdrawals by retries, a reserve for clients with little traffic, 20 %
    and 10 per second there) and of Envoy's retry budgets; gRPC's retry throttling (proposal A6) is
    a token count of failures instead. Time is forgotten in steps of a tenth of the window.

    Any number of functions, threads and event loops may share one, and so do the worker processes of
    a map, and those that it is pickled to. A child that is forked without `share()` before begins
    anew. Steps to another fallback value are no retries.

    Args:
        ratio: Share of retries in calls; 0.1 is one retry for ten calls.
        minimum: Retries per window that are free, however few calls there are.
        window: Length of the window, as a duration.
        name: Shown in notes and events.

    Raises:
        OperoUsageError: A value cannot work.

    Example:
        >>> budget = RetryBudget(ratio=0.5, minimum=0)
        >>> for _ in range(4):
        ...     budget.deposit()
        >>> [budget.withdraw() for _ in range(3)]
        [True, True, False]
        >>> budget
        <RetryBudget 'retry budget': 2 retries for 4 calls in 10 s, 0 left>
    """

    kind = "rb"

    def __init__(
        self,
        ratio: float = 0.1,
        minimum: int = 10,
        window: Duration = 10,
        *,
        name: str = "retry budget",
    ) -> None:
        _ratio("ratio", ratio)
        whole(0)("minimum", minimum)
        text("name", name)
        self.ratio: float = ratio
        self.minimum: int = minimum
        self.window: float = parse_length(window, "window")
        self.name: str = name
        self._steps = StepWindow(self.window, _STEPS)
        shape = {"minimum": minimum, "window": self.window}
        super().__init__((ratio, shape), new_cells(self._steps.size))

    def begin(self) -> None:
        """Begin anew, as if nothing had been called."""
        empty = new_cells(self._steps.size)
        self._exclusively(lambda: self._cells.__setitem__(slice(None), empty))

    def _sums(self) -> tuple[int, int]:
        """Return the calls and the retries in the window."""
        return self._exclusively(lambda: self._steps.sums(self._cells, ambient.clock().monotonic()))

    def _left(self, calls: int, retries: int) -> int:
        # A hair more, because 0.1 of thirty is three.
        return max(0, int(self.minimum + self.ratio * calls - retries + 1e-9))

    # --- verbs ----------------------------------------------------------------------------------------

    def deposit(self) -> None:
        """Count a call; its retries are not counted here."""
        self._exclusively(lambda: self._steps.add(self._cells, ambient.clock().monotonic(), 1, 0))

    def withdraw(self) -> bool:
        """Count a retry; False, and nothing is counted, if there is none left."""

        def take() -> bool:
            now = ambient.clock().monotonic()
            some = self._left(*self._steps.sums(self._cells, now)) > 0
            if some:
                self._steps.add(self._cells, now, 0, 1)
            return some

        return self._exclusively(take)

    # --- what is seen -------------------------------------------------------------------------------

    @property
    def calls(self) -> int:
        """Calls in the window."""
        return self._sums()[0]

    @property
    def retries(self) -> int:
        """Retries in the window."""
        return self._sums()[1]

    @property
    def left(self) -> int:
        """Retries that may be made now."""
        return self._left(*self._sums())

    def describe(self) -> str:
        """Return its rule, for `explain()`."""
        return (
            f"{self.minimum} + {self.ratio:.3g} × calls in {format_seconds(self.window)} "
            f"({self.name})"
        )

    def after_fork(self) -> None:
        """Replace locks that another thread may have held, and begin anew if nothing is shared."""
        super().after_fork()
        if self._file is None:
            self._cells = new_cells(self._steps.size)

    def __repr__(self) -> str:
        calls, retries = self._sums()
        return (
            f"<RetryBudget {self.name!r}: {retries} {'retry' if retries == 1 else 'retries'} for "
            f"{calls} call{'s' * (calls != 1)} in {format_seconds(self.window)}, {self.left} left>"
        )
