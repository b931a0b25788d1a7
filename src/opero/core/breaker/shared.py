# this_file: src/opero/core/breaker/shared.py
"""The circuit breaker that users make and share: the machine with a lock, a clock and listeners.

The success of a call in a closed circuit without failures costs two attribute reads and no lock:
all calls of a closed period share one `Permit`, which says itself whether a success has to be told.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable
from threading import RLock
from typing import TYPE_CHECKING, Any, Final, NoReturn
from weakref import WeakSet, WeakValueDictionary

from opero.core import ambient
from opero.core.breaker.machine import CircuitState, CircuitStats, Machine
from opero.core.breaker.news import Listener, News
from opero.core.breaker.permit import FREE, Permit
from opero.core.breaker.rules import Rules
from opero.core.checks import text_or_none
from opero.core.units import format_seconds
from opero.errors import CircuitOpenError, OperoUsageError
from opero.events import CircuitChanged

if TYPE_CHECKING:
    from opero.core.breaker.machine import Change
    from opero.core.options import FailureFilter
    from opero.core.units import Duration

__all__ = ["CircuitBreaker"]

_MOST_PARTS: Final = 1000
"""Fallback values with a breaker of their own; beyond it those without failures are forgotten."""


class CircuitBreaker:
    """Stops calling a service that keeps failing, and lets a probe through now and then.

    One breaker may guard any number of functions, synchronous and asynchronous, in all threads and
    event loops of a process. Worker processes have one each.

    A *closed* circuit lets calls through and counts failures, in a row by default, or as a rate.
    When there are too many it is *open*: calls are refused with `CircuitOpenError` until the open
    time is over. Then it is *half-open*: so many probes at once decide whether it closes or
    opens again, for longer. A call that was admitted in an earlier state counts no more. What is
    cancelled or interrupted counts neither way, and a probe gives its place back.

    Args:
        name: Shown in errors and events; without one, the name of the first function it guards.
        fail_max: Failures in a row that open it, unless `failure_rate` is given. A success starts
            the count afresh.
        failure_rate: Share of failed calls that opens it, more than 0 to 1. Only a failure can.
        window: What the rate is taken of: a whole number of last calls (100 by default), or a time
            ("1m", 60.0, a timedelta), which is forgotten in steps of a twentieth.
        minimum_calls: Calls that the window must hold before the rate means anything; 10, or all of
            a smaller window.
        reset_timeout: How long it stays open.
        backoff: Growth of the open time with every probe that failed.
        max_reset_timeout: Longest open time; ten times `reset_timeout` by default.
        jitter: Share of the open time by which it may be shorter, drawn at random, so that many
            clients do not come back in step; 0 makes it exact.
        half_open_max: Probes at once.
        success_threshold: Successful probes that close it. One failed probe opens it.
        probe_timeout: When a probe that was never heard of again stops holding its place. Should it
            answer after all, while the circuit is still half-open, that counts.
        counts: Errors that are failures: a type, a tuple of types, or a predicate. Others say
            nothing about the service: they are neither failures nor successes. opero's own refusals
            never count.
        ignore: Errors that are none, though `counts` names them.
        counts_result: Predicate on results: True is a failure. What `retry_if_result` refuses is a
            failure only if this says so too.
        on_change: Called with every `CircuitChanged`, as by `subscribe`.
        draw: Random numbers from [0, 1) for the jitter; for tests.

    Raises:
        OperoUsageError: A value or a combination cannot work; the message names the fix.

    Example:
        >>> breaker = CircuitBreaker("geocoder", fail_max=1, jitter=0)
        >>> with breaker.acquire():
        ...     raise ConnectionError("no route")
        Traceback (most recent call last):
        ...
        ConnectionError: no route
        >>> breaker
        <CircuitBreaker 'geocoder' open, again in 30 s>
        >>> breaker.acquire()
        Traceback (most recent call last):
        ...
        opero.errors.CircuitOpenError: circuit 'geocoder' is open: try again in 30 s
    """

    standing: Permit | None
    """The permit that everybody gets at present without asking further; None if it takes more."""

    def __init__(
        self,
        name: str | None = None,
        *,
        fail_max: int = 5,
        failure_rate: float | None = None,
        window: int | Duration | None = None,
        minimum_calls: int | None = None,
        reset_timeout: Duration = 30,
        backoff: float = 2.0,
        max_reset_timeout: Duration | None = None,
        jitter: float = 0.1,
        half_open_max: int = 1,
        success_threshold: int = 1,
        probe_timeout: Duration = 60,
        counts: FailureFilter = Exception,
        ignore: FailureFilter | None = None,
        counts_result: Callable[[Any], object] | None = None,
        on_change: Callable[[CircuitChanged], object] | None = None,
        draw: Callable[[], float] | None = None,
    ) -> None:
        self.rules = Rules(
            fail_max=fail_max,
            failure_rate=failure_rate,
            window=window,
            minimum_calls=minimum_calls,
            reset_timeout=reset_timeout,
            backoff=backoff,
            max_reset_timeout=max_reset_timeout,
            jitter=jitter,
            half_open_max=half_open_max,
            success_threshold=success_threshold,
            probe_timeout=probe_timeout,
            counts=counts,
            ignore=ignore,
            counts_result=counts_result,
            on_change=on_change,
            draw=draw,
        )
        text_or_none("name", name)
        self._name = name
        self._functions: tuple[str, ...] = ()
        self._machine = Machine(self.rules)
        self._refused = 0
        self._parts: dict[Hashable, CircuitBreaker] = {}
        self._news = News(self._machine.changes)
        self._token: str | None = None
        self.standing = None
        self._start()
        if on_change is not None:
            self.subscribe(on_change)
        _alive.add(self)

    def _start(self) -> None:
        """Make locks and forget probes: after a fork, who held them is in another process."""
        # Reentrant, because the garbage collector may end an abandoned coroutine, and its probe,
        # at any allocation, and a signal handler may make a call.
        self._lock = RLock()
        self._news.renew_locks()
        self._machine.probes.clear()
        self._show()

    @classmethod
    def named(cls, name: str, /, **options: Any) -> CircuitBreaker:
        """Return the one breaker of this name in the process; the first to ask makes it.

        Args:
            name: Its name.
            options: As for `CircuitBreaker`. Later callers may leave them out.

        Raises:
            OperoUsageError: It was made with other options.

        Example:
            >>> CircuitBreaker.named("maps", fail_max=3) is CircuitBreaker.named("maps")
            True
        """
        new = cls(name, **options)
        with _registry_lock:
            found = _registry.setdefault(name, new)
        for option, value in options.items():
            there = getattr(found.rules, option)
            if there != value:
                raise OperoUsageError(
                    f"{option}={value!r}: the circuit {name!r} was made with {option}={there!r}. "
                    "Leave the option out, or take another name."
                )
        return found

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

    # --- by hand --------------------------------------------------------------------------------

    def open(self) -> None:
        """Refuse calls for the open time, as if too many had failed."""
        self._step(lambda machine: machine.open(ambient.clock().monotonic()))
        for part in self.parts:
            part.open()

    def force_open(self) -> None:
        """Refuse calls until `close` or `reset`."""
        self._step(Machine.force_open)
        for part in self.parts:
            part.force_open()

    def close(self) -> None:
        """Let calls through, with all counts at zero and the open time as at first."""
        self._step(Machine.close)
        for part in self.parts:
            part.close()

    def disable(self) -> None:
        """Let all calls through and count nothing, until `close` or `reset`."""
        self._step(Machine.disable)
        for part in self.parts:
            part.disable()

    def reset(self) -> None:
        """Close it and forget its statistics too."""
        self.close()
        with self._lock:
            self._refused = self._machine.opened = 0
        for part in self.parts:
            part.reset()

    def _step(self, step: Callable[[Machine], object]) -> None:
        with self._lock:
            step(self._machine)
            self._show()
        self._tell()

    # --- parts ----------------------------------------------------------------------------------

    @property
    def parts(self) -> tuple[CircuitBreaker, ...]:
        """The breakers of single fallback values that have had a call."""
        with self._lock:
            return tuple(self._parts.values())

    def known_part(self, key: Hashable) -> CircuitBreaker | None:
        """Return the breaker of a part; None if it has had no call yet, so that it is closed."""
        return self._parts.get(key)

    def part(self, key: Hashable, label: str) -> CircuitBreaker:
        """Return the breaker of one of the things that this one stands for, with the same options.

        Verbs by hand reach all parts, and what parts tell reaches the listeners. A new part is
        closed, unless this breaker is held open or disabled: then it is so too.

        Args:
            key: What tells it from the others.
            label: What it is called: the part's name is `name[label]`.
        """
        found = self._parts.get(key)
        if found is not None:
            return found
        options: dict[str, Any] = {**self.rules.as_dict(), "on_change": None}
        part = CircuitBreaker(f"{self.name}[{label}]", **options)
        for function in self._functions:
            part.guard(function)
        part.subscribe(self._news.hand_on)
        self._pass_hold(part)
        with self._lock:
            self._make_room()
            part = self._parts.setdefault(key, part)
        # Once more: a hand may have come in between, when the part was not in its reach yet.
        self._pass_hold(part)
        return part

    def _pass_hold(self, part: CircuitBreaker) -> None:
        if self._machine.state is CircuitState.FORCED_OPEN:
            part.force_open()
        elif self._machine.state is CircuitState.DISABLED:
            part.disable()

    def _make_room(self) -> None:
        """Forget parts, first those that know nothing, else the oldest one."""
        if len(self._parts) < _MOST_PARTS:
            return
        for key, part in list(self._parts.items()):
            if part.standing is not None and part.standing.steady:
                del self._parts[key]
        if len(self._parts) >= _MOST_PARTS:
            del self._parts[next(iter(self._parts))]

    # --- what is seen ---------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Its name; that of the first function it guards if it was given none."""
        return self._name or (self._functions[0] if self._functions else "circuit")

    def guard(self, function: str) -> None:
        """Remember a function that it guards, for its name and its events."""
        with self._lock:
            if function not in self._functions:
                self._functions += (function,)
        for part in self.parts:
            part.guard(function)

    @property
    def state(self) -> CircuitState:
        """Its state now; to ask is enough to go from open to half-open when the time has come."""
        if self.standing is None:
            self._step(lambda machine: machine.settle(ambient.clock().monotonic()))
        return self._machine.state

    @property
    def stats(self) -> CircuitStats:
        """Its counts now, as a snapshot."""
        with self._lock:
            machine = self._machine
            wait = machine.wait(ambient.clock().monotonic())
            self._show()
            stats = CircuitStats(
                state=machine.state,
                failures=machine.tally.failures,
                calls=machine.tally.calls,
                probes=len(machine.probes),
                opened=machine.opened,
                refused=self._refused,
                retry_after=wait if wait is not None and math.isfinite(wait) else None,
            )
        self._tell()
        return stats

    def describe(self) -> str:
        """Return its rules, and its state unless it is closed, in one line."""
        state = self.state
        now = "" if state is CircuitState.CLOSED else f"; now {_words(state)}"
        return f"{self.rules}{now}"

    def __repr__(self) -> str:
        stats = self.stats
        told = [_words(stats.state)]
        if stats.failures:
            told.append(f"{stats.failures} failure{'s' * (stats.failures != 1)}")
            told[-1] += f" of {stats.calls}" if self.rules.failure_rate is not None else " in a row"
        if stats.probes:
            told.append(f"{stats.probes} probe{'s' * (stats.probes != 1)} under way")
        elif stats.retry_after is not None:
            told.append(f"again in {format_seconds(round(stats.retry_after, 3))}")
        if self._parts:
            told.append(f"{len(self._parts)} part{'s' * (len(self._parts) != 1)}")
        return f"<CircuitBreaker {self.name!r} {', '.join(told)}>"

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

    # --- identity -------------------------------------------------------------------------------

    def __copy__(self) -> CircuitBreaker:
        """A breaker is shared on purpose: its copy is itself."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> CircuitBreaker:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """In its own process it is met again; elsewhere it is one per process, at first closed.

        Listeners stay behind.
        """
        with _registry_lock:
            registered = _registry.get(self.name) is self
            if self._token is None:
                self._token = os.urandom(8).hex()
            _met[self._token] = self
        options: dict[str, Any] = {**self.rules.as_dict(), "on_change": None}
        return _meet, (self._token, self.name, registered, options)


_alive: WeakSet[CircuitBreaker] = WeakSet()
_registry: dict[str, CircuitBreaker] = {}
_registry_lock = RLock()
_met: WeakValueDictionary[str, CircuitBreaker] = WeakValueDictionary()


def _meet(token: str, name: str, registered: bool, options: dict[str, Any]) -> CircuitBreaker:
    """Find a pickled breaker, or make its counterpart in this process."""
    with _registry_lock:
        if registered:
            if name not in _registry:
                _registry[name] = CircuitBreaker(name, **options)
            return _registry[name]
        found = _met.get(token)
        if found is None:
            found = _met[token] = CircuitBreaker(name, **options)
            found._token = token  # noqa: SLF001 - it goes on as the same breaker
        return found


def _words(state: CircuitState) -> str:
    return state.replace("_", "-") if state is CircuitState.HALF_OPEN else state.replace("_", " ")


def _after_fork() -> None:
    """Replace locks that another thread may have held, and forget its probes."""
    global _registry_lock  # noqa: PLW0603 - locks cannot be repaired, only replaced
    _registry_lock = RLock()
    for breaker in list(_alive):
        breaker._start()  # noqa: SLF001 - a matter of this module


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
