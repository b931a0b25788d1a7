# this_file: src/opero/limits/breaker/shared.py
"""The circuit breaker that users make and share."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from opero.errors import OperoUsageError
from opero.limits.breaker.machine import CircuitState, CircuitStats, Machine
from opero.limits.breaker.parts import make_room
from opero.limits.breaker.registry import Ticket, registry
from opero.limits.breaker.rules import Rules
from opero.limits.breaker.turnstile import Turnstile
from opero.utils import ambient
from opero.utils.checks import text_or_none
from opero.utils.units import format_seconds

if TYPE_CHECKING:
    from opero.events import CircuitChanged
    from opero.utils.matching import FailureFilter
    from opero.utils.units import Duration

__all__ = ["CircuitBreaker"]


class CircuitBreaker(Turnstile):
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
        rules = Rules(
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
        self._parts: dict[Hashable, CircuitBreaker] = {}
        super().__init__(name, rules)
        if on_change is not None:
            self.subscribe(on_change)

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
        found = registry.named(name, cls(name, **options))
        for option, value in options.items():
            there = getattr(found.rules, option)
            if there != value:
                raise OperoUsageError(
                    f"{option}={value!r}: the circuit {name!r} was made with {option}={there!r}. "
                    "Leave the option out, or take another name."
                )
        return found

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
        part = CircuitBreaker(f"{self.name}[{label}]", **self._options())
        for function in self._functions:
            part.guard(function)
        part.subscribe(self._news.hand_on)
        self._pass_hold(part)
        with self._lock:
            make_room(self._parts)
            part = self._parts.setdefault(key, part)
        # Once more: a hand may have come in between, when the part was not in its reach yet.
        self._pass_hold(part)
        return part

    def _pass_hold(self, part: CircuitBreaker) -> None:
        if self._machine.state is CircuitState.FORCED_OPEN:
            part.force_open()
        elif self._machine.state is CircuitState.DISABLED:
            part.disable()

    def guard(self, function: str) -> None:
        """Remember a function that it guards, for its name and its events."""
        super().guard(function)
        for part in self.parts:
            part.guard(function)

    # --- what is seen ---------------------------------------------------------------------------

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

    # --- identity -------------------------------------------------------------------------------

    def _options(self) -> dict[str, Any]:
        """Return the options for another breaker like it, to which nobody listens."""
        return {**self.rules.as_dict(), "on_change": None}

    def __copy__(self) -> CircuitBreaker:
        """A breaker is shared on purpose: its copy is itself."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> CircuitBreaker:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """In its own process it is met again; elsewhere it is one per process, at first closed.

        Listeners stay behind.
        """
        return _meet, (registry.ticket(self), self._options())


def _meet(ticket: Ticket, options: dict[str, Any]) -> CircuitBreaker:
    """Find a pickled breaker, or make its counterpart in this process."""
    return registry.meet(ticket, lambda: CircuitBreaker(ticket.name, **options))


def _words(state: CircuitState) -> str:
    return state.replace("_", "-") if state is CircuitState.HALF_OPEN else state.replace("_", " ")
