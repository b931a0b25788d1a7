# this_file: src/opero/limits/slot.py
"""The slot clock: a rule's words in memory, each decision made under a lock.

No slot is ever promised for later: a caller that must wait looks again when it wakes, so that a
thread or an event loop that was held up cannot release at once what it has missed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

from opero.limits.hold import HOLD_WORDS, Hold
from opero.limits.pace import NEVER, Rule, Saved, Words

T = TypeVar("T")

__all__ = ["LocalSlot", "Mark", "Slot", "hold_back", "let_go", "undo"]


class Mark(NamedTuple):
    """What is needed to give a slot back.

    Attributes:
        before: The words as they were before the slot was taken.
        after: What the next `take` would have changed just after; something else there now means
            that another call has started since.
    """

    before: Saved
    after: Saved


def undo(rule: Rule, words: Words, mark: Mark) -> bool:
    """Restore the words of a mark, if nothing has started since."""
    if rule.save(words) != mark.after:
        return False
    for place, word in mark.before:
        words[place] = word
    return True


def hold_back(rule: Rule, words: Words, hold: Hold, now: int, length: int) -> bool:
    """Begin a pause, or make it longer; False if it already lasts that long."""
    until = now + min(length, NEVER // 4)
    if hold.left(now) >= until - now:
        return False
    return hold.begin(until, rule.brake(words, until, length))


def let_go(rule: Rule, words: Words, hold: Hold, now: int) -> None:
    """End a pause early."""
    if hold.on:
        rule.release(words, now)
        hold.end()


class Slot(Protocol):
    """The state of one limit, safe to use from all threads."""

    def take(self) -> int:
        """Start a call and return 0, or return the nanoseconds to wait."""
        ...

    def take_marked(self) -> tuple[int, Mark]:
        """Do the same, and return what `give_back` needs."""
        ...

    def give_back(self, mark: Mark) -> bool:
        """Make it as if a `take_marked` had never been; False if another call has started since."""
        ...

    def decide(self, decision: Callable[[Words, int], int]) -> int:
        """Start a call if a decision about the words says so; return 0 or the wait."""
        ...

    def change(self, change: Callable[[Words, int], T]) -> T:
        """Do something with the words while nobody else does, and return what came out."""
        ...

    def look(self) -> int:
        """Return the nanoseconds that the next call would have to wait."""
        ...

    def pause(self, length: int) -> bool:
        """Let nothing start for so many nanoseconds; False if a pause already lasts that long."""
        ...

    def resume(self) -> None:
        """End a pause now."""
        ...

    def paused(self) -> int:
        """Return the nanoseconds that are left of a pause."""
        ...

    def after_fork(self) -> None:
        """Become usable in a forked child, whatever the parent's other threads were doing."""
        ...


class LocalSlot:
    """The state of one limit in the memory of this process."""

    __slots__ = ("_hold", "_lock", "_now", "_rule", "_take", "_words")

    def __init__(self, rule: Rule, now: Callable[[], int] = time.monotonic_ns) -> None:
        self._rule = rule
        self._now = now
        self._words: list[int] = rule.words()
        self._hold = Hold([0] * HOLD_WORDS)
        # Without a pause nobody pays for the possibility of one.
        self._take: Callable[[Words, int], int] = rule.take
        self._lock = threading.Lock()

    def take(self) -> int:
        """Start a call and return 0, or return the nanoseconds to wait."""
        with self._lock:
            return self._take(self._words, self._now())

    def _take_held(self, words: Words, now: int) -> int:
        hold = self._hold
        wait = hold.wait(now) or self._rule.take(words, now)
        if not wait:
            hold.started(now)
            if not hold.on:
                self._take = self._rule.take
        return wait

    def take_marked(self) -> tuple[int, Mark]:
        """Do the same, and return what `give_back` needs."""
        with self._lock:
            before = self._rule.save(self._words)
            wait = self._take(self._words, self._now())
            return wait, Mark(before, self._rule.save(self._words))

    def decide(self, decision: Callable[[Words, int], int]) -> int:
        """Start a call if a decision about the words says so; return 0 or the wait."""
        with self._lock:
            now = self._now()
            wait = self._hold.wait(now) or decision(self._words, now)
            if not wait and self._hold.on:
                self._hold.started(now)
            return wait

    def change(self, change: Callable[[Words, int], T]) -> T:
        """Do something with the words while nobody else does, and return what came out."""
        with self._lock:
            return change(self._words, self._now())

    def give_back(self, mark: Mark) -> bool:
        """Make it as if a `take_marked` had never been; False if another call has started since."""
        with self._lock:
            return undo(self._rule, self._words, mark)

    def look(self) -> int:
        """Return the nanoseconds that the next call would have to wait."""
        with self._lock:
            now = self._now()
            return max(self._hold.wait(now), self._rule.look(self._words, now))

    def pause(self, length: int) -> bool:
        """Let nothing start for so many nanoseconds; False if a pause already lasts that long."""
        with self._lock:
            begun = hold_back(self._rule, self._words, self._hold, self._now(), length)
            if begun:
                self._take = self._take_held
            return begun

    def resume(self) -> None:
        """End a pause now."""
        with self._lock:
            let_go(self._rule, self._words, self._hold, self._now())
            self._take = self._rule.take

    def paused(self) -> int:
        """Return the nanoseconds that are left of a pause."""
        with self._lock:
            return self._hold.left(self._now())

    def after_fork(self) -> None:
        """Leave a lock behind that a thread of the parent may have held."""
        self._lock = threading.Lock()

    def retire(self, succeed: Callable[[list[int]], None]) -> None:
        """Hand the words to `succeed` and refuse every call from then on.

        Who still holds this slot finds no room here and must look where the new one is.
        """
        with self._lock:
            succeed(list(self._words))
            self._words[0] = NEVER
