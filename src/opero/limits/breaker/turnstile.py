# this_file: src/opero/limits/breaker/turnstile.py
"""The way into a circuit: permits out, outcomes in, under a lock and by the clock.

The success of a call in a closed circuit without failures costs two attribute reads and no lock:
all calls of a closed period share one `Permit`, which says itself whether a success has to be told.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from threading import RLock
from typing import TYPE_CHECKING, NoReturn
from weakref import WeakSet

from opero.errors import CircuitOpenError
from opero.events import CircuitChanged
from opero.limits.breaker.machine import CircuitState, Machine
from opero.limits.breaker.news import Listener, News
from opero.limits.breaker.permit import FREE, Permit
from opero.utils import ambient

if TYPE_CHECKING:
    from opero.limits.breaker.machine import Change
    from opero.limits.breaker.rules import Rules

__all__ = ["Turnstile"]


class Turnstile:
    """One machine with its lock: who gets a permit, what becomes of it, and who hears of changes.

    `CircuitBreaker` is one, so that `standing` is an attribute of what callers hold.

    Args:
        name: Shown in errors and events; without one, the name of the first function it guards.
        rules: The options.

    Attributes:
        rules: As given.

    Example:
        >>> from opero.limits.breaker.rules import Rules
        >>> turnstile = Turnstile("geocoder", Rules(fail_max=1))
        >>> turnstile.acquire() is turnstile.standing
        True
        >>> turnstile.acquire().failure(ConnectionError())
        >>> turnstile.standing is None
        True
    """

    standing: Permit | None
    """The permit that everybody gets at present without asking further; None if it takes more."""

    def __init__(self, name: str | None, rules: Rules) -> None:
        self.rules = rules
        self._name = name
        self._functions: tuple[str, ...] = ()
        self._machine = Machine(rules)
        self._refused = 0
        self._news = News(self._machine.changes)
        self.standing = None
        self._start()
        _alive.add(self)

    def _start(self) -> None:
        """Make locks and forget probes: after a fork, who held them is in another process."""
        # Reentrant, because the garbage collector may end an abandoned coroutine, and its probe,
        # at any allocation, and a signal handler may make a call.
        self._lock = RLock()
        self._news.renew_locks()
        self._machine.probes.clear()
        self._show()

    @property
    def name(self) -> str:
        """Its name; that of the first function it guards if it was given none."""
        return self._name or (self._functions[0] if self._functions else "circuit")

    def guard(self, function: str) -> None:
        """Remember a function that it guards, for its name and its events."""
        with self._lock:
            if function not in self._functions:
                self._functions += (function,)

    # --- calls ----------------------------------------------------------------------------------

    def acquire(self) -> Permit:
        """Return leave to make a call.

        Returns:
            A permit whose `success(result)`, `failure(error)` or `release()` is due at the end; or
            use it as a context manager.

        Raises:
            CircuitOpenError: The circuit lets no call through at present.
        """
        return self.standing or self._probe()

    def check(self) -> None:
        """Raise as `acquire` would now, but take no permit.

        Raises:
            CircuitOpenError: The circuit lets no call through at present.
        """
        wait = self.refuses()
        if wait is not None:
            self._refuse(wait)

    def refuses(self) -> float | None:
        """Tell whether a call would be refused now.

        Returns:
            None if it would not, else the seconds until one may be let through; infinity if that
            takes a hand.
        """
        if self.standing is not None:
            return None
        with self._lock:
            wait = self._machine.wait(ambient.clock().monotonic())
            self._show()
        self._tell()
        return wait

    def _probe(self) -> Permit:
        permit = None
        with self._lock:
            now = ambient.clock().monotonic()
            wait = self._machine.wait(now)
            self._show()
            if wait is None:
                permit = self.standing
                if permit is None:
                    permit = self._permit(probe=True)
                    self._machine.probes[permit] = now
        self._tell()
        return self._refuse(wait or 0.0) if permit is None else permit

    def _refuse(self, wait: float) -> NoReturn:
        with self._lock:
            self._refused += 1
        raise CircuitOpenError(self.name, wait if math.isfinite(wait) else None)

    def _permit(self, *, probe: bool) -> Permit:
        generation = self._machine.generation
        return Permit(self.rules, self._report, generation=generation, probe=probe)

    def _report(self, permit: Permit, failed: bool | None) -> None:
        """Take the outcome of a call; None if it has none."""
        with self._lock:
            if permit is self.standing and failed is False:
                # Nothing moves but the count: the success path of a window.
                tally = self._machine.tally
                tally.succeeded(ambient.clock().monotonic() if tally.timed else 0.0)
                self._mark(permit)
                return
            if permit.probe:
                if permit.spent:
                    return
                permit.spent = True
                self._machine.probes.pop(permit, None)
            if failed is not None:
                step = self._machine.failed if failed else self._machine.succeeded
                step(permit.generation, ambient.clock().monotonic())
                self._show()
        self._tell()

    def _show(self) -> None:
        """Hang out what the lock-free path reads."""
        machine, standing = self._machine, self.standing
        if machine.state is CircuitState.CLOSED:
            if standing is None or standing.generation != machine.generation:
                standing = self._permit(probe=False)
            self._mark(standing)
            self.standing = standing
        else:
            self.standing = FREE if machine.state is CircuitState.DISABLED else None

    def _mark(self, standing: Permit) -> None:
        steady = self._machine.tally.steady
        standing.steady = steady
        standing.silent = steady and self.rules.counts_result is None

    def _step(self, step: Callable[[Machine], object]) -> None:
        with self._lock:
            step(self._machine)
            self._show()
        self._tell()

    # --- changes --------------------------------------------------------------------------------

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with each change of state from now on, in order, outside all locks.

        The default event bus gets the same events. Equal listeners are called once.

        Args:
            listener: Called in the thread that made the change, or in one that made another change
                just before.

        Returns:
            A function that ends it.
        """
        return self._news.subscribe(listener)

    def _tell(self) -> None:
        self._news.tell(self._event)

    def _event(self, change: Change) -> CircuitChanged:
        return CircuitChanged(
            function=self._functions[0] if len(self._functions) == 1 else self.name,
            circuit=self.name,
            old_state=change.old,
            new_state=change.new,
            retry_after=change.retry_after,
        )


_alive: WeakSet[Turnstile] = WeakSet()


def _after_fork() -> None:
    """Replace locks that another thread may have held, and forget its probes."""
    for turnstile in list(_alive):
        turnstile._start()  # noqa: SLF001 - a matter of this module


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
