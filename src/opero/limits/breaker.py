# this_file: src/opero/limits/breaker.py
"""Stop calling a service that keeps failing, in all threads, event loops and worker processes together.

The success of a call in a closed circuit without failures costs two attribute reads and no lock: all calls of a closed
period share one `Permit`, which says itself whether a success has to be reported. Where several processes share the
circuit, each call reads one number of the file instead.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

from opero.errors import CircuitOpenError, OperoUsageError
from opero.events.types import CircuitChanged
from opero.limits.breaker_permits import (
    FREE,
    Listener,
    Notifications,
    Permit,
    SharedCircuitPermit,
    SharedPermit,
    breaker_names,
)
from opero.limits.breaker_state import (
    BreakerRules,
    BreakerState,
    CircuitState,
    CircuitStats,
    Transition,
)
from opero.limits.shared import SharedObject, restore
from opero.utils import ambient
from opero.utils.checks import text_or_none
from opero.utils.units import Duration, format_seconds

if TYPE_CHECKING:
    from opero.errors import FailureFilter
    from opero.limits.state_file import StateFile

__all__ = ["FREE", "CircuitBreaker", "CircuitState", "CircuitStats", "Permit"]

_MOST_PARTS: Final = 1000
"""Fallback values with a breaker of their own; beyond it those without failures are forgotten."""

_tokens = itertools.count(1)


# --- the breaker ----------------------------------------------------------------------------------

# Cells of a shared circuit: what calls read without a lock, the refused calls, and the rest as `BreakerState.dump`.
_STATUS, _REFUSED, _DUMP = 0, 1, 2
_CLOSED, _STEADY, _GENERATION = 1, 2, 2


class CircuitBreaker(SharedObject):
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
        half_open_max: Probes at once.
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

    current_permit: Permit | None = cast("Any", SharedCircuitPermit())
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
        text_or_none("name", name)
        rules = BreakerRules(
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
        self._begin(name, rules)
        if name is not None:
            breaker_names.add(name, self)

    def _begin(self, name: str | None, rules: BreakerRules) -> None:
        self.rules = rules
        self._name = name
        self._functions: tuple[str, ...] = ()
        self._module: str | None = None
        self._parts: dict[Hashable, CircuitBreaker] = {}
        self._whole: CircuitBreaker | None = None
        self._core = BreakerState(rules)
        self._refused = 0
        self._file: StateFile | None = None
        self._notifications = Notifications(self._core.transitions)
        self.current_permit = None
        # Reentrant: the garbage collector may end an abandoned coroutine, and its probe, at any allocation.
        self._lock = RLock()
        super().__init__((name, {}))
        with self._lock:
            self._publish_state()
        if rules.on_change is not None:
            self.subscribe(rules.on_change)

    @classmethod
    def unregistered(
        cls, name: str, rules: BreakerRules | None = None, **options: Any
    ) -> CircuitBreaker:
        """Make a breaker whose name is only shown, so that others may have it too; options or checked `rules`."""
        made = cls.__new__(cls)
        made._begin(name, rules or BreakerRules(**options))  # noqa: SLF001 - its own class
        return made

    @classmethod
    def named(cls, name: str, /, **options: Any) -> CircuitBreaker:
        """Return the one breaker of this name in the process; the first caller makes it.

        Args:
            name: Its name.
            options: As for `CircuitBreaker`. Later callers may leave them out.

        Raises:
            OperoUsageError: It was made with other options.

        Example:
            >>> CircuitBreaker.named("maps", fail_max=3) is CircuitBreaker.named("maps")
            True
        """
        with breaker_names.lock:
            found = breaker_names.live.get(name)
            found = breaker_names.kept[name] = cls(name, **options) if found is None else found
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
        return self.current_permit or self._probe()

    def check(self) -> None:
        """Raise as `acquire` would now, but take no permit."""
        wait = self.refuses()
        if wait is not None:
            self._refuse(wait)

    def refuses(self) -> float | None:
        """Return whether a call would be refused now.

        Returns:
            None if it would not, else the seconds until one may be let through; infinity if that takes a hand.
        """
        if self.current_permit is not None:
            return None
        with self._changing() as core:
            return core.wait(ambient.clock().monotonic())

    def _probe(self) -> Permit:
        permit = None
        with self._changing() as core:
            now = ambient.clock().monotonic()
            wait = core.wait(now)
            if wait is None:
                permit = self._permit_for_all(core)
                if permit is None:
                    token = os.getpid() << 32 | next(_tokens) % (1 << 32)
                    permit = Permit(
                        self.rules, self._report, generation=core.generation, token=token
                    )
                    core.probes[token] = now
        return self._refuse(wait or 0.0) if permit is None else permit

    def _refuse(self, wait: float) -> NoReturn:
        with self._lock:
            self._refused += 1
            if self._file is not None:
                with self._file:
                    self._file.cells[_REFUSED] += 1
        raise CircuitOpenError(self.name, wait if math.isfinite(wait) else None)

    def _report(self, permit: Permit, failed: bool | None) -> None:
        """Take the outcome of a call; None if it has none."""
        if permit is self.current_permit and failed is False:
            with self._lock:
                core = self._core
                if permit.generation == core.generation and self._file is None:
                    # Nothing moves but the count: the success path of a window.
                    counter = core.counter
                    counter.succeeded(ambient.clock().monotonic() if counter.timed else 0.0)
                    self._mark(permit)
                    return
        with self._changing() as core:
            if permit.token:
                if permit.settled:
                    return
                permit.settled = True
                core.probes.pop(permit.token, None)
            if failed is not None:
                step = core.failed if failed else core.succeeded
                step(permit.generation, ambient.clock().monotonic())

    # --- the state ------------------------------------------------------------------------------

    @contextmanager
    def _changing(self) -> Iterator[BreakerState]:
        """Yield the state while no other thread or process changes it; then publish it and notify listeners."""
        if not self.attached:
            self.attach()
        try:
            with self._lock:
                if self._file is None:
                    try:
                        yield self._core
                    finally:
                        self._publish_state()
                else:
                    with self._file as file:
                        self._load(file)
                        try:
                            yield self._core
                        finally:
                            self._store(file)
        finally:
            self._notifications.deliver(self._event)

    def _permit_for_all(self, core: BreakerState) -> Permit | None:
        """Return the permit that every call gets in the present state; None if each needs one of its own."""
        if core.state is CircuitState.DISABLED:
            return FREE
        if core.state is not CircuitState.CLOSED:
            return None
        if self._file is not None:
            return self.permit_in_file()
        permit = self._shared_permit
        if permit is None or permit.generation != core.generation:
            permit = self._shared_permit = Permit(
                self.rules, self._report, generation=core.generation
            )
        self._mark(permit)
        return permit

    def _publish_state(self) -> None:
        """Set what calls read without a lock."""
        permit = self._permit_for_all(self._core)
        if self._file is None:
            self.current_permit = permit if self.attached else None
        else:
            self.__dict__.pop("current_permit", None)

    def _mark(self, permit: Permit) -> None:
        # In a file the count may change at any time by a call of another process.
        steady = self._core.counter.steady and self._file is None
        permit.steady = steady
        permit.silent = steady and self.rules.counts_result is None

    def _load(self, file: StateFile) -> None:
        if file.changing:
            # A process was killed while it stored: the circuit begins anew, in a generation of its own.
            self._core.generation = max(self._core.generation, file.cells[_DUMP + 1])
            self._core.close()
            self._core.transitions.clear()
        else:
            self._core.load(file.cells[_DUMP:])
        self._refused = file.cells[_REFUSED]

    def _store(self, file: StateFile) -> None:
        core, cells = self._core, file.cells
        dump = core.dump()
        if dump == list(cells[_DUMP:]) and not file.changing:
            return
        file.changing = True
        for place, number in enumerate(dump, _DUMP):
            cells[place] = number
        closed = core.state is CircuitState.CLOSED
        steady = closed and core.counter.steady
        cells[_STATUS] = core.generation << _GENERATION | steady * _STEADY | closed * _CLOSED
        file.changing = False

    def permit_in_file(self) -> Permit | None:
        """Return the permit for all calls of a shared circuit that is closed, by one number of its file."""
        if self._file is None:
            return None
        cells = self._file.cells
        status = cells[_STATUS]
        if not status & _CLOSED:
            return None
        permit, generation = self._shared_permit, status >> _GENERATION
        if permit is None or permit.generation != generation or type(permit) is Permit:
            permit = self._shared_permit = SharedPermit(
                self.rules,
                self._report,
                generation=generation,
                is_steady=lambda: bool(cells[_STATUS] & _STEADY),
            )
        return permit

    # --- by hand --------------------------------------------------------------------------------

    def open(self) -> None:
        """Refuse calls for the open time, as if too many had failed."""
        with self._changing() as core:
            core.open(ambient.clock().monotonic())
        for part in self.parts:
            part.open()

    def force_open(self) -> None:
        """Refuse calls until `close` or `reset`."""
        with self._changing() as core:
            core.force_open()
        for part in self.parts:
            part.force_open()

    def close(self) -> None:
        """Let calls through, with all counts at zero and the open time as at first."""
        with self._changing() as core:
            core.close()
        for part in self.parts:
            part.close()

    def disable(self) -> None:
        """Let all calls through and count nothing, until `close` or `reset`."""
        with self._changing() as core:
            core.disable()
        for part in self.parts:
            part.disable()

    def reset(self) -> None:
        """Close it and forget its statistics too."""
        self.close()
        with self._changing() as core:
            self._refused = core.opened = 0
            if self._file is not None:
                self._file.cells[_REFUSED] = 0
        for part in self.parts:
            part.reset()

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
        rules = BreakerRules(**{**self.rules.as_dict(), "on_change": None})
        part = CircuitBreaker.unregistered(f"{self.name}[{label}]", rules)
        part._whole = self  # noqa: SLF001 - its own class
        for function in self._functions:
            part.guard(function, self._module)
        part.subscribe(self._notifications.hand_on)
        self._pass_on_to(part)
        with self._lock:
            self._make_room()
            part = self._parts.setdefault(key, part)
            self._share_part(key, part)
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
            if part.current_permit is not None and part.current_permit.steady:
                del parts[key]
        if len(parts) >= _MOST_PARTS:
            del parts[next(iter(parts))]

    # --- what is seen ---------------------------------------------------------------------------

    @property
    def state(self) -> CircuitState:
        """Its state now, half-open as soon as the open time is over."""
        if self.current_permit is None:
            with self._changing() as core:
                core.settle(ambient.clock().monotonic())
        return self._core.state

    @property
    def stats(self) -> CircuitStats:
        """Its counts now, as a snapshot."""
        with self._changing() as core:
            wait = core.wait(ambient.clock().monotonic())
            return CircuitStats(
                state=core.state,
                failures=core.counter.failures,
                calls=core.counter.calls,
                probes=len(core.probes),
                opened=core.opened,
                refused=self._refused,
                retry_after=wait if wait is not None and math.isfinite(wait) else None,
            )

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with each change of state from now on, in order, outside all locks.

        The default event bus gets the same events. Equal listeners are called once.

        Returns:
            A function that ends it.
        """
        return self._notifications.subscribe(listener)

    def _event(self, transition: Transition) -> CircuitChanged:
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
            facts.append(f"{stats.failures} failure{'s' * (stats.failures != 1)}")
            facts[-1] += (
                f" of {stats.calls}" if self.rules.failure_rate is not None else " in a row"
            )
        if stats.probes:
            facts.append(f"{stats.probes} probe{'s' * (stats.probes != 1)} under way")
        elif stats.retry_after is not None:
            facts.append(f"again in {format_seconds(round(stats.retry_after, 3))}")
        if self._parts:
            facts.append(f"{len(self._parts)} part{'s' * (len(self._parts) != 1)}")
        return f"<CircuitBreaker {self.name!r} {', '.join(facts)}>"

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

    def _go_to(self, path: str | None, *, create: bool) -> str:
        from opero.limits.state_file import StateFile, private_path

        path, create = path or private_path(self), create or path is None
        with self._lock:
            fresh = [0, self._refused, *self._core.dump()]

            def make(old: list[int] | None, file: StateFile) -> list[int]:
                return old if old is not None and len(old) == len(fresh) else fresh

            self._file = StateFile.open(path, "cb", make, create=create)
            with self._file as file:
                self._load(file)
                file.changing = True
                self._store(file)
            self._path = path
            self._publish_state()
            for key, part in self._parts.items():
                self._share_part(key, part)
        return path

    def _share_part(self, key: Hashable, part: CircuitBreaker) -> None:
        if self._path is None:
            return
        from hashlib import blake2b

        # Keyed, because a part may stand for a secret; its file shows only a hash.
        code = blake2b(repr(key).encode(), key=self.uid.encode()[:64], digest_size=16).hexdigest()
        part._join(f"{self._path}-{code}", create=True)

    def __reduce__(self) -> tuple[Any, ...]:
        """In its own process it is found again; elsewhere there is one, with the same state. Listeners stay behind."""
        self.share()
        options = {**self.rules.as_dict(), "on_change": None}
        registered = self._name is not None and breaker_names.live.get(self._name) is self
        return _unpickle, (self.uid, self._path, self._name or self.name, registered, options)

    def after_fork(self) -> None:
        """Replace locks that another thread may have held, and forget probes: their calls are in the parent."""
        super().after_fork()
        self._lock = RLock()
        self._notifications.renew_locks()
        self._core.probes.clear()
        self._publish_state()


def _unpickle(
    uid: str, path: str | None, name: str, registered: bool, options: dict[str, Any]
) -> CircuitBreaker:
    """Find a pickled breaker, or make its counterpart in this process."""

    def make() -> CircuitBreaker:
        if not registered:
            return CircuitBreaker.unregistered(name, **options)
        with breaker_names.lock:
            found = breaker_names.live.get(name)
            return CircuitBreaker(name, **options) if found is None else found

    return restore(uid, path, make)


def _words(state: CircuitState) -> str:
    return state.replace("_", "-" if state is CircuitState.HALF_OPEN else " ")
