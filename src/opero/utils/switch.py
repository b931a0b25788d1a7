# this_file: src/opero/utils/switch.py
"""One flag that tells every decorated function to leave its express lane."""

from __future__ import annotations

import threading
from typing import Final

__all__ = ["Switch", "switch"]


class Switch:
    """A counted flag: on while at least one holder wants it on.

    The express lane of a decorated function reads `switch.on` once per call. Everything that can
    change how calls run from the outside (listeners, the test switch, a fake clock, an ambient
    deadline) holds the switch while it is active, so that a process in which none of them is used
    pays for none of them.

    Example:
        >>> s = Switch()
        >>> s.hold(); s.on
        True
        >>> s.release(); s.on
        False
    """

    __slots__ = ("_holders", "_lock", "on")

    def __init__(self) -> None:
        self.on: bool = False
        self._holders = 0
        # Reentrant, because the garbage collector may end an abandoned coroutine, and its deadline, anywhere.
        self._lock = threading.RLock()

    def hold(self) -> None:
        """Turn the flag on until the matching `release`."""
        lock = self._lock
        lock.acquire()  # half the cost of `with`, and every call with a deadline comes along here
        try:
            self._holders += 1
            self.on = True
        finally:
            lock.release()

    def release(self) -> None:
        """Undo one `hold`; the flag goes off with the last one."""
        lock = self._lock
        lock.acquire()
        try:
            self._holders -= 1
            self.on = self._holders > 0
        finally:
            lock.release()

    def __repr__(self) -> str:
        return f"<Switch {'on' if self.on else 'off'}, {self._holders} holders>"


switch: Final = Switch()
