# this_file: src/opero/limits/hold.py
"""A pause that a service asked for: until when nobody starts, and how calls come out of it, pure.

Times are nanoseconds of the clock that the limit goes by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from opero.limits.pace import Words

__all__ = ["HOLD_WORDS", "Hold"]

_NEXT, _UNTIL, _GAP = 0, 1, 2
HOLD_WORDS: Final = 3
"""Words that a hold needs; all zero while there is none."""

_DRAINED: Final = 50_000_000
"""A slot that stood open for so long (and for a gap) has nobody waiting for it any more."""


class Hold:
    """The memory of a pause in three words, which may lie in a file that several processes map.

    After the pause calls start `gap` apart until nobody waits for one any more, so that those who
    have waited it out do not all arrive at once. A gap of 0 leaves that to the rule.

    Word 0, the time before which nothing starts, is stored first and cleared last: who is killed in
    between leaves a pause, never a half one.
    """

    __slots__ = ("_words",)

    def __init__(self, words: Words) -> None:
        self._words = words

    @property
    def on(self) -> bool:
        """Whether there is a pause, or one that calls are still coming out of."""
        return self._words[_NEXT] != 0

    def left(self, now: int) -> int:
        """Return how much is left of the pause itself."""
        return max(0, self._words[_UNTIL] - now) if self.on else 0

    def wait(self, now: int) -> int:
        """Return how long the next call has to wait for the pause or for the one before it."""
        return max(0, self._words[_NEXT] - now) if self.on else 0

    def begin(self, until: int, gap: int) -> bool:
        """Pause until a time; False, without effect, if the pause already lasts that long."""
        words = self._words
        if self.on and words[_UNTIL] >= until:
            return False
        words[_NEXT] = max(words[_NEXT], until) if self.on else until
        words[_UNTIL] = until
        words[_GAP] = gap
        return True

    def started(self, now: int) -> None:
        """Take note of a call that started after the pause."""
        words = self._words
        gap = words[_GAP]
        if not gap or now - words[_NEXT] > max(gap, _DRAINED):
            self.end()
        else:
            words[_NEXT] = now + gap

    def end(self) -> None:
        """Forget the pause."""
        for place in (_GAP, _UNTIL, _NEXT):
            self._words[place] = 0

    def move(self, by: int) -> None:
        """Carry the times over to another clock."""
        if self.on:
            for place in (_NEXT, _UNTIL):
                # Never 0, which would mean that there is no pause.
                self._words[place] = self._words[place] + by or 1
