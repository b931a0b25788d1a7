# this_file: src/opero/utils/switch.py
"""One flag that tells every decorated function to leave its express lane."""

from __future__ import annotations

from typing import Final

__all__ = ["Switch", "switch"]


class Switch:
    """A counted flag: on while at least one holder wants it on.

    The express lane of a decorated function reads `switch.on` once per call. Everything that can
    change how calls run from the outside (listeners, the test switch, a fake clock, an ambient
    deadline) holds the switch while it is active, so that a process in which none of them is used
    pays for none of them.

    Attributes:
        on: True while anybody holds it, as an `if` sees it: a list with an item for each holder,
            because a list grows and shrinks by single steps of C, which need no lock.

    Example:
        >>> s = Switch()
        >>> s.hold(); bool(s.on)
        True
        >>> s.release(); bool(s.on)
        False
    """

    __slots__ = ("on",)

    def __init__(self) -> None:
        self.on: Final[list[None]] = []

    def hold(self) -> None:
        """Turn the flag on until the matching `release`."""
        self.on.append(None)

    def release(self) -> None:
        """Undo one `hold`; the flag goes off with the last one."""
        self.on.pop()

    def __repr__(self) -> str:
        return f"<Switch {'on' if self.on else 'off'}, {len(self.on)} holders>"


switch: Final = Switch()
