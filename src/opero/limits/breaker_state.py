# this_file: src/opero/limits/breaker_state.py
"""Decide what a circuit breaker does: its options, what it counts, its states and what leads from one to another; pure.

Readings of the clock are handed in, randomness too; nothing here locks, waits or notifies. Times are seconds of a
monotonic clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Final, NamedTuple

from opero.errors import FailureFilter, OperoUsageError, Rejected, asks, is_final, matches
from opero.events import CircuitChanged
from opero.limits.windows import StepWindow, new_cells
from opero.utils import checks
from opero.utils.units import Duration, format_seconds, parse_length, parse_seconds

# --- what is counted while it is closed -----------------------------------------------------------

STEPS: Final = 20
"""A time window forgets in steps of a twentieth of its length."""
_BITS_OF_CELL: Final = 62


class Streak:
    """Failures in a row: a success starts afresh. It counts as `StepWindow` does, in cells that are all 0 at first.

    Attributes:
        size: How many cells it needs.
    """

    size: Final = 1

    def add(self, cells: memoryview, now: float, calls: int, failures: int) -> None:
        """Count a call."""
        cells[0] = cells[0] + 1 if failures else 0

    def sums(self, cells: memoryview, now: float) -> tuple[int, int]:
        """Return the failures twice: all calls that it holds have failed."""
        return cells[0], cells[0]


class CallWindow:
    """The last so many calls: their number since the start, the failures, and a ring of one bit for each.

    Args:
        length: The number of calls.

    Attributes:
        size: How many cells it needs.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self.size: int = 2 - -length // _BITS_OF_CELL

    def add(self, cells: memoryview, now: float, calls: int, failures: int) -> None:
        """Count a call in the place of the oldest one."""
        cell, bit = divmod(cells[0] % self._length, _BITS_OF_CELL)
        oldest = cells[2 + cell] >> bit & 1
        cells[0] += 1
        cells[1] += failures - oldest
        cells[2 + cell] ^= (failures ^ oldest) << bit

    def sums(self, cells: memoryview, now: float) -> tuple[int, int]:
        """Return the calls and failures of the window."""
        return min(cells[0], self._length), cells[1]


# --- options --------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class BreakerRules:
    """The options of a circuit breaker, as given, checked when they are made.

    `CircuitBreaker` says what each of them means.

    Attributes:
        first_open: Seconds that the circuit stays open when it trips.
        longest_open: Seconds beyond which the open time does not grow.
        probe_seconds: Seconds after which a probe is given up for lost.
        window_calls: Length of a window of calls; None for a window of time.
        window_seconds: Length of a window of time.
        least_calls: Calls that must be counted before their failures mean anything.
        rate: Share of failures in them that trips the circuit.
    """

    fail_max: int = 5
    failure_rate: float | None = None
    window: int | Duration | None = None
    minimum_calls: int | None = None
    reset_timeout: Duration = 30
    backoff: float = 2.0
    max_reset_timeout: Duration | None = None
    jitter: float = 0.1
    half_open_max: int = 1
    success_threshold: int = 1
    probe_timeout: Duration = 60
    counts: FailureFilter = Exception
    ignore: FailureFilter | None = None
    counts_result: Callable[[Any], object] | None = None
    on_change: Callable[[CircuitChanged], object] | None = None
    draw: Callable[[], float] | None = None

    def __post_init__(self) -> None:
        for name in ("fail_max", "half_open_max", "success_threshold"):
            checks.whole(1)(name, getattr(self, name))
        for name in ("counts_result", "on_change", "draw"):
            checks.callable_or_none(name, getattr(self, name))
        checks.factor("backoff", self.backoff)
        checks.failure_filter("counts", self.counts)
        checks.none_or(checks.failure_filter)("ignore", self.ignore)
        checks.jitter("jitter", self.jitter)
        self.probe_seconds: float = parse_length(self.probe_timeout, "probe_timeout")
        self.first_open: float = parse_seconds(self.reset_timeout, "reset_timeout")
        self.longest_open: float = 10 * self.first_open
        if self.max_reset_timeout is not None:
            self.longest_open = parse_seconds(self.max_reset_timeout, "max_reset_timeout")
        if self.longest_open < self.first_open:
            raise OperoUsageError(
                f"max_reset_timeout={self.max_reset_timeout!r} is shorter than "
                f"reset_timeout={self.reset_timeout!r}: raise it, or leave it out."
            )
        self.least_calls: int = self.fail_max
        self.rate: float = 1.0
        if self.failure_rate is not None:
            self._use_rate(self.failure_rate)
            return
        for name in ("window", "minimum_calls"):
            if getattr(self, name) is not None:
                raise OperoUsageError(
                    f"{name}={getattr(self, name)!r} needs failure_rate, a share such as 0.5; "
                    "without it the circuit counts failures in a row."
                )

    def _use_rate(self, rate: float) -> None:
        checks.failure_rate("failure_rate", rate)
        checks.none_or(checks.whole(1))("minimum_calls", self.minimum_calls)
        self.rate = rate
        window = 100 if self.window is None else self.window
        self.window_calls: int | None = window if isinstance(window, int) else None
        if self.window_calls is None:
            self.window_seconds: float = parse_length(window, "window")
        else:
            checks.whole(1)("window", window)
        self.least_calls = self.minimum_calls or min(10, self.window_calls or 10)
        if self.window_calls is not None and self.least_calls > self.window_calls:
            raise OperoUsageError(
                f"minimum_calls={self.minimum_calls!r} never fit into window={window!r}."
            )

    def options(self) -> dict[str, Any]:
        """Return the options with which another breaker gets the same rules; its listener is another matter."""
        names = [field.name for field in fields(self) if field.name != "on_change"]
        return {name: getattr(self, name) for name in names}

    def blames(self, error: Exception) -> bool | None:
        """Return what an error says about the service.

        Returns:
            True: it failed. False: it answered (a refused result is judged by `counts_result` only). None: nothing, as
            for what is not counted or ignored, and for opero's own refusals.
        """
        if isinstance(error, Rejected):
            return self.blames_result(error.value)
        if is_final(error) or not matches(self.counts, error):
            return None
        return None if self.ignore is not None and matches(self.ignore, error) else True

    def blames_result(self, result: object) -> bool:
        """Return whether a result counts as a failure."""
        return self.counts_result is not None and asks(self.counts_result, result)

    def counter(self) -> Streak | CallWindow | StepWindow:
        """Return what counts calls and failures."""
        if self.failure_rate is None:
            return Streak()
        if self.window_calls is None:
            return StepWindow(self.window_seconds, STEPS)
        return CallWindow(self.window_calls)

    def trips(self, calls: int, failures: int) -> bool:
        """Return whether so many failures in so many calls open the circuit."""
        return calls >= self.least_calls and failures / calls >= self.rate

    def open_seconds(self, failed_recoveries: int, draw: float) -> float:
        """Return how long the circuit stays open.

        reset_timeout · backoff^n, at most max_reset_timeout, shortened by up to the jitter's share:
        exponential backoff, spread so that not all clients of a service probe it at once.

        Args:
            failed_recoveries: How often half-open has gone back to open since it was last closed.
            draw: Random number from [0, 1).

        Example:
            >>> [BreakerRules(jitter=0).open_seconds(n, draw=0.5) for n in (0, 1, 2, 10_000)]
            [30.0, 60.0, 120.0, 300.0]
        """
        try:
            full = min(self.longest_open, self.first_open * self.backoff**failed_recoveries)
        except OverflowError:
            full = self.longest_open
        return full * (1 - self.jitter * draw)

    def __str__(self) -> str:
        if self.failure_rate is None:
            opens = f"{self.fail_max} failures in a row"
        else:
            length = f"{self.window_calls} calls"
            if self.window_calls is None:
                length = format_seconds(self.window_seconds)
            share = f"{100 * self.failure_rate:g} %"
            opens = f"{share} failures in the last {length} ({self.least_calls} calls at least)"
        first, longest = format_seconds(self.first_open), format_seconds(self.longest_open)
        grows = f", growing to {longest}" if self.backoff > 1 and longest != first else ""
        probes = f"{self.half_open_max} probe{'s' * (self.half_open_max != 1)} at once"
        return f"opens after {opens}, for {first}{grows}, then {probes}"


# --- permits --------------------------------------------------------------------------------------


class Permit:
    """The right to make a call. Exactly one of its verbs is due when the call has ended.

    As a context manager it sees to that itself, but does not look at results.

    Attributes:
        generation: The stay in a state in which it was given; `SETTLED` for a probe whose outcome is known.
        steady: Whether a success would change no count at present.
        silent: Whether a success need not even be reported, because results are not judged either.
        token: Identifies a probe (one of the few calls of a half-open circuit); 0 for other calls.
    """

    __slots__ = ("_report", "_rules", "generation", "silent", "steady", "token")

    def __init__(
        self,
        rules: BreakerRules,
        report: Callable[[Permit, bool | None], None],
        *,
        generation: int,
        token: int = 0,
    ) -> None:
        self._rules = rules
        self._report = report
        self.generation: int = generation
        self.token: int = token
        self.steady: bool = False
        self.silent: bool = False

    @property
    def probe(self) -> bool:
        """Whether it is one of the few of a half-open circuit."""
        return bool(self.token)

    def success(self, result: object = None) -> None:
        """The call returned."""
        if not self.silent:
            self._settle(self._rules.blames_result, result)

    def failure(self, error: Exception) -> None:
        """The call raised."""
        self._settle(self._rules.blames, error)

    def release(self) -> None:
        """The call was given up before it had an outcome: cancelled, interrupted, never made."""
        if self.token:
            self._report(self, None)

    def _settle(self, blames: Callable[[Any], bool | None], outcome: object) -> None:
        try:
            failed = blames(outcome)
        except BaseException:
            self.release()
            raise
        if self.token or failed or (failed is not None and not self.steady):
            self._report(self, failed)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.success()
        elif isinstance(error, Exception):
            self.failure(error)
        else:
            self.release()

    def __repr__(self) -> str:
        state = "disabled" if self is FREE else "closed"
        return f"<Permit {'for a probe' if self.probe else f'of a {state} circuit'}>"


SETTLED: Final = -1
"""No generation, so that nothing more is counted."""
FREE: Final = Permit(BreakerRules(), lambda permit, failed: None, generation=SETTLED)
"""What a disabled circuit gives to every call."""
FREE.steady = FREE.silent = True


# --- states ---------------------------------------------------------------------------------------

_SECOND: Final = 1_000_000_000
_GRAIN: Final = 1e-6
"""A call that comes so many seconds early is on time: sums of binary fractions drift."""


class CircuitState(StrEnum):
    """What a circuit breaker does with a call.

    Attributes:
        CLOSED: Calls go through, failures are counted.
        OPEN: Calls are refused until the open time is over.
        HALF_OPEN: A few calls go through as probes and decide what comes next.
        FORCED_OPEN: Calls are refused until the circuit is closed by hand.
        DISABLED: Calls go through and nothing is counted.
    """

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    FORCED_OPEN = "forced_open"
    DISABLED = "disabled"


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitStats:
    """How a circuit stood when it was asked.

    Attributes:
        state: Its state.
        failures: Failures that count at present: in a row, or in the window.
        calls: Calls in the window; as many as failures where these are counted in a row.
        probes: Probes under way.
        opened: How often it has opened.
        refused: Calls it has refused.
        retry_after: Seconds until it may let a call through; None if it does now, or is held open by hand.
    """

    state: CircuitState
    failures: int
    calls: int
    probes: int
    opened: int
    refused: int
    retry_after: float | None


class Transition(NamedTuple):
    """A step from one state to another, and how long the new one refuses calls, if it is known."""

    old: CircuitState
    new: CircuitState
    retry_after: float | None


_STATES: Final = tuple(CircuitState)
_STATUS, _OPENED, _REFUSED, _RECOVERIES, _SUCCESSES, _SINCE, _UNTIL = range(7)
_PROBES: Final = 7
_MOST_PROBES: Final = 1000
_STATE_BITS: Final = 3


class BreakerState:
    """The states and what leads from one to the other.

    Each stay in a state is a *generation*: an outcome counts only in the generation in which its call was admitted. A
    late answer from before the circuit opened neither closes it nor opens it once more.

    Everything is in whole numbers (cells), in memory or in a mapped file: the state and the generation in one of them,
    so that both can be read at once; times in nanoseconds; token and start of each probe; and those of the counter.

    Args:
        rules: The options.

    Attributes:
        cells: As above, all 0 at first.
        transitions: Steps that listeners have not been notified of yet.

    Example:
        >>> breaker = BreakerState(BreakerRules(fail_max=1, reset_timeout=30, jitter=0))
        >>> breaker.ended(breaker.generation, now=0.0, failed=True)
        >>> breaker.state, breaker.wait(now=10.0), breaker.wait(now=30.0)
        (<CircuitState.OPEN: 'open'>, 20.0, None)
        >>> breaker.state
        <CircuitState.HALF_OPEN: 'half_open'>
    """

    def __init__(self, rules: BreakerRules) -> None:
        self.rules = rules
        self.transitions: deque[Transition] = deque()
        self._counter = rules.counter()
        self._most_probes = min(rules.half_open_max, _MOST_PROBES)
        self._end = _PROBES + 2 * self._most_probes
        self.use(new_cells(self._end + self._counter.size))

    def use(self, cells: memoryview) -> None:
        """Go on with the state in other cells."""
        self.cells: memoryview = cells
        self._counted = cells[self._end :]

    @property
    def state(self) -> CircuitState:
        """Where it stands. An open time that is over is noticed by `settle`."""
        return _STATES[self.cells[_STATUS] % (1 << _STATE_BITS)]

    @property
    def generation(self) -> int:
        """Number of this stay."""
        return self.cells[_STATUS] >> _STATE_BITS

    @property
    def closed_generation(self) -> int | None:
        """The generation if the circuit is closed; may be asked without a lock."""
        status = self.cells[_STATUS]
        return None if status % (1 << _STATE_BITS) else status >> _STATE_BITS

    @property
    def steady(self) -> bool:
        """Whether a success would change no count: failures count in a row, and the last call was none."""
        return self.rules.failure_rate is None and not self._counted[0]

    def sums(self, now: float) -> tuple[int, int]:
        """Return the calls and the failures that count in this generation."""
        return self._counter.sums(self._counted, now)

    def _enter(self, state: CircuitState, *, since: float = 0.0, seconds: float = 0.0) -> None:
        cells, old = self.cells, self.state
        opens = state is CircuitState.OPEN
        # A process that is killed after this store leaves a new generation, closed where that is the old state.
        cells[_STATUS] = self.generation + 1 << _STATE_BITS | _STATES.index(state)
        cells[_SINCE], cells[_UNTIL] = _nanoseconds(since), _nanoseconds(since + seconds)
        cells[_SUCCESSES] = 0
        for place in range(_PROBES, len(cells)):
            cells[place] = 0
        if state is not old:
            cells[_OPENED] += opens or state is CircuitState.FORCED_OPEN
            self.transitions.append(Transition(old, state, seconds if opens else None))

    # --- by hand --------------------------------------------------------------------------------

    def close(self) -> None:
        """Let calls through and start counting afresh."""
        self.cells[_RECOVERIES] = 0
        self._enter(CircuitState.CLOSED)

    def reset(self) -> None:
        """Close it and forget its statistics too."""
        self.close()
        self.cells[_OPENED] = self.cells[_REFUSED] = 0

    def open(self, now: float) -> None:
        """Refuse calls for the open time, counted from now."""
        # Imported here: a circuit that never opens needs no randomness.
        from random import random

        draw = (self.rules.draw or random)()
        seconds = self.rules.open_seconds(self.cells[_RECOVERIES], draw)
        self._enter(CircuitState.OPEN, since=now, seconds=seconds)

    def force_open(self) -> None:
        """Refuse calls until further notice."""
        self._enter(CircuitState.FORCED_OPEN)

    def disable(self) -> None:
        """Let all calls through until further notice."""
        self._enter(CircuitState.DISABLED)

    # --- by calls and time ----------------------------------------------------------------------

    def _probes(self) -> dict[int, float]:
        """Return the probes under way: the cells of each, and when it started."""
        places = range(_PROBES, self._end, 2) if self.state is CircuitState.HALF_OPEN else ()
        return {place: self.cells[place + 1] / _SECOND for place in places if self.cells[place]}

    def add_probe(self, token: int, now: float) -> None:
        """Note a probe that starts; `wait` must have let it through."""
        cells = self.cells
        place = next(place for place in range(_PROBES, self._end, 2) if not cells[place])
        cells[place + 1] = _nanoseconds(now)
        cells[place] = token

    def end_probe(self, token: int | None) -> None:
        """Give the place of a probe back, or those of all (None); nothing happens if it has none any more."""
        for place in range(_PROBES, self._end, 2):
            if token in (None, self.cells[place]):
                self.cells[place] = 0

    def refuse(self) -> None:
        """Count a call that was refused."""
        self.cells[_REFUSED] += 1

    def settle(self, now: float) -> None:
        """Do what time has brought about: an open time is over, probes are lost."""
        since, until = self.cells[_SINCE] / _SECOND, self.cells[_UNTIL] / _SECOND
        # A clock that went back belongs to a test that is over; waiting for it could take hours.
        if self.state is CircuitState.OPEN and not since - _GRAIN <= now < until - _GRAIN:
            self._enter(CircuitState.HALF_OPEN)
        for place, started in self._probes().items():
            if not -_GRAIN <= now - started < self.rules.probe_seconds - _GRAIN:
                self.cells[place] = 0

    def wait(self, now: float) -> float | None:
        """Return the seconds until a call may be let through.

        Returns:
            None if it may now, infinity if that takes a hand. While probes are under way it is not known: until one
            of them counts as lost, but no longer than the first open time.
        """
        self.settle(now)
        match self.state:
            case CircuitState.OPEN:
                return self.cells[_UNTIL] / _SECOND - now
            case CircuitState.FORCED_OPEN:
                return math.inf
            case CircuitState.HALF_OPEN:
                probes = self._probes()
                if len(probes) < self._most_probes:
                    return None
                left = min(probes.values()) + self.rules.probe_seconds - now
                return min(left, self.rules.first_open)
        return None

    def ended(self, generation: int, now: float, *, failed: bool) -> None:
        """Count a call of a generation."""
        if generation == self.closed_generation:
            self._counter.add(self._counted, now, 1, int(failed))
            # Only a failure can trip it.
            if failed and self.rules.trips(*self.sums(now)):
                self.open(now)
        elif generation == self.generation and self.state is CircuitState.HALF_OPEN:
            cells = self.cells
            cells[_RECOVERIES if failed else _SUCCESSES] += 1
            if failed:
                self.open(now)
            elif cells[_SUCCESSES] >= self.rules.success_threshold:
                self.close()

    def stats(self, now: float) -> CircuitStats:
        """Return how it stands."""
        wait = self.wait(now)
        calls, failures = self.sums(now)
        return CircuitStats(
            state=self.state,
            failures=failures,
            calls=calls,
            probes=len(self._probes()),
            opened=self.cells[_OPENED],
            refused=self.cells[_REFUSED],
            retry_after=wait if wait is not None and math.isfinite(wait) else None,
        )


def _nanoseconds(seconds: float) -> int:
    # As much as a cell holds, so that even a clock that counts from 1970 works.
    return round(min(seconds, 9e9) * _SECOND)
