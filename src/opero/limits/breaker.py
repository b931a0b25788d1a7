# this_file: src/opero/limits/breaker.py
"""Stop calling a service that keeps failing, in all threads, event loops and worker processes together.

The success of a call in a closed circuit without failures costs two attribute reads and no lock: all calls of a closed
period share one `Permit`, which says itself whether a success has to be reported. Where several processes share the
circuit, each call reads one number of the file instead.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
from collections.abc import Callable, Hashable
from dataclasses import fields
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from opero.errors import CircuitOpenError, OperoUsageError
from opero.events.bus import EventBus, event_bus
from opero.limits.breaker_state import (
    FREE,
    SETTLED,
    BreakerRules,
    BreakerState,
    CircuitState,
    CircuitStats,
    Permit,
    Transition,
)
from opero.limits.shared import SharedCells, registry, restore
from opero.utils import ambient
from opero.utils.checks import text_or_none
from opero.utils.secrets import mask_urls
from opero.utils.units import Duration, format_seconds

if TYPE_CHECKING:
    from opero.errors import FailureFilter
    from opero.events.bus import Handler
    from opero.events.types import CircuitChanged


T = TypeVar("T")

_MOST_PARTS: Final = 1000
"""Fallback values with a breaker of their own; beyond it those without failures are forgotten."""

_tokens = itertools.count(1)


class CircuitBreaker(SharedCells):
    """Stops calling a service that keeps failing, and lets a probe through now and then.

    One breaker may guard any number of functions, synchronous and asynchronous, in all threads and event loops of a
    process, in the worker processes of a map, and in those that it is pickled to. Each of them notifies the listeners
    in it of the changes that its own calls bring about.

    A *closed* circuit lets calls through and counts failures, in a row by default, or as a rate. When there are too
    many it is *open*: calls are refused with `CircuitOpenError` until the open time is over. Then it is *half-open*: so
    many probes at once decide whether it closes or opens again, for longer. A call that was admitted in an earlier
    state counts no more. What is cancelled or interrupted counts neither way, and a probe gives its place back.

    Args:
        name: Shown in errors and events, and that of one breaker in the process, which `named` finds; without one, the
            name of the first function it guards.
        fail_max: Failures in a row that open it, unless `failure_rate` is given. A success starts the count afresh.
        failure_rate: Share of failed calls that opens it, more than 0 to 1. Only a failure can.
        window: What the rate is taken of: a whole number of last calls (100 by default), or a time ("1m", 60.0, a
            timedelta), which is forgotten in steps of a twentieth.
        minimum_calls: Calls that the window must hold before the rate means anything; 10, or all of a smaller window.
        reset_timeout: How long it stays open.
        backoff: Growth of the open time with every probe that failed.
        max_reset_timeout: Longest open time; ten times `reset_timeout` by default.
        jitter: Share of the open time by which it may be shorter, drawn at random, so that many clients do not come
            back in step; 0 makes it exact.
        half_open_max: Probes at once; 1,000 is the most that has an effect.
        success_threshold: Successful probes that close it. One failed probe opens it.
        probe_timeout: When a probe whose outcome is not known stops holding its place. Should it answer after all,
            while the circuit is still half-open, that counts.
        counts: Errors that are failures: a type, a tuple of types, or a predicate. Others say nothing about the
            service: they are neither failures nor successes. opero's own refusals never count.
        ignore: Errors that are none, though `counts` names them.
        counts_result: Predicate on results: True is a failure. What `retry_if_result` refuses is a failure only if
            this says so too.
        on_change: Called with every `CircuitChanged`, as by `subscribe`.
        draw: Random numbers from [0, 1) for the jitter; for tests.

    Raises:
        OperoUsageError: A value or a combination cannot work, or another breaker has the name.

    Attributes:
        rules: The options.
        current_permit: The permit that every call gets at present without asking further; None if it takes more.

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

    kind = "cb"
    current_permit: Permit | None
    _shared_permit: Permit | None = None

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
        options = locals()
        text_or_none("name", name)
        rules = BreakerRules(**{field.name: options[field.name] for field in fields(BreakerRules)})
        self.rules: BreakerRules = rules
        self._name = name
        self._functions: tuple[str, ...] = ()
        self._module: str | None = None
        self._parts: dict[Hashable, CircuitBreaker] = {}
        self._whole: CircuitBreaker | None = None
        self._core = BreakerState(rules)
        self._changes = EventBus()
        self._notifying = Lock()
        self.current_permit = None
        super().__init__((name, {}), self._core.cells)
        self._publish_state()
        if on_change is not None:
            self.subscribe(on_change)
        if name is not None:
            _register(name, self)

    @classmethod
    def unregistered(cls, name: str, **options: Any) -> CircuitBreaker:
        """Make a breaker whose name is only shown, so that others may have it too."""
        made = cls(**options)
        made._name = name
        return made

    @classmethod
    def named(cls, name: str, /, **options: Any) -> CircuitBreaker:
        """Return the one breaker of this name in the process; the first caller makes it.

        The name is free again when the breaker is in use no more.

        Args:
            name: Its name.
            options: As for `CircuitBreaker`. Later callers may leave them out.

        Raises:
            OperoUsageError: It was made with other options.

        Example:
            >>> CircuitBreaker.named("maps", fail_max=3) is CircuitBreaker.named("maps")
            True
        """
        with registry.lock:
            found: CircuitBreaker = registry.named.get(name) or cls(name, **options)
        for option, value in options.items():
            there = getattr(found.rules, option)
            if there != value:
                raise OperoUsageError(
                    f"{option}={value!r}: the circuit {name!r} was made with {option}={there!r}. "
                    "Leave the option out, or take another name."
                )
        return found

    @property
    def name(self) -> str:
        """Its name; that of the first function it guards if it was given none."""
        return self._name or (self._functions[0] if self._functions else "circuit")

    def guard(self, function: str, module: str | None = None) -> None:
        """Remember a function that it guards, and its module, for its name and its events."""
        with self._lock:
            same = not self._functions or (function, module) == (self._functions[0], self._module)
            self._module = module if same else None
            if function not in self._functions:
                self._functions += (function,)
        for part in self.parts:
            part.guard(function, module)

    # --- calls ----------------------------------------------------------------------------------

    def acquire(self) -> Permit:
        """Return the right to make a call.

        Returns:
            A permit: end it with `success(result)`, `failure(error)` or `release()`, or use it as a context manager.

        Raises:
            CircuitOpenError: The circuit lets no call through at present.
        """
        return self.current_permit or self._permit_in_file() or self._probe()

    def check(self) -> None:
        """Raise as `acquire` would now, but take no permit."""
        wait = self.refuses()
        if wait is not None:
            self._change(BreakerState.refuse)
            raise self._refusal(wait)

    def refuses(self) -> float | None:
        """Return whether a call would be refused now.

        Returns:
            None if it would not, else the seconds until one may be let through; infinity if that takes a hand.
        """
        if self.current_permit is not None or self._permit_in_file() is not None:
            return None
        return self._change(lambda core: core.wait(ambient.clock().monotonic()))

    def _probe(self) -> Permit:
        def begin(core: BreakerState) -> Permit | float:
            now = ambient.clock().monotonic()
            wait = core.wait(now)
            if wait is not None:
                core.refuse()
                return wait
            if (permit := self._permit_for_all()) is None:
                token = os.getpid() << 32 | next(_tokens) % (1 << 32)
                permit = Permit(self.rules, self._report, generation=core.generation, token=token)
                core.add_probe(token, now)
            return permit

        found = self._change(begin)
        if isinstance(found, Permit):
            return found
        raise self._refusal(found)

    def _refusal(self, wait: float) -> CircuitOpenError:
        return CircuitOpenError(self.name, wait if math.isfinite(wait) else None)

    def _report(self, permit: Permit, failed: bool | None) -> None:
        """Take the outcome of a call; None if it has none."""
        generation, token = permit.generation, permit.token
        if token:
            permit.generation = SETTLED

        def end(core: BreakerState) -> None:
            if token:
                core.end_probe(token)
            if failed is not None:
                core.ended(generation, ambient.clock().monotonic(), failed=failed)

        core = self._core
        if failed is False and permit is self.current_permit:
            # A success moves nothing but the count.
            with self._lock:
                if self._file is None and generation == core.closed_generation:
                    core.ended(generation, ambient.clock().monotonic(), failed=False)
                    self._permit_for_all()
                    return
        if failed or token or generation != core.closed_generation or not core.steady:
            self._change(end)

    # --- the state ------------------------------------------------------------------------------

    def _change(self, change: Callable[[BreakerState], T]) -> T:
        """Change the state while no other thread or process does; then publish it and notify listeners."""
        core = self._core

        def publish() -> T:
            if self._file is not None and self._file.torn:
                # A process was killed while it changed the state: the circuit begins anew.
                core.close()
                core.transitions.clear()
            try:
                return change(core)
            finally:
                self._publish_state()

        try:
            return self._exclusively(publish)
        finally:
            if core.transitions:
                self._notify()

    def _permit_for_all(self) -> Permit | None:
        """Return the permit that every call gets in the present state; None if each needs one of its own."""
        core = self._core
        generation = core.closed_generation
        if generation is None:
            return FREE if core.state is CircuitState.DISABLED else None
        permit = self._shared_permit
        if permit is None or permit.generation != generation:
            permit = self._shared_permit = Permit(self.rules, self._report, generation=generation)
        # In a file the count may change at any time by a call of another process.
        permit.steady = self._file is None and core.steady
        permit.silent = permit.steady and self.rules.counts_result is None
        return permit

    def _permit_in_file(self) -> Permit | None:
        """Return the permit for all calls of a shared circuit that is closed, by one number of its file."""
        closed = self._file is not None and self._core.closed_generation is not None
        return self._permit_for_all() if closed else None

    def _publish_state(self) -> None:
        """Set what calls read without a lock; where several processes share the circuit they read the file."""
        local = self.attached and self._file is None
        self.current_permit = self._permit_for_all() if local else None

    # --- by hand --------------------------------------------------------------------------------

    def open(self) -> None:
        """Refuse calls for the open time, as if too many had failed."""
        self._by_hand(lambda core: core.open(ambient.clock().monotonic()))

    def force_open(self) -> None:
        """Refuse calls until `close` or `reset`."""
        self._by_hand(BreakerState.force_open)

    def close(self) -> None:
        """Let calls through, with all counts at zero and the open time as at first."""
        self._by_hand(BreakerState.close)

    def disable(self) -> None:
        """Let all calls through and count nothing, until `close` or `reset`."""
        self._by_hand(BreakerState.disable)

    def _by_hand(self, change: Callable[[BreakerState], None]) -> None:
        self._change(change)
        for part in self.parts:
            part._by_hand(change)  # noqa: SLF001 - its own class

    def reset(self) -> None:
        """Close it and forget its statistics too."""
        self._by_hand(BreakerState.reset)

    # --- parts ----------------------------------------------------------------------------------

    @property
    def parts(self) -> tuple[CircuitBreaker, ...]:
        """The breakers of single fallback values that have had a call."""
        with self._lock:
            return tuple(self._parts.values())

    def known_part(self, key: Hashable) -> CircuitBreaker | None:
        """Return the breaker of a part; None if it has had no call yet."""
        return self._parts.get(key)

    def part(self, key: Hashable, label: str) -> CircuitBreaker:
        """Return the breaker of one of the things that this one stands for, with the same options.

        Verbs by hand reach all parts, listeners their changes. A new part is closed, held open or disabled as this is.

        Its name is `name[label]`; `key` sets it apart from the others.
        """
        found = self._parts.get(key)
        if found is not None:
            return found
        part = CircuitBreaker.unregistered(f"{self.name}[{label}]", **self.rules.options())
        part._whole = self  # noqa: SLF001 - its own class
        for function in self._functions:
            part.guard(function, self._module)
        part.subscribe(self._hand_on)
        self._pass_on_to(part)
        with self._lock:
            self._make_room()
            part = self._parts.setdefault(key, part)
            self._share_part(part, self.uid, repr(key).encode())
        # Once more: a verb by hand may have come in between.
        self._pass_on_to(part)
        return part

    def _pass_on_to(self, part: CircuitBreaker) -> None:
        if self._core.state is CircuitState.FORCED_OPEN:
            part.force_open()
        elif self._core.state is CircuitState.DISABLED:
            part.disable()

    def _make_room(self) -> None:
        """Forget parts if there are too many: those without failures, else the oldest one."""
        parts = self._parts
        if len(parts) < _MOST_PARTS:
            return
        for key, part in list(parts.items()):
            if part.state is CircuitState.CLOSED and part._core.steady:  # noqa: SLF001 - its own class
                del parts[key]
        if len(parts) >= _MOST_PARTS:
            del parts[next(iter(parts))]

    # --- what is seen ---------------------------------------------------------------------------

    @property
    def state(self) -> CircuitState:
        """Its state now, half-open as soon as the open time is over."""
        if self.current_permit is None:
            self._change(lambda core: core.settle(ambient.clock().monotonic()))
        return self._core.state

    @property
    def stats(self) -> CircuitStats:
        """Its counts now, as a snapshot."""
        return self._change(lambda core: core.stats(ambient.clock().monotonic()))

    def subscribe(self, listener: Callable[[CircuitChanged], object]) -> Callable[[], None]:
        """Call `listener` with each change of state from now on, in order, outside all locks.

        The default event bus gets the same events. Equal listeners are called once.

        Returns:
            A function that ends it.
        """
        return self._changes.subscribe(cast("Handler", listener)).cancel

    def _notify(self) -> None:
        """Notify listeners of the transitions that wait. One thread does it at a time, so that the order is kept."""
        transitions = self._core.transitions
        # That thread looks once more after it has released the lock, so nothing stays behind.
        while transitions and self._notifying.acquire(blocking=False):
            try:
                while transitions:
                    transition = transitions.popleft()
                    if self._changes.active or event_bus.active:
                        event = self._event(transition)
                        self._hand_on(event)
                        event_bus.emit(event)
            finally:
                self._notifying.release()

    def _hand_on(self, event: CircuitChanged) -> None:
        listeners = self._changes.subscriptions
        for place, listener in enumerate(listeners):
            if not any(listener.handler == other.handler for other in listeners[:place]):
                listener.deliver(event)

    def _event(self, transition: Transition) -> CircuitChanged:
        from opero.events.types import CircuitChanged

        return CircuitChanged(
            function=self._functions[0] if len(self._functions) == 1 else self.name,
            module=self._module,
            circuit=self.name,
            old_state=transition.old,
            new_state=transition.new,
            retry_after=transition.retry_after,
            breaker=self,
        )

    def describe(self) -> str:
        """Return its rules, and its state unless it is closed, in one line."""
        state = self.state
        now = "" if state is CircuitState.CLOSED else f"; now {_words(state)}"
        return f"{self.rules}{now}"

    def __repr__(self) -> str:
        stats = self.stats
        facts = [_words(stats.state)]
        if stats.failures:
            of = f" of {stats.calls}" if self.rules.failure_rate is not None else " in a row"
            facts.append(_many(stats.failures, "failure") + of)
        if stats.probes:
            facts.append(f"{_many(stats.probes, 'probe')} under way")
        elif stats.retry_after is not None:
            facts.append(f"again in {format_seconds(round(stats.retry_after, 3))}")
        if self._parts:
            facts.append(_many(len(self._parts), "part"))
        return mask_urls(f"<CircuitBreaker {self.name!r} {', '.join(facts)}>")

    # --- several processes ----------------------------------------------------------------------

    def share(self) -> bool:
        """Move the state into a file, for processes that are forked or get this breaker by pickle.

        Returns:
            Whether the state is shared now; if it cannot be, one warning has said so.
        """
        return self.shared if self._whole is not None else super().share()

    def _begin_attached(self) -> None:
        super()._begin_attached()
        with self._lock:
            self._publish_state()

    def _go_to(self, path: str, *, create: bool) -> None:
        with self._lock:
            super()._go_to(path, create=create)
            self._path = path
            self._publish_state()
            for key, part in self._parts.items():
                self._share_part(part, self.uid, repr(key).encode())

    def _use(self, cells: memoryview) -> None:
        super()._use(cells)
        self._core.use(cells)

    def __reduce__(self) -> tuple[Any, ...]:
        """In its own process it is found again; elsewhere there is one, with the same state. Listeners stay behind."""
        self.share()
        registered = self._name is not None and registry.named.get(self._name) is self
        make = partial(_counterpart, self.name, registered, self.rules.options())
        return restore, (self.uid, self._path, make)

    def after_fork(self) -> None:
        """Replace locks that another thread may have held, and forget probes: their calls are in the parent."""
        super().after_fork()
        self._notifying = Lock()
        if self._file is None:
            self._core.end_probe(None)
        self._publish_state()


def _counterpart(name: str, registered: bool, options: dict[str, Any]) -> CircuitBreaker:
    """Return what a pickled breaker is in this process."""
    make = CircuitBreaker if registered else CircuitBreaker.unregistered
    return (registry.named.get(name) if registered else None) or make(name, **options)


def _register(name: str, breaker: CircuitBreaker) -> None:
    """Let `CircuitBreaker.named` find a new breaker.

    Raises:
        OperoUsageError: There is a live one of its name.
    """
    with registry.lock:
        if name in registry.named:
            # One that is used no more may only wait for the collector.
            gc.collect()
        if name in registry.named:
            raise OperoUsageError(
                f"there is a circuit breaker {name!r} already: write CircuitBreaker.named({name!r}) for that one, "
                "or take another name."
            )
        registry.named[name] = breaker


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _words(state: CircuitState) -> str:
    return state.replace("_", "-" if state is CircuitState.HALF_OPEN else " ")
