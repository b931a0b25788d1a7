# this_file: src/opero/limits/limiter_state.py
"""Keep the state of a rate limit, in the memory of this process or in a file that several share, and reserve its slots.

No slot is ever promised for later: a caller that must wait looks again when it wakes, so that a thread or an event
loop that was held up cannot release at once what it has missed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, TypeVar

from opero.errors import OperoUsageError, SpendCapError
from opero.limits.gcra import NEVER, PAUSE_CELLS, LimitPause, Rule, Stamp
from opero.limits.windows import SPENT, UNIT, CombinedLimit, as_units, part_of
from opero.utils.ambient import switch

if TYPE_CHECKING:
    from opero.limits.state_file import StateFile


T = TypeVar("T")


class TakenSlot(NamedTuple):
    """What is needed to give a slot back.

    Attributes:
        at: When it was taken.
        stamp: What the rule's state said just after; something else there now means that another call has started.
    """

    at: int
    stamp: Stamp


class LimiterState:
    """The state of one limit, safe to use from all threads; `move` puts it into a file that several processes share.

    Args:
        rule: What decides.
        now: The clock, in nanoseconds.

    Attributes:
        rule: As above.
        file: The file; None as long as the state is in the memory of this process.
    """

    __slots__ = ("_lock", "_now", "_pause", "_state", "_take", "file", "rule")

    def __init__(self, rule: Rule, now: Callable[[], int] = time.monotonic_ns) -> None:
        self.rule: Rule = rule
        self.file: StateFile | None = None
        self._now = now
        self._state: Any = rule.new_state()
        self._pause = LimitPause()
        # Without a pause no call pays for the possibility of one.
        self._take: Callable[..., int] = rule.take
        self.after_fork()

    def take(self) -> int:
        """Start a call and return 0, or return the nanoseconds to wait."""
        lock = self._lock
        # Half the cost of `with`, and every call comes along here; within `try`, so that Ctrl-C cannot come in between.
        try:
            lock.acquire()
            if self.file is None:
                return self._take(self._state, self._now(), UNIT)
            return self.file.exclusively(self._take_in_file)
        finally:
            try:  # `suppress` costs as much as the lock
                lock.release()
            except RuntimeError:
                pass  # Ctrl-C, while another thread had it

    def _take_in_file(self) -> int:
        if not (self._pause.on or (self.file and self.file.torn)):
            wait = self.rule.take(self._state, self._now())
            if wait <= self.rule.longest_wait:
                return wait
        return self.take_marked()[0]

    def take_marked(self, units: int = UNIT) -> tuple[int, TakenSlot]:
        """Do what `take` does for a call that costs so much, and return what `give_back` needs too."""
        rule = self.rule
        with self._lock:
            if self.file is None:
                now, state = self._now(), self._state
                return self._take(state, now, units), TakenSlot(now, rule.stamp(state))

        def change(state: Any, pause: LimitPause, now: int) -> tuple[int, TakenSlot]:
            wait = pause.take(rule, state, now, units)
            return wait, TakenSlot(now, rule.stamp(state))

        return self.update(change)

    def _take_paused(self, state: Any, now: int, units: int = UNIT) -> int:
        wait = self._pause.take(self.rule, state, now, units)
        if not self._pause.on:
            self._take = self.rule.take
        return wait

    def update(self, change: Callable[[Any, LimitPause, int], T]) -> T:
        """Do something with the rule's state, the pause and the time while no other caller does.

        Returns:
            What `change` returned.
        """

        def work() -> T:
            rule, state, pause, now = self.rule, self._state, self._pause, self._now()
            if file := self.file:
                damaged = rule.longest_wait < rule.wait_for(state, now) < NEVER
                if file.torn or (damaged and not pause.on):
                    rule.repair(state, now)
            found = change(state, pause, now)
            self._take = self._take_paused if pause.on else rule.take
            return found

        with self._lock:
            return work() if self.file is None else self.file.exclusively(work)

    def move(self, path: str, *, create: bool, named: bool = False) -> Self:
        """Go on in a file.

        Its cells are those of the pause, the number of parts of the rule, their signatures, and their states.

        Args:
            path: The file. If it follows another rule and no process uses it, it is rewritten; what the two rules have
                in common (a cap, a window of cost of the same length, an equal part) still counts.
            create: Whether the file may be new. It begins with the present state.
            named: Whether the file outlives this boot, so that it goes by the wall clock and begins afresh.

        Raises:
            OSError: The file cannot be opened, mapped or locked, or holds something else.
            OperoUsageError: It is in use with another rule.
        """
        from opero.limits.state_file import StateFile

        rule = self.rule
        head = [len(rule.signature) // _OF_PART, *rule.signature]
        place = PAUSE_CELLS + len(head)

        def make(old: list[int] | None, file: StateFile) -> list[int]:
            state = rule.new_state() if named or self.file is not None else self._state
            if isinstance(rule, CombinedLimit):
                state = [number for cells in state for number in cells]
            fresh: list[int] = [0] * PAUSE_CELLS + head + state
            if old is None:
                return fresh
            if old[PAUSE_CELLS:place] == head and len(old) == len(fresh):
                return old
            if not file.only_user:
                raise OperoUsageError(_in_use(path, "another program", old, rule))
            return _inherited(fresh, old)

        with self._lock:
            paused = self._pause.left(self._now())
            file = StateFile.open(path, "li", make, create=create)
            cells = file.cells
            if list(cells[PAUSE_CELLS:place]) != head:
                raise OperoUsageError(_in_use(path, "this program", list(cells), rule))
            self._now = time.time_ns if named else time.monotonic_ns
            self._pause = LimitPause(cells[:PAUSE_CELLS])
            self._state = cells[place:]
            if isinstance(rule, CombinedLimit):
                self._state = [cells[begin:end] for _, begin, end in _parts_of(cells)]
            self.file = file
            if paused:
                self.pause(paused)
        return self

    def after_fork(self) -> None:
        """Drop a lock that a thread of the parent may have held."""
        # Reentrant, because a signal handler may make a call.
        self._lock = threading.RLock()

    def give_back(self, taken: TakenSlot, units: int = 0) -> bool:
        """Give back what a `take_marked` has taken; False if another call has started since, and only its cost came."""
        rule = self.rule

        def change(state: Any, pause: LimitPause, now: int) -> bool:
            if units:
                rule.settle(state, now, taken.at, -units)
            if rule.stamp(state) != taken.stamp:
                return False
            rule.undo(state)
            return True

        return self.update(change)

    def settle(self, taken: TakenSlot, change: int) -> None:
        """Correct what a call has cost."""
        self.update(lambda state, pause, now: self.rule.settle(state, now, taken.at, change))

    def wait_for(self) -> int:
        """Return the nanoseconds that the next call would have to wait."""
        return self.update(
            lambda state, pause, now: max(pause.wait_for(now), self.rule.wait_for(state, now))
        )

    def is_idle(self) -> bool:
        """Return whether nothing is remembered that still counts."""
        return self.update(lambda state, pause, now: self.rule.is_idle(state, now))

    def pause(self, length: int) -> bool:
        """Let nothing start for so many nanoseconds; False if a pause already lasts that long."""
        return self.update(partial(self._begin_pause, length))

    def _begin_pause(self, length: int, state: Any, pause: LimitPause, now: int) -> bool:
        until = now + min(length, NEVER // 4)
        if pause.left(now) >= until - now:
            return False
        return pause.begin(until, self.rule.before_pause(state, until, length))

    def resume(self) -> None:
        """End a pause now."""

        def change(state: Any, pause: LimitPause, now: int) -> None:
            if pause.on:
                self.rule.end_pause(state, now)
                pause.end()

        self.update(change)

    def paused(self) -> int:
        """Return the nanoseconds that are left of a pause."""
        return self.update(lambda state, pause, now: pause.left(now))


# --- slots that may be given back ------------------------------------------------------------------


class Reservation:
    """A slot that was taken and may be given back.

    Args:
        limiter: The limiter that it is of.
        units: Cost in millionths.

    Attributes:
        limiter: As above.
        waited: Seconds that it took to get it.
    """

    __slots__ = ("_taken", "_units", "limiter", "waited")

    def __init__(self, limiter: Any, units: int = UNIT) -> None:
        self.limiter: Any = limiter
        self.waited: float = 0.0
        self._units = units
        self._taken: TakenSlot | None = None

    @property
    def cost(self) -> float:
        """What counts for it now: the reserved cost, or the settled one."""
        return self._units / UNIT

    def take(self) -> int:
        """Try to take the slot; return 0, or the nanoseconds to wait.

        Raises:
            SpendCapError: The cap has no room for it.
        """
        limiter = self.limiter
        state = None if switch.on else limiter.state
        wait, taken = (state or limiter.current_state()).take_marked(self._units)
        if not wait:
            self._taken = taken
        elif wait == SPENT:
            raise SpendCapError(self.cost, limiter.spent, limiter.cap)
        return int(wait)

    def refund(self) -> bool:
        """Give the slot back, because the call was not made after all.

        What it costs is given back in any case.

        Returns:
            True if the limiter is now as if the slot had never been taken. False if another call has started since: to
            count this one out might let one too many into some window.
        """
        taken, self._taken = self._taken, None
        if taken is None:
            return False
        units, self._units = self._units, 0
        return bool(self.limiter.current_state().give_back(taken, units))

    def settle(self, cost: float) -> None:
        """Correct what the call has cost: the difference is given back, or becomes a debt.

        That is final: a slot that was settled or given back stays so.

        Args:
            cost: The real cost.

        Raises:
            OperoUsageError: It is no number of 0 or more, or the limiter counts calls.

        Example:
            >>> from opero import RateLimiter
            >>> limiter = RateLimiter("1000 tokens/minute")
            >>> reservation = limiter.reserve(cost=900)
            >>> limiter.try_acquire(cost=900)
            False
            >>> reservation.settle(100)
            >>> limiter.try_acquire(cost=900)
            True
        """
        self.limiter.check_cost(cost)
        units = as_units(cost, "cost")
        taken, self._taken = self._taken, None
        if taken is not None:
            change, self._units = units - self._units, units
            self.limiter.current_state().settle(taken, change)

    def __repr__(self) -> str:
        return f"<Reservation after {self.waited:.3f} s>"


# --- its parts in a file ---------------------------------------------------------------------------

_COUNT: Final = PAUSE_CELLS
_PARTS: Final = PAUSE_CELLS + 1
_OF_PART: Final = 4


def _parts_of(cells: Any) -> list[tuple[tuple[int, ...], int, int]]:
    """Return the signatures of the parts in a file, and where their states begin and end."""
    found = []
    begin = _PARTS + _OF_PART * cells[_COUNT]
    for place in range(_PARTS, begin, _OF_PART):
        signature = tuple(cells[place : place + _OF_PART])
        part = part_of(signature)
        end = begin + (0 if part is None else len(part.new_state()))
        found.append((signature, begin, end))
        begin = end
    return found


def _in_use(path: str, by: str, cells: list[int], rule: Rule) -> str:
    there = " and ".join(str(part_of(signature)) for signature, _, _ in _parts_of(cells))
    return (
        f"{path} is in use by {by}, with {there} and not {rule}: "
        "give both limiters the same rate, or different names."
    )


def _inherited(fresh: list[int], old: list[int]) -> list[int]:
    """Return the cells of a new rule with what an old one, whose cells these are, has in common with it."""
    known = {_content(signature): old[begin:end] for signature, begin, end in _parts_of(old)}
    found = list(fresh)
    for signature, begin, end in _parts_of(fresh):
        there = known.get(_content(signature), [])
        if len(there) == end - begin:
            found[begin:end] = there
    return found


def _content(signature: tuple[int, ...]) -> tuple[int, ...]:
    """Return what is equal for parts whose states mean the same."""
    kind, first, *_ = signature
    return {4: (kind, first), 5: (kind,)}.get(kind, signature)
