# this_file: src/opero/limits/slotted.py
"""What has a slot: it lies in memory at first, and in a file as soon as other processes use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opero.limits.pace import SECOND
from opero.limits.shareable import Shareable
from opero.limits.slot import LocalSlot
from opero.utils import ambient

if TYPE_CHECKING:
    from opero.limits.pace import Rule
    from opero.limits.slot import Slot
    from opero.utils.ambient import Clock

__all__ = ["Slotted"]


class Slotted(Shareable):
    """An object with a slot.

    Args:
        rule: The slot's rule.
        name: Name under which the slot is kept for all programs of the user; None without.
        made_from: Arguments that make such an object.
    """

    name: str | None
    _slot: Slot
    take_slot: Callable[[], int]

    def __init__(self, rule: Rule, name: str | None, made_from: tuple[Any, dict[str, Any]]) -> None:
        self.name = name
        self._rule = rule
        self._test: tuple[Clock, Slot] | None = None
        self._put(LocalSlot(rule))
        super().__init__(made_from)
        if name is not None:
            self.share()

    def _put(self, slot: Slot) -> None:
        self._slot = slot
        self.take_slot = slot.take

    def current_slot(self) -> Slot:
        """Return the slot under the clock in force; a test's clock never touches the real one."""
        clock = ambient.clock()
        if isinstance(clock, ambient.RealClock):
            return self._slot
        test = self._test
        if test is None or test[0] is not clock:
            test = self._test = (clock, LocalSlot(self._rule, _nanoseconds_of(clock)))
        return test[1]

    def _go_to(self, path: str | None, *, create: bool) -> str:
        from opero.limits.shared_file import private_path
        from opero.limits.shared_slot import open_slot, state_path

        create = create or path is None or self.name is not None
        if path is None:
            path = private_path(self) if self.name is None else state_path(self.name)
        target = path

        def succeed(words: list[int]) -> None:
            self._put(open_slot(target, self._rule, create=create, words=words))

        if isinstance(self._slot, LocalSlot):
            paused = self._slot.paused()
            self._slot.retire(succeed)
            if paused:
                self._slot.pause(paused)
        else:
            succeed(self._rule.words())
        return target

    def _after_fork(self) -> None:
        super()._after_fork()
        self._slot.after_fork()


def _nanoseconds_of(clock: Clock) -> Callable[[], int]:
    # Counted from here: large floats are too coarse to hit the same nanosecond from two sides.
    zero = clock.monotonic()
    return lambda: round((clock.monotonic() - zero) * SECOND)
