# this_file: src/opero/limits/breaker_permits.py
"""Give calls the right to go through a circuit, and find breakers by name."""

from __future__ import annotations

import gc
from collections.abc import Callable
from threading import RLock
from types import TracebackType
from typing import Any, Final
from weakref import WeakValueDictionary

from opero.errors import OperoUsageError
from opero.limits.breaker_state import BreakerRules
from opero.utils.fork import run_after_fork

__all__ = ["FREE", "Permit", "breaker_names"]

# --- permits --------------------------------------------------------------------------------------


class Permit:
    """The right to make a call. Exactly one of its verbs is due when the call has ended.

    As a context manager it sees to that itself, but does not look at results.

    Attributes:
        generation: The stay in a state in which it was given.
        steady: Whether a success would change no count at present.
        silent: Whether a success need not even be reported, because results are not judged either.
        token: Identifies a probe (one of the few calls of a half-open circuit); 0 for other calls.
        settled: Whether this probe's outcome is known; a second one is not counted.
    """

    __slots__ = ("_report", "_rules", "generation", "settled", "silent", "steady", "token")

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
        self.settled: bool = False

    @property
    def probe(self) -> bool:
        """Whether it is one of the few of a half-open circuit."""
        return bool(self.token)

    def success(self, result: object = None) -> None:
        """The call returned."""
        if self.silent:
            return
        if self._rules.counts_result is not None:
            self._settle(self._rules.blames_result, result)
        elif not self.steady:
            self._report(self, False)

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.success()
        elif isinstance(error, Exception):
            self.failure(error)
        else:
            self.release()

    def __repr__(self) -> str:
        state = "disabled" if self.generation < 0 else "closed"
        return f"<Permit {'for a probe' if self.probe else f'of a {state} circuit'}>"


FREE: Final = Permit(BreakerRules(), lambda permit, failed: None, generation=-1)
"""What a disabled circuit gives to every call."""
FREE.steady = FREE.silent = True


# --- names ----------------------------------------------------------------------------------------


class BreakerNames:
    """The breakers of this process by the names that users gave them."""

    lock: RLock

    def __init__(self) -> None:
        self.live: WeakValueDictionary[str, Any] = WeakValueDictionary()
        self.kept: dict[str, Any] = {}
        self.renew_lock()

    def renew_lock(self) -> None:
        """Make a new lock, because a thread of a forked child's parent may hold the old one."""
        self.lock = RLock()

    def add(self, name: str, breaker: object) -> None:
        """Register a new breaker.

        Raises:
            OperoUsageError: There is a live one of its name.
        """
        with self.lock:
            if name in self.live:
                # One that is used no more may only wait for the collector.
                gc.collect()
            if name in self.live:
                raise OperoUsageError(
                    f"there is a circuit breaker {name!r} already: write CircuitBreaker.named({name!r}) for that one, "
                    "or take another name."
                )
            self.live[name] = breaker


breaker_names: Final = BreakerNames()
run_after_fork(breaker_names.renew_lock)
