# this_file: src/opero/limits/thread_line.py
"""A line of threads: first come, first served, and only the first one looks at the clock."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

__all__ = ["ThreadLine", "Ticket"]

_LOST_WAKE_UP = 1.0
"""Seconds after which a thread checks for itself whether it has come to the front."""
_SHORTEST = 0.0005


class Ticket:
    """A thread's place in a line."""

    __slots__ = ("gate",)

    def __init__(self) -> None:
        self.gate = threading.Lock()
        self.gate.acquire()


class ThreadLine:
    """Threads that wait for the same thing, in order of arrival.

    A bare lock would be simpler, but it lets a thread that comes back at once overtake those that
    are just waking up.

    `leave` must follow every `enter`, also one that was interrupted, and does nothing for a ticket
    that never got into the line: a `KeyboardInterrupt` can come between any two steps.

    Attributes:
        tickets: Who stands in line; the first is being served.
    """

    __slots__ = ("_mutex", "tickets")

    def __init__(self) -> None:
        self.tickets: deque[Ticket] = deque()
        self._mutex = threading.Lock()

    def enter(self, ticket: Ticket, look_up: Callable[[], float] | None = None) -> bool:
        """Get in line and come back at the front of it; tell whether somebody else was before.

        Args:
            ticket: The place.
            look_up: Called before each pause; raises to leave, or returns the seconds after which
                it wants to be called again.
        """
        with self._mutex:
            self.tickets.append(ticket)
        queued = False
        while self.tickets[0] is not ticket:
            queued = True
            patience = _LOST_WAKE_UP if look_up is None else look_up()
            # Never 0: a clock that stands still would be looked at without a break.
            ticket.gate.acquire(timeout=min(_LOST_WAKE_UP, max(patience, _SHORTEST)))
        return queued

    def leave(self, ticket: Ticket) -> None:
        """Leave the line, wherever in it the ticket is, and call up the next."""
        with self._mutex:
            if ticket not in self.tickets:
                return
            first = self.tickets[0] is ticket
            self.tickets.remove(ticket)
            if first and self.tickets:
                self.tickets[0].gate.release()
