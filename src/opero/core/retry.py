# this_file: src/opero/core/retry.py
"""Retry: after a failed attempt, make another one after a pause.

The first attempt costs nothing: what decides is asked at the first failure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from opero import events
from opero.core.call import Pause
from opero.core.deadline import overdue
from opero.core.failures import inner_of
from opero.core.retry_state import RetryPolicy, RetryState, grown, pause_bounds
from opero.utils import ambient
from opero.utils.matching import Rejected
from opero.utils.units import format_seconds

if TYPE_CHECKING:
    from opero.core.call import AsyncProceed, Call, Proceed
    from opero.core.circuit_breaker import Circuit
    from opero.core.function import FunctionInfo
    from opero.core.retry_budget import RetryBudget
    from opero.core.stats import Stats
    from opero.events.bus import Emitter

__all__ = ["Retry", "RetryPolicy", "RetryState", "pause_bounds"]

_MOST_NAMES: Final = 5
"""Functions within that `explain()` names."""


class Retry:
    """The stage: runs an attempt and, only if it failed, asks the policy what comes next.

    Args:
        policy: The rules.
        info: The function.
        stats: Its counters.
        emitter: Where its events go.
        budget: Retries that it shares with other functions, or None.
        nested: Whether to retry what another opero function, called by this one, has retried in
            vain.

    Attributes:
        within: Names of such functions, as far as they are known.
        circuit: Breaker that each call passes, or None; nobody pauses only to be refused by it.
    """

    name = "retry"

    def __init__(
        self,
        policy: RetryPolicy,
        info: FunctionInfo,
        stats: Stats,
        emitter: Emitter,
        *,
        budget: RetryBudget | None = None,
        nested: bool = True,
    ) -> None:
        self.policy = policy
        self.budget = budget
        self.within: dict[str, None] = {}
        self.circuit: Circuit | None = None
        self._nested = nested
        self._owner = info.owner
        self._stats = stats
        self._emitter = emitter

    def describe(self) -> str:
        """Return the line for `explain()`."""
        policy = self.policy
        often = "until the given stop" if policy.stop else f"1 + {policy.retries} attempts"
        if policy.wait:
            pauses = "pauses by the given wait"
        elif policy.low == 0:
            pauses = "no pauses"
        else:
            bounds = [pause_bounds(n, policy.low, policy.high, policy.factor)[1] for n in (1, 2, 3)]
            fixed = [grown(policy.low, policy.high, policy.factor, n) for n in (0, 1, 2)]
            shown = (bounds if policy.jitter else fixed)[: policy.retries]
            lead = f"{policy.low:.3g} s to " if policy.jitter else ""
            more = ", …" if policy.retries > len(shown) else ""
            pauses = f"pause {lead}{', '.join(f'{s:.3g}' for s in shown)}{more} s"
        more = "" if self.budget is None else f"; at most {self.budget.describe()}"
        if self.within:
            names = ", ".join(f"{name}()" for name in self.within)
            told = "so calls multiply" if self._nested else "and that is not retried again"
            more += f"; {names} within it retries too, {told}"
        return f"{often} on {_named(policy.retry_on)}, {pauses}{more}"

    def before_next(self, call: Call, error: Exception) -> float:
        """Return the pause before the next attempt, or raise `error` when there is none."""
        try:
            inner = self._inner(call, error)
            if ambient.disabled() or self._asked_too_much(call, error):
                raise error
            if inner is not None and not self._nested:
                call.remark = f"{inner}() within it had retried, and retry_nested=False"
                raise error
            now = ambient.clock().monotonic()
            state: RetryState | None = call.retry
            if state is None:
                started = call.started if call.started is not None else now
                state = call.retry = RetryState(
                    self.policy,
                    attempt=call.attempts,
                    started=started,
                    slept=call.slept,
                    deadline=call.deadline,
                )
            state.value_index = call.value_index
            if call.hint:
                state.hints.append(call.hint)
            try:
                delay = state.next_delay(error, now=now, walk=call.walk or ())
            except Exception:
                if state.pause_refused is not None:
                    self._overdue(call, state.pause_refused)
                raise
            if self._refused_after(call, delay):
                raise error
            if self.budget is not None and not self.budget.withdraw():
                self._spent(call, self.budget)
                raise error
        finally:
            del error
        call.attempts = state.attempt
        call.walk = None
        self._stats.add(retries=1)
        if self._emitter.active:
            if inner is not None:
                self._emitter.emit(
                    events.RetriesNested(function=self._emitter.function, inner=inner)
                )
            self._emitter.emit(
                events.RetryScheduled(
                    function=self._emitter.function, attempt=state.attempt, delay=delay
                )
            )
        return delay

    def _inner(self, call: Call, error: Exception) -> str | None:
        """Return the name of an opero function that has retried in vain in each call of this attempt."""
        found = [inner_of(e, self._owner) for e in call.walk or (error,)]
        for each in found:
            if each is not None and len(self.within) < _MOST_NAMES:
                self.within[each.name] = None
        last = found[-1]
        return None if last is None or None in found else last.name

    def _refused_after(self, call: Call, pause: float) -> bool:
        """Take note of a circuit that will be open for longer than a pause; tell whether it will."""
        refusal = None if self.circuit is None else self.circuit.outlasts(call, pause)
        if refusal is not None:
            call.remark = refusal
        return refusal is not None

    def _spent(self, call: Call, budget: RetryBudget) -> None:
        """Take note that the call ends because there have been too many retries of late."""
        call.remark = f"no retry is left in {budget!r}"
        if self._emitter.active:
            self._emitter.emit(
                events.RetryBudgetSpent(function=self._emitter.function, budget=budget.name)
            )

    def _overdue(self, call: Call, pause: float) -> None:
        """Take note that the call ends because of its deadline, and why."""
        before = f"the end of a pause of {format_seconds(round(pause, 3))}"
        call.remark = f"the deadline comes before {before if pause else 'the next attempt'}"
        overdue(call, self._emitter, "before the next attempt")

    def _asked_too_much(self, call: Call, error: Exception) -> bool:
        """Take note of the pause that the service asks for; tell whether it is longer than anybody would wait."""
        call.hint = 0.0
        if call.several:
            return False  # the other values need not wait for this one
        # Loaded at the first failure.
        from opero.core.retry_after import requested_wait

        hint = requested_wait(error.value if isinstance(error, Rejected) else error)
        if hint is None:
            return False
        call.hint = hint.seconds
        if hint.seconds <= self.policy.longest_hint:
            return False
        call.remark = (
            f"the service asks to wait {format_seconds(hint.seconds)} ({hint.source}), longer than "
            f"retry_after_max={format_seconds(self.policy.longest_hint)}"
        )
        return True

    def slept(self, call: Call, seconds: float) -> None:
        """Take note of a pause that is over."""
        call.slept += seconds
        self._stats.add(slept=seconds)

    # --- adapters ----------------------------------------------------------------------------------------------------

    def wrap_sync(self, proceed: Proceed) -> Proceed:
        """Put the stage before `proceed`."""
        budget = self.budget

        def run(call: Call) -> Any:
            # A call that was parked in a pause has been counted.
            if budget is not None and call.attempts == 1:
                budget.deposit()
            while True:
                try:
                    return proceed(call)
                except Exception as error:  # noqa: BLE001 - the policy decides which ones are retried
                    # Asked while the error is handled, because raising it later would replace its context by what the
                    # caller is handling.
                    delay = self.before_next(call, error)
                if delay > 0:
                    if delay > call.patience:
                        self.slept(call, delay)
                        raise Pause(delay)
                    ambient.clock().sleep(delay)
                    self.slept(call, delay)

        return run

    def wrap_async(self, proceed: AsyncProceed) -> AsyncProceed:
        """Put the stage before `proceed`, for an event loop."""
        budget = self.budget

        async def run(call: Call) -> Any:
            if budget is not None and call.attempts == 1:
                budget.deposit()
            while True:
                try:
                    return await proceed(call)
                except Exception as error:  # noqa: BLE001 - the policy decides which ones are retried
                    # Asked while the error is handled, because raising it later would replace its context by what the
                    # caller is handling.
                    delay = self.before_next(call, error)
                if delay > 0:
                    if delay > call.patience:
                        self.slept(call, delay)
                        raise Pause(delay)
                    await ambient.clock().asleep(delay)
                    self.slept(call, delay)

        return run


def _named(wanted: Any) -> str:
    if isinstance(wanted, type):
        return wanted.__name__
    if isinstance(wanted, tuple):
        return " or ".join(kind.__name__ for kind in wanted)
    return f"what {getattr(wanted, '__name__', type(wanted).__name__)} accepts"
