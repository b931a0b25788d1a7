# this_file: src/opero/limits/breaker/machine.py
"""The states of a circuit and what leads from one to the other.

Pure: readings of the clock are handed in, randomness too; nothing here locks, waits or tells
anybody. Times are seconds of a monotonic clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from opero.limits.breaker.rules import Rules

__all__ = ["Change", "CircuitState", "CircuitStats", "Machine"]

_GRAIN: Final = 1e-6
"""Who comes so many seconds early is on time: sums of binary fractions drift."""


class CircuitState(StrEnum):
    """What a circuit breaker does with a call.

    Attributes:
        CLOSED: Calls go through, failures are counted.
        OPEN: Calls are refused until the open time is over.
        HALF_OPEN: A few calls go through as probes and decide what comes next.
        FORCED_OPEN: Calls are refused until somebody closes the circuit by hand.
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
        retry_after: Seconds until it may let a call through; None if it does now, or if it is held
            open by hand.
    """

    state: CircuitState
    failures: int
    calls: int
    probes: int
    opened: int
    refused: int
    retry_after: float | None


class Change(NamedTuple):
    """A step from one state to another, and how long the new one refuses calls, if it is known."""

    old: CircuitState
    new: CircuitState
    retry_after: float | None


class Machine:
    """The states and what leads from one to the other.

    Each stay in a state is a *generation*: an outcome counts only in the generation in which its
    call was admitted. A late answer from before the circuit opened neither closes it nor opens it
    once more.

    Args:
        rules: The options.

    Attributes:
        state: Where it stands. An open time that is over is noticed by `settle`.
        generation: Number of this stay.
        tally: What was counted in it.
        probes: Probes under way: token and the time of its start.
        opened: How often it has opened.
        changes: Steps that nobody has been told yet.

    Example:
        >>> from opero.limits.breaker.rules import Rules
        >>> machine = Machine(Rules(fail_max=1, reset_timeout=30, jitter=0))
        >>> machine.failed(machine.generation, now=0.0)
        >>> machine.state, machine.wait(now=10.0), machine.wait(now=30.0)
        (<CircuitState.OPEN: 'open'>, 20.0, None)
        >>> machine.state
        <CircuitState.HALF_OPEN: 'half_open'>
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.generation = 0
        self.changes: deque[Change] = deque()
        self.opened = 0
        self.state = CircuitState.CLOSED
        self._failed_recoveries = 0
        self._enter(CircuitState.CLOSED)

    def _enter(self, state: CircuitState, *, since: float = 0.0, seconds: float = 0.0) -> None:
        old, self.state = self.state, state
        self.generation += 1
        self.tally = self.rules.tally()
        self.probes: dict[Hashable, float] = {}
        self._successes = 0
        self._since, self._until = since, since + seconds
        if state is not old:
            opens = state is CircuitState.OPEN
            self.opened += opens or state is CircuitState.FORCED_OPEN
            self.changes.append(Change(old, state, seconds if opens else None))

    # --- by hand --------------------------------------------------------------------------------

    def close(self) -> None:
        """Let calls through and start counting afresh."""
        self._failed_recoveries = 0
        self._enter(CircuitState.CLOSED)

    def open(self, now: float) -> None:
        """Refuse calls for the open time, counted from now."""
        # Imported here: a circuit that never opens needs no randomness.
        from random import random

        draw = (self.rules.draw or random)()
        seconds = self.rules.open_seconds(self._failed_recoveries, draw)
        self._enter(CircuitState.OPEN, since=now, seconds=seconds)

    def force_open(self) -> None:
        """Refuse calls until further notice."""
        self._enter(CircuitState.FORCED_OPEN)

    def disable(self) -> None:
        """Let all calls through until further notice."""
        self._enter(CircuitState.DISABLED)

    # --- by calls and time ----------------------------------------------------------------------

    def settle(self, now: float) -> None:
        """Do what time has brought about: an open time is over, probes are lost, counts too old."""
        self.tally.settle(now)
        # A clock that went back belongs to a test that is over; waiting for it could take hours.
        if self.state is CircuitState.OPEN and not self._since <= now < self._until - _GRAIN:
            self._enter(CircuitState.HALF_OPEN)
        if self.state is CircuitState.HALF_OPEN:
            # Over a list of the keys, because a probe may be given back at any time.
            for probe in list(self.probes):
                if not 0 <= now - self.probes.get(probe, now) < self.rules.probe_seconds - _GRAIN:
                    self.probes.pop(probe, None)

    def wait(self, now: float) -> float | None:
        """Return the seconds until a call may be let through.

        Returns:
            None if it may now, infinity if that takes a hand. While probes are under way nobody
            knows: until one of them counts as lost, but no longer than the first open time.
        """
        self.settle(now)
        match self.state:
            case CircuitState.OPEN:
                return self._until - now
            case CircuitState.FORCED_OPEN:
                return math.inf
            case CircuitState.HALF_OPEN if len(self.probes) >= self.rules.half_open_max:
                begun = min(self.probes.get(probe, now) for probe in list(self.probes))
                return min(begun + self.rules.probe_seconds - now, self.rules.first_open)
        return None

    def succeeded(self, generation: int, now: float) -> None:
        """Count a success."""
        if generation != self.generation:
            return
        if self.state is CircuitState.HALF_OPEN:
            self._successes += 1
            if self._successes >= self.rules.success_threshold:
                self.close()
        else:
            self.tally.succeeded(now)

    def failed(self, generation: int, now: float) -> None:
        """Count a failure."""
        if generation != self.generation:
            return
        if self.state is CircuitState.HALF_OPEN:
            self._failed_recoveries += 1
            self.open(now)
        elif self.state is CircuitState.CLOSED and self.tally.failed(now):
            self.open(now)
