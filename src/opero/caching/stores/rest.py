# this_file: src/opero/caching/stores/rest.py
"""Leaving a server alone that does not answer, so that a dead one costs nobody more than a moment."""

from __future__ import annotations

from typing import Final

from opero.caching.stores.protocol import StoreError
from opero.utils import ambient

__all__ = ["Rest", "pause_after"]

_SHORTEST: Final = 1.0
_LONGEST: Final = 15.0


def pause_after(failures: int) -> float:
    """Return for how many seconds a server is left alone after so many failures in a row.

    Example:
        >>> [pause_after(failures) for failures in (1, 2, 3, 50)]
        [1.0, 2.0, 4.0, 15.0]
    """
    return min(_SHORTEST * 2.0 ** min(failures - 1, 10), _LONGEST)


class Rest:
    """The pauses of one server.

    While a pause lasts, callers are refused at once. When it is over, one of them tries; the others
    are refused until that has an outcome, or as long as the pause would be. No lock: two that try
    at the same moment do no harm.

    Attributes:
        failures: Failures in a row, 0 for a server that answers.

    Example:
        >>> rest = Rest()
        >>> rest.failed("it is down")
        >>> rest.failures
        1
        >>> rest.over()
        >>> rest.check()
    """

    def __init__(self) -> None:
        self.failures = 0
        self._until = 0.0
        self._why = ""

    def check(self) -> None:
        """Let the caller try.

        Raises:
            StoreError: The server is being left alone; the message says what it died of.
        """
        if not self.failures:
            return
        now = ambient.clock().monotonic()
        if now < self._until:
            raise StoreError(self._why)
        self._until = now + pause_after(self.failures)

    def failed(self, why: str) -> None:
        """Begin a pause."""
        self.failures += 1
        self._why = why
        self._until = ambient.clock().monotonic() + pause_after(self.failures)

    def over(self) -> None:
        """Let everybody through again: the server has answered."""
        self.failures = 0
