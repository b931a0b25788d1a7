# this_file: src/opero/limits/breaker/registry.py
"""Where the breakers of a process are met again: by name, or by the token in a pickle."""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import RLock
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

if TYPE_CHECKING:
    from opero.limits.breaker.shared import CircuitBreaker

__all__ = ["Registry", "Ticket", "registry"]


class Ticket(NamedTuple):
    """What a pickle says of a breaker, so that it is met again.

    Attributes:
        token: What tells it from all others, in all processes.
        name: Its name.
        registered: Whether it is the one of its name in the process.
    """

    token: str
    name: str
    registered: bool


class Registry:
    """Breakers that are met again. Those with a registered name stay, others while they are used.

    Example:
        >>> from opero.limits.breaker import CircuitBreaker
        >>> breakers, maps = Registry(), CircuitBreaker("maps")
        >>> breakers.named("maps", maps) is breakers.named("maps", CircuitBreaker("maps")) is maps
        True
        >>> breakers.meet(breakers.ticket(maps), CircuitBreaker) is maps
        True
    """

    def __init__(self) -> None:
        self._named: dict[str, CircuitBreaker] = {}
        self._pickled: WeakValueDictionary[str, CircuitBreaker] = WeakValueDictionary()
        self._tokens: WeakKeyDictionary[CircuitBreaker, str] = WeakKeyDictionary()
        self.renew_lock()

    def renew_lock(self) -> None:
        """Make a new lock: after a fork, who held it is in another process."""
        self._lock = RLock()

    def named(self, name: str, new: CircuitBreaker) -> CircuitBreaker:
        """Return the one breaker of this name; the new one if there is none yet."""
        with self._lock:
            return self._named.setdefault(name, new)

    def ticket(self, breaker: CircuitBreaker) -> Ticket:
        """Return what `meet` finds the breaker by."""
        with self._lock:
            token = self._tokens.get(breaker) or os.urandom(8).hex()
            self._remember(token, breaker)
            registered = self._named.get(breaker.name) is breaker
            return Ticket(token, breaker.name, registered)

    def meet(self, ticket: Ticket, make: Callable[[], CircuitBreaker]) -> CircuitBreaker:
        """Return the breaker of a ticket.

        Args:
            ticket: From this process or another one.
            make: Makes its counterpart, which goes on as the same breaker, if there is none yet.
        """
        with self._lock:
            if ticket.registered:
                if ticket.name not in self._named:
                    self._named[ticket.name] = make()
                return self._named[ticket.name]
            found = self._pickled.get(ticket.token)
            if found is None:
                found = make()
                self._remember(ticket.token, found)
            return found

    def _remember(self, token: str, breaker: CircuitBreaker) -> None:
        self._pickled[token] = breaker
        self._tokens[breaker] = token

    def __repr__(self) -> str:
        return f"<Registry of {len(self._named)} named breakers>"


registry = Registry()
"""That of this process."""


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=registry.renew_lock)
