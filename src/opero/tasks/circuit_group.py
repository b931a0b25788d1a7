# this_file: src/opero/tasks/circuit_group.py
"""Run a sequence behind a circuit breaker."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opero.core.call import Call
from opero.core.circuit_breaker import Circuit
from opero.errors import OperoUsageError
from opero.events.bus import Emitter
from opero.limits.breaker import CircuitBreaker
from opero.tasks.task import Returns, Runnable, Sequence

if TYPE_CHECKING:
    from opero.limits.breaker import CircuitState
    from opero.tasks.state import TaskRun
    from opero.utils.units import Duration

__all__ = ["CircuitGroup"]


class CircuitGroup(Sequence):
    """Steps behind a circuit breaker: after too many failed runs they are not called for a while.

    It runs its steps as a `Sequence` does. A run that fails counts as one failure, and ends with its own error, also
    the one that opens the circuit; while that is open, runs end at once with `CircuitOpenError`. All runs of the
    group share the breaker.

    Args:
        steps: As for `Sequence`.
        fail_max: Runs in a row that may fail; 5 by default.
        reset_timeout: How long the circuit stays open; 30 s by default.
        breaker: A breaker with further rules, maybe shared, instead of these two.
        returns: As for `Sequence`.
        name: Shown in events and errors, the breaker's too; the names of the steps by default.

    Raises:
        OperoUsageError: Something is no step, or a rule is wrong.

    Example:
        >>> from opero.tasks import CircuitGroup, run_sync
        >>> from opero.testing import flaky
        >>> group = CircuitGroup(flaky("ok", failures=9), fail_max=1, reset_timeout="1m", name="shop")
        >>> for _ in range(2):
        ...     try:
        ...         run_sync(group)
        ...     except Exception as error:
        ...         print(type(error).__name__)
        ConnectionError
        CircuitOpenError
        >>> group.breaker.state
        <CircuitState.OPEN: 'open'>
    """

    def __init__(
        self,
        *steps: Runnable | Callable[..., Any],
        fail_max: int | None = None,
        reset_timeout: Duration | None = None,
        breaker: CircuitBreaker | None = None,
        returns: Returns = "all",
        name: str | None = None,
    ) -> None:
        super().__init__(*steps, returns=returns, name=name)
        rules: dict[str, Any] = {"fail_max": fail_max, "reset_timeout": reset_timeout}
        rules = {rule: value for rule, value in rules.items() if value is not None}
        if breaker is not None and rules:
            raise OperoUsageError(
                f"{next(iter(rules))}= and breaker= exclude each other: give the rule to the CircuitBreaker."
            )
        self.breaker: CircuitBreaker = (
            CircuitBreaker.unregistered(self.name, **rules) if breaker is None else breaker
        )
        self._guarded = Circuit(self.breaker, Emitter(self.name)).wrap_async(_proceed)

    @property
    def current_state(self) -> CircuitState:
        """State of the circuit: `group.breaker.state`."""
        return self.breaker.state

    async def execute(self, run: TaskRun) -> Any:
        """Do the work of a run."""
        call = Call((self, run), {})
        try:
            return await self._guarded(call)
        finally:
            # The run will hold the error that passes through these frames.
            call.args = ()
            del run


async def _proceed(call: Call) -> Any:
    """Run the steps, behind the breaker."""
    return await Sequence.execute(*call.args)
