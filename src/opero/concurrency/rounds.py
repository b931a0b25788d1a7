# this_file: src/opero/concurrency/rounds.py
"""Looks at the sheets of workers that share a process with the map, so that no slow item holds back its neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import monotonic
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from opero.concurrency.executors.base import Chunk
    from opero.concurrency.sheet import Sheet

__all__ = ["LOOK", "Rounds"]

LOOK: Final = 0.03
"""Seconds between two looks at a chunk that is under way."""

_ALONE: Final[AbstractContextManager[object]] = nullcontext()


class Rounds:
    """The sheets under way. Workers begin and end theirs; whoever waits for reports makes the rounds."""

    def __init__(self) -> None:
        self._coming: set[int] = set()
        self._sheets: dict[int, Sheet] = {}
        self._due = 0.0

    def expect(self, chunk: Chunk) -> None:
        """Note that a chunk is handed over, so that nobody waits for ever before its worker has begun it."""
        if len(chunk) > 1:
            self._coming.add(chunk.id)

    def over(self, sheet: Sheet) -> AbstractContextManager[object]:
        """Let a sheet be looked at while its chunk is under way."""
        if sheet.number not in self._coming:
            # Of a single item, whose neighbours nobody waits for.
            return _ALONE
        return self._over(sheet)

    @contextmanager
    def _over(self, sheet: Sheet) -> Iterator[None]:
        self._sheets[sheet.number] = sheet
        self._coming.discard(sheet.number)
        try:
            yield
        finally:
            self._sheets.pop(sheet.number, None)

    def wait(self, timeout: float | None) -> float | None:
        """Return how long to wait for reports, at most `timeout` seconds, before the next round."""
        if not (self._coming or self._sheets):
            return timeout
        return LOOK if timeout is None else min(timeout, LOOK)

    def make(self) -> None:
        """Look at all sheets, if it is time for that."""
        if not self._sheets or (now := monotonic()) < self._due:
            return
        self._due = now + LOOK
        # A copy, because workers come and go meanwhile.
        for sheet in list(self._sheets.values()):
            if not sheet.look():
                self._sheets.pop(sheet.number, None)
