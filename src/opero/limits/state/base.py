# this_file: src/opero/limits/state/base.py
"""Define what every state of a limiter can do, wherever it lies.

No slot is ever promised for later: a caller that must wait looks again when it wakes, so that a thread or an event
loop that was held up cannot release at once what it has missed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from opero.limits.gcra import NEVER, LimitPause, Rule, Snapshot

__all__ = ["LimiterState", "TakenSlot", "unless_paused"]

T = TypeVar("T")


class TakenSlot(NamedTuple):
    """What is needed to give a slot back.

    Attributes:
        before: What the `take` has changed, as it was before.
        after: What the next `take` would have changed just after; something else there now means that another call
            has started since.
    """

    before: Snapshot
    after: Snapshot


class LimiterState:
    """The state of one limit, safe to use from all threads.

    A subclass says where it lies: it implements `take`, `update` and `after_fork`.

    Attributes:
        rule: What decides.
    """

    rule: Rule

    def take(self) -> int:
        """Start a call and return 0, or return the nanoseconds to wait."""
        raise NotImplementedError

    def update(self, change: Callable[[Any, LimitPause, int], T]) -> T:
        """Do something with the rule's state, the pause and the time while no other caller does.

        Returns:
            What `change` returned.
        """
        raise NotImplementedError

    def after_fork(self) -> None:
        """Become usable in a forked child, whatever the parent's other threads were doing."""
        raise NotImplementedError

    def take_marked(self) -> tuple[int, TakenSlot]:
        """Do what `take` does, and return what `give_back` needs."""
        rule = self.rule

        def change(state: Any, pause: LimitPause, now: int) -> tuple[int, TakenSlot]:
            before = rule.snapshot(state)
            wait = unless_paused(rule.take, state, pause, now)
            return wait, TakenSlot(before, rule.snapshot(state))

        return self.update(change)

    def decide(self, decision: Callable[[Any, int], int]) -> int:
        """Start a call if a decision about the rule's state says so; return 0 or the wait."""
        return self.update(lambda state, pause, now: unless_paused(decision, state, pause, now))

    def give_back(self, taken: TakenSlot) -> bool:
        """Make it as if a `take_marked` had never been; False if another call has started since."""
        return self.update(lambda state, pause, now: undo(self.rule, state, taken))

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

        def change(state: Any, pause: LimitPause, now: int) -> bool:
            until = now + min(length, NEVER // 4)
            if pause.left(now) >= until - now:
                return False
            return pause.begin(until, self.rule.before_pause(state, until, length))

        return self.update(change)

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


def undo(rule: Rule, state: Any, taken: TakenSlot) -> bool:
    """Restore what a `take` has changed, if nothing has started since."""
    if rule.snapshot(state) != taken.after:
        return False
    rule.restore(state, taken.before)
    return True


def unless_paused(
    decision: Callable[[Any, int], int], state: Any, pause: LimitPause, now: int
) -> int:
    """Start a call if a decision says so and there is no pause; return 0 or the wait."""
    wait = pause.wait_for(now) or decision(state, now)
    if not wait and pause.on:
        pause.started(now)
    return wait
