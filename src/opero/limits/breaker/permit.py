# this_file: src/opero/limits/breaker/permit.py
"""Leave to make a call, and the way to tell how it ended."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

from opero.limits.breaker.rules import Rules

__all__ = ["FREE", "Permit"]


class Permit:
    """Leave to make a call. Exactly one of its verbs is due when the call has ended.

    As a context manager it sees to that itself, but does not look at results.

    Attributes:
        generation: The stay in a state in which it was given.
        steady: Whether a success would change no count at present.
        silent: Whether a success need not even be told, because nobody judges results either.
        probe: Whether it is one of the few of a half-open circuit.
        spent: Whether this probe's outcome is known; a second one is not counted.
    """

    __slots__ = ("_report", "_rules", "generation", "probe", "silent", "spent", "steady")

    def __init__(
        self,
        rules: Rules,
        report: Callable[[Permit, bool | None], None],
        *,
        generation: int,
        probe: bool = False,
    ) -> None:
        self._rules = rules
        self._report = report
        self.generation: int = generation
        self.probe: bool = probe
        self.steady: bool = False
        self.silent: bool = False
        self.spent: bool = False

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
        if self.probe:
            self._report(self, None)

    def _settle(self, blames: Callable[[Any], bool | None], outcome: object) -> None:
        try:
            failed = blames(outcome)
        except BaseException:
            self.release()
            raise
        if self.probe or failed or (failed is not None and not self.steady):
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
            if not self.steady:
                self._report(self, False)
        elif isinstance(error, Exception):
            self.failure(error)
        else:
            self.release()

    def __repr__(self) -> str:
        return f"<Permit {'for a probe' if self.probe else 'of a closed circuit'}>"


class _FreePermit(Permit):
    """A permit whose outcome interests nobody."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(Rules(), _ignore, generation=-1)
        self.steady = self.silent = True

    def failure(self, error: Exception) -> None:
        """Do nothing."""

    def __repr__(self) -> str:
        return "<Permit of a disabled circuit>"


def _ignore(permit: Permit, failed: bool | None) -> None:
    """Count nothing."""


FREE: Final[Permit] = _FreePermit()
"""What a disabled circuit gives to everybody."""
