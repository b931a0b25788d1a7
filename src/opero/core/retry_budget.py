# this_file: src/opero/core/retry_budget.py
"""Retry budget: retries may be only so large a share of the calls, of all functions together.

When a service is down, every caller's retries multiply the load that it is to recover under. A
budget stops that where counting attempts of single calls cannot.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Final

from opero.errors import OperoUsageError
from opero.limits.shared import SharedObject
from opero.utils import ambient
from opero.utils.checks import text, whole
from opero.utils.units import Duration, format_seconds, parse_seconds

if TYPE_CHECKING:
    from opero.limits.state_file import StateFile

__all__ = ["RetryBudget"]

Slice = list[int] | memoryview

_SLICES: Final = 10


class RetryBudget(SharedObject):
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

    def __init__(
        self,
        ratio: float = 0.1,
        minimum: int = 10,
        window: Duration = 10,
        *,
        name: str = "retry budget",
    ) -> None:
        _share("ratio", ratio)
        whole(0)("minimum", minimum)
        text("name", name)
        self.ratio: float = ratio
        self.minimum: int = minimum
        self.window: float = parse_seconds(window, "window")
        if not self.window > 0:
            raise OperoUsageError(f"window={window!r} must be longer than 0.")
        self.name: str = name
        self._width = self.window / _SLICES
        self._file: StateFile | None = None
        self._begin_slices()
        super().__init__((ratio, {"minimum": minimum, "window": self.window}))

    def _begin_slices(self) -> None:
        # Reentrant, because a signal handler may make a call.
        self._lock = threading.RLock()
        # For each slice of time: its number plus one (0: empty), the calls and the retries in it.
        self._slices: list[Slice] = [[0, 0, 0] for _ in range(_SLICES)]

    def begin(self) -> None:
        """Begin anew, as if nothing had been called."""
        with self._counting():
            for each in self._slices:
                each[0] = each[1] = each[2] = 0

    def _slice(self, now: int) -> Slice:
        place = self._slices[now % _SLICES]
        if place[0] != now + 1:
            place[1] = place[2] = 0
            place[0] = now + 1
        return place

    def _now(self) -> int:
        return int(ambient.clock().monotonic() / self._width)

    def _sums(self, now: int) -> tuple[int, int]:
        # An empty slice is none of the recent ones, though the machine has just started and its clock reads next to 0.
        recent = [each for each in self._slices if each[0] and now - _SLICES < each[0] - 1 <= now]
        return sum(each[1] for each in recent), sum(each[2] for each in recent)

    def _left(self, calls: int, retries: int) -> int:
        # A hair more, because 0.1 of thirty is three.
        return max(0, int(self.minimum + self.ratio * calls - retries + 1e-9))

    # --- verbs ----------------------------------------------------------------------------------------

    def deposit(self) -> None:
        """Count a call; its retries are not counted here."""
        with self._counting():
            self._slice(self._now())[1] += 1

    def withdraw(self) -> bool:
        """Count a retry; False, and nothing is counted, if there is none left."""
        with self._counting():
            now = self._now()
            if not self._left(*self._sums(now)):
                return False
            self._slice(now)[2] += 1
            return True

    # --- what is seen -------------------------------------------------------------------------------

    @property
    def calls(self) -> int:
        """Calls in the window."""
        with self._counting():
            return self._sums(self._now())[0]

    @property
    def retries(self) -> int:
        """Retries in the window."""
        with self._counting():
            return self._sums(self._now())[1]

    @property
    def left(self) -> int:
        """Retries that may be made now."""
        with self._counting():
            return self._left(*self._sums(self._now()))

    def describe(self) -> str:
        """Return its rule, for `explain()`."""
        return (
            f"{self.minimum} + {self.ratio:.3g} × calls in {format_seconds(self.window)} "
            f"({self.name})"
        )

    # --- across processes -----------------------------------------------------------------------------

    def _go_to(self, path: str, *, create: bool) -> None:
        from opero.limits.state_file import StateFile

        empty = [0] * 3 * _SLICES
        file = StateFile.open(path, "rb", lambda old, _: old or empty, create=create)
        slices: list[Slice] = [file.cells[start : start + 3] for start in range(0, 3 * _SLICES, 3)]
        with self._lock, file:
            for ours, theirs in zip(self._slices, slices, strict=True):
                if ours[0] >= theirs[0]:
                    more = (0, 0) if ours[0] > theirs[0] else (theirs[1], theirs[2])
                    theirs[1], theirs[2] = ours[1] + more[0], ours[2] + more[1]
                    theirs[0] = ours[0]
            self._file, self._slices = file, slices

    def after_fork(self) -> None:
        """Replace locks that another thread may have held, and begin anew if nothing is shared."""
        super().after_fork()
        if self._file is None:
            self._begin_slices()
        else:
            self._lock = threading.RLock()

    @contextmanager
    def _counting(self) -> Iterator[None]:
        if not self.attached:
            self.attach()
        with self._lock, self._file or nullcontext():
            yield

    def __repr__(self) -> str:
        return (
            f"<RetryBudget {self.name!r}: {_many(self.retries, 'retry', 'retries')} for "
            f"{_many(self.calls, 'call', 'calls')} in "
            f"{format_seconds(self.window)}, {self.left} left>"
        )


def _many(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"


def _share(name: str, value: object) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1000
    if not fits:
        raise OperoUsageError(
            f"{name}={value!r} must be a number, 0 or more: 0.1 is one retry for ten calls."
        )
