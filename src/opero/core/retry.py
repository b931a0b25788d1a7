# this_file: src/opero/core/retry.py
"""Retry: make another attempt after a failed one, after a pause, and report how the call has ended."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from opero import events
from opero.core.call import RetryParked
from opero.core.deadline import overdue
from opero.core.failures import inner_of
from opero.core.function import used_up
from opero.core.options import standalone
from opero.errors import Rejected, asks, is_final, matches, warn_user
from opero.utils import ambient
from opero.utils.ambient import switch
from opero.utils.lazy import NamedTuple
from opero.utils.units import format_seconds, parse_seconds

if TYPE_CHECKING:
    from opero.core.call import AsyncProceed, Call, Proceed
    from opero.core.circuit_breaker import Circuit
    from opero.core.decorated import Decorate
    from opero.core.failures import Report
    from opero.core.options import Options
    from opero.core.retry_budget import RetryBudget
    from opero.errors import RetryFilter
    from opero.utils.units import Duration


def grown(low: float, high: float, factor: float, exponent: int) -> float:
    """Return `low` after so many steps of growth, at most `high`.

    Example:
        >>> grown(1.0, high=30.0, factor=2.0, exponent=2)
        4.0
    """
    try:
        return min(high, low * factor**exponent)
    except OverflowError:
        # factor^10000 is more than a float holds, and long past any cap; zero stays zero however often it grows.
        return high if low else 0.0


class RetryPolicy(NamedTuple):
    """When to try again and how long to wait, as tenacity strategies where they matter.

    Attributes:
        retries: Attempts after the first; ignored where `stop` is given.
        min_delay, max_delay, backoff_factor, jitter: The pauses, in seconds; ignored where `wait` is given.
        retry_on: Type, tuple of types, predicate on the exception, tenacity retry strategy, "default" or
            "transient".
        wait, stop: tenacity strategies of the user's.
        retry_after_max: Longest pause that a service may ask for, in seconds.
    """

    retries: int = 3
    min_delay: float = 0.1
    max_delay: float = 30.0
    backoff_factor: float = 1.5
    jitter: bool = True
    retry_on: Any = "default"
    wait: Callable[[Any], float] | None = None
    stop: Callable[[Any], bool] | None = None
    retry_after_max: float = 60.0

    @classmethod
    def of(cls, options: Options) -> RetryPolicy:
        """Make the policy that the options describe."""
        values = {name: getattr(options, name) for name in cls._fields}
        for name in ("min_delay", "max_delay", "retry_after_max"):
            values[name] = parse_seconds(values[name], name)
        return cls(**values)

    def retries_on(self, error: Exception) -> bool:
        """Return whether an error is one that `retry_on` means, outside of any call."""
        return RetryState(self).wants(error)

    def longest_pause(self, retry: int) -> float:
        """Return the longest pause before retry number `retry`, from 1, in seconds."""
        exponent = retry if self.jitter else retry - 1
        return grown(self.min_delay, self.max_delay, self.backoff_factor, exponent)

    def pause(self, retry: int) -> float:
        """Return the pause before retry number `retry`, from 1, in seconds.

        It is drawn uniformly from [min_delay, min(max_delay, min_delay · factor^retry)]: exponential
        backoff whose lower bound keeps a minimum distance, after "Exponential Backoff And Jitter" (M.
        Brooker, AWS Architecture Blog, 2015). Without jitter it is min(max_delay, min_delay · factor^(retry-1)).
        """
        longest = self.longest_pause(retry)
        if not self.jitter:
            return longest
        import random

        return random.uniform(self.min_delay, longest)

    def pauses(self) -> tuple[float, float]:
        """Shortest and longest sum of all pauses of a call that fails to the end, in seconds."""
        longest = [self.longest_pause(1 + n) for n in range(min(self.retries, 1000))]
        return self.min_delay * len(longest) if self.jitter else sum(longest), sum(longest)


class RetryState:
    """What a retry knows: small and picklable, so that a map can park it and a journal can keep it.

    tenacity's strategies read it as their own `RetryCallState`, whose names it has. It knows no
    arguments of the call, which may be secret.

    Attributes:
        policy: The rules.
        attempt_number: Attempts begun.
        start_time: Clock reading at the start of the first attempt, or at its failure where the start was not needed.
        outcome_timestamp: Clock reading at the end of the last attempt.
        idle_for: Seconds of pauses so far.
        upcoming_sleep: The pause that `stop` is asked about, in seconds.
        remark: Why there is no other attempt, where opero's own rules say so; one more line of the note.
    """

    fn: None = None
    retry_object: None = None
    next_action: None = None
    args: tuple[Any, ...] = ()
    upcoming_sleep: float = 0.0
    remark: str | None = None

    def __init__(
        self,
        policy: RetryPolicy,
        attempt_number: int = 1,
        start_time: float = 0.0,
        idle_for: float = 0.0,
    ) -> None:
        self.policy: RetryPolicy = policy
        self.attempt_number: int = attempt_number
        self.start_time: float = start_time
        self.outcome_timestamp: float = start_time
        self.idle_for: float = idle_for
        self.kwargs: dict[str, Any] = {}
        self._error: Exception | None = None

    @property
    def seconds_since_start(self) -> float:
        """Seconds from the start of the first attempt to the end of the last one."""
        return self.outcome_timestamp - self.start_time

    @property
    def outcome(self) -> Any:
        """How the last attempt has ended, as a `tenacity.Future`."""
        from tenacity import Future

        future = Future(self.attempt_number)
        if isinstance(self._error, Rejected):
            future.set_result(self._error.value)
        else:
            future.set_exception(self._error)
        return future

    def wants(self, error: Exception) -> bool:
        """Return whether one error of an attempt is a reason for another attempt."""
        wanted = self.policy.retry_on
        if isinstance(error, Rejected):
            return True
        if isinstance(wanted, str):
            from opero.core.classify import classify

            verdict = classify(error)
            return verdict.kind == "transient" if wanted == "transient" else not verdict.ends_value
        # A strategy of tenacity's asks for a state. Where there is one, tenacity is loaded.
        if isinstance(wanted, getattr(sys.modules.get("tenacity.retry"), "retry_base", ())):
            self._error = error
            return asks(cast("Callable[[Any], object]", wanted), self)
        return matches(wanted, error)

    def next_delay(
        self,
        error: Exception,
        *,
        now: float,
        attempt_errors: Sequence[Exception] = (),
        hint: float = 0.0,
    ) -> float | None:
        """Begin another attempt: count it and return the pause before it, in seconds; None if there is none.

        Args:
            error: What the attempt ended with.
            now: Clock reading.
            attempt_errors: All errors of the attempt, where it tried several values; one that matches
                `retry_on` is enough.
            hint: Seconds that the service asked to wait; the pause is no shorter.
        """
        if is_final(error, attempt_errors):
            return None
        known = attempt_errors and attempt_errors[-1] is error
        errors = attempt_errors if known else [*attempt_errors, error]
        self.outcome_timestamp = now
        try:
            if not any(map(self.wants, errors)):
                self.remark = _not_wanted(self.policy.retry_on, error)
                return None
            self._error = error
            # As in tenacity, the pause comes first: `stop_before_delay` asks whether it still fits.
            self.upcoming_sleep = max(0.0, hint, self._pause())
            if self._spent():
                return None
        finally:
            # The error's traceback leads to the call, and that to this state: a reference cycle.
            self._error = None
            del error, attempt_errors, errors
        self.attempt_number += 1
        self.idle_for += self.upcoming_sleep
        return self.upcoming_sleep

    def _pause(self) -> float:
        if self.policy.wait is not None:
            try:
                seconds = float(self.policy.wait(self))
                if math.isfinite(seconds):
                    return seconds
                raise ValueError(seconds)  # noqa: TRY301 - one fault of a strategy like the others
            except Exception as error:  # noqa: BLE001 - the call's own outcome goes before a broken strategy
                _warn_of("wait", error, "the usual pauses are used instead")
        return self.policy.pause(self.attempt_number)

    def _spent(self) -> bool:
        try:
            return bool((self.policy.stop or _stop_after(self.policy.retries + 1))(self))
        except Exception as error:  # noqa: BLE001 - the call's own outcome goes before a broken strategy
            _warn_of("stop", error, "no more attempts are made")
            return True


def _warn_of(option: str, error: Exception, consequence: str) -> None:
    warn_user(f"the {option} strategy raised {type(error).__name__}: {consequence}")


def _not_wanted(wanted: object, error: Exception) -> str | None:
    """Say why opero's own rules make no other attempt after an error, and how to ask for one."""
    if not isinstance(wanted, str):
        return None
    from opero.core.classify import classify

    verdict = classify(error)
    if verdict.kind == "unknown":
        return f'{type(error).__name__} is not known to pass, and retry_on="transient"'
    answer = "says that the budget is spent" if verdict.kind == "exhausted" else "is a final answer"
    return f"{verdict.reason} {answer}; retry_on=Exception retries that too"


# --- tenacity, which is loaded when the first call fails -----------------------------------------


@functools.cache
def _stop_after(attempts: int) -> Callable[[Any], bool]:
    """Return the stop strategy of so many attempts."""
    from tenacity.stop import stop_after_attempt

    return stop_after_attempt(attempts)


def retry_error(error: Exception, attempts: int) -> Exception:
    """Return the `tenacity.RetryError` that stands for the last error of so many attempts."""
    from tenacity import Future, RetryError

    last = Future(attempts)
    last.set_exception(error)
    return RetryError(last)


def is_retry_error(error: Exception) -> bool:
    """Return whether an error is tenacity's own, which stands for another one already."""
    from tenacity import RetryError

    return isinstance(error, RetryError)


# --- stage ----------------------------------------------------------------------------------------

_MOST_NAMES: Final = 5
"""Functions within that `explain()` names."""


class Retry:
    """The stage: runs attempts until one succeeds or the policy ends the call, and reports how it has ended.

    It stands just inside the cache, so that it sees each computed call once. Without retries it only reports.

    Args:
        policy: The rules; None for a single attempt.
        report: Reports how calls of the function have ended; has its counters and its emitter.
        budget: Retries that it shares with other functions, or None.
        nested: Whether to retry what another opero function, called by this one, has retried in
            vain.

    Attributes:
        within: Names of such functions, as far as they are known.
        circuit: Breaker that each call passes, or None; no pause is made only to be refused by it.
    """

    name = "retry"

    def __init__(
        self,
        policy: RetryPolicy | None,
        report: Report,
        *,
        budget: RetryBudget | None = None,
        nested: bool = True,
    ) -> None:
        self.policy = policy
        self.budget = budget
        self.within: dict[str, None] = {}
        self.circuit: Circuit | None = None
        self._report = report
        self._nested = nested
        self._info = report.info
        self._stats = report.stats
        self._emitter = report.emitter

    def describe(self) -> str:
        """Return the line for `explain()`, nothing without retries."""
        policy = self.policy
        if policy is None:
            return ""
        often = "until the given stop" if policy.stop else f"1 + {policy.retries} attempts"
        if policy.wait:
            pauses = "pauses by the given wait"
        elif policy.min_delay == 0:
            pauses = "no pauses"
        else:
            shown = [policy.longest_pause(1 + n) for n in range(min(3, policy.retries))]
            lead = f"{policy.min_delay:.3g} s to " if policy.jitter else ""
            more = ", …" if policy.retries > len(shown) else ""
            pauses = f"pause {lead}{', '.join(f'{s:.3g}' for s in shown)}{more} s"
        more = "" if self.budget is None else f"; at most {self.budget.describe()}"
        if self.within:
            names = ", ".join(f"{name}()" for name in self.within)
            then = "so calls multiply" if self._nested else "and that is not retried again"
            more += f"; {names} within it retries too, {then}"
        return f"{often} on {_named(policy.retry_on)}, {pauses}{more}"

    def before_next(self, call: Call, error: Exception) -> float | None:
        """Return the pause before the next attempt; None if there is none, and then the call's remark may say why."""
        policy = self.policy
        # What was handed out of a stream cannot be taken back.
        if policy is None or call.items or ambient.disabled():
            return None
        inner, now = self._inner(call, error), ambient.clock().monotonic()
        state: RetryState | None = call.retry
        if state is None:
            started = now if call.started is None else call.started
            state = call.retry = RetryState(policy, call.attempts, started, call.slept)
        delay, remark = None, self._asked_too_much(call, error, policy.retry_after_max)
        if remark is None and inner is not None and not self._nested:
            remark = f"{inner}() within it had retried, and retry_nested=False"
        if remark is None:
            errors = call.attempt_errors or ()
            delay = state.next_delay(error, now=now, attempt_errors=errors, hint=call.hint)
            remark = state.remark if delay is None else self._obstacle(call, delay, now)
        if remark is not None:
            call.remark = remark
        if delay is None or remark is not None:
            return None
        call.attempts = state.attempt_number
        call.attempt_errors = None
        self._stats.add(retries=1)
        emitter = self._emitter
        if emitter.active:
            if inner is not None:
                emitter.emit(events.RetriesNested(inner=inner))
            emitter.emit(events.RetryScheduled(attempt=call.attempts, delay=delay))
        return delay

    def _inner(self, call: Call, error: Exception) -> str | None:
        """Return the name of an opero function that has retried in vain in each call of this attempt."""
        found = [inner_of(e, self._info.owner) for e in call.attempt_errors or (error,)]
        for each in found:
            if each is not None and len(self.within) < _MOST_NAMES:
                self.within[each.name] = None
        last = found[-1]
        return None if last is None or None in found else last.name

    @staticmethod
    def _asked_too_much(call: Call, error: Exception, longest: float) -> str | None:
        """Note the pause that the service asks for; return why it is too long."""
        call.hint = 0.0
        if call.has_alternatives:
            return None  # the other values need not wait for this one
        # Loaded at the first failure.
        from opero.core.retry_after import requested_wait

        hint = requested_wait(error.value if isinstance(error, Rejected) else error)
        if hint is None:
            return None
        call.hint = hint.seconds
        if hint.seconds <= longest:
            return None
        return (
            f"the service asks to wait {format_seconds(hint.seconds)} ({hint.source}), longer than "
            f"retry_after_max={format_seconds(longest)}"
        )

    def _obstacle(self, call: Call, delay: float, now: float) -> str | None:
        """Return why there is no other attempt, although it is wanted; else take it out of the budget."""
        if call.deadline is not None and now + delay >= call.deadline:
            overdue(call, self._emitter, "before the next attempt")
            end = f"the end of a pause of {format_seconds(delay)}"
            return f"the deadline comes before {end if delay else 'the next attempt'}"
        name = self._info.single_use_argument(call.args, call.kwargs)
        if name is not None:
            return used_up(name)
        refused = None if self.circuit is None else self.circuit.outlasts(call, delay)
        if refused is not None or self.budget is None or self.budget.withdraw():
            return refused
        if self._emitter.active:
            self._emitter.emit(events.RetryBudgetSpent(budget=self.budget.name))
        return f"no retry is left in {self.budget!r}"

    def slept(self, call: Call, seconds: float) -> None:
        """Take note of a pause that is over."""
        call.slept += seconds
        self._stats.add(slept=seconds)

    def _park(self, call: Call, delay: float) -> None:
        """Raise if the pause is not to be made here."""
        if delay > call.park_after:
            self.slept(call, delay)
            raise RetryParked(delay)

    # --- adapters -----------------------------------------------------------------------------------

    def _begin(self, call: Call) -> None:
        """Take note of a call that begins; one that was parked in a pause has been counted."""
        if self._report.needs_start and call.started is None:
            call.started = ambient.clock().monotonic()
        if self.budget is not None and call.attempts == 1:
            self.budget.deposit()

    def wrap_sync(self, proceed: Proceed) -> Proceed:
        """Put the stage before `proceed`."""
        report, begins = self._report, self._report.needs_start or self.budget is not None
        listened = bool(self._emitter.listeners)

        def run(call: Call) -> Any:
            if begins:
                self._begin(call)
            try:
                while True:
                    try:
                        value = proceed(call)
                        break
                    except Exception as error:
                        # Raised while it is handled: later, its context would be replaced by what the caller is
                        # handling.
                        if (delay := self.before_next(call, error)) is None:
                            raise
                    if delay > 0:
                        self._park(call, delay)
                        ambient.clock().sleep(delay)
                        self.slept(call, delay)
            except Exception as error:
                report.conclude(call, error)
                raise
            if call.stream is not None:
                call.stream.at_end(functools.partial(report.stream_ended, call))
            elif listened or switch.on:
                report.succeeded(call)
            return value

        return run

    def wrap_async(self, proceed: AsyncProceed) -> AsyncProceed:
        """Put the stage before `proceed`, for an event loop."""
        report, begins = self._report, self._report.needs_start or self.budget is not None
        listened = bool(self._emitter.listeners)

        async def run(call: Call) -> Any:
            if begins:
                self._begin(call)
            try:
                while True:
                    try:
                        value = await proceed(call)
                        break
                    except Exception as error:
                        # As above.
                        if (delay := self.before_next(call, error)) is None:
                            raise
                        if 0 < delay <= call.park_after:
                            ambient.require_loop("pause before a retry")
                    if delay > 0:
                        self._park(call, delay)
                        await ambient.clock().asleep(delay)
                        self.slept(call, delay)
            except Exception as error:
                report.conclude(call, error)
                raise
            if listened or switch.on:
                report.succeeded(call)
            return value

        return run


def _named(wanted: Any) -> str:
    if isinstance(wanted, str):
        return "any error but final answers" if wanted == "default" else "transient errors"
    if isinstance(wanted, type):
        return wanted.__name__
    if isinstance(wanted, tuple):
        return " or ".join(kind.__name__ for kind in wanted)
    return f"what {getattr(wanted, '__name__', type(wanted).__name__)} accepts"


# --- on its own ------------------------------------------------------------------------------------


def get_retry_decorator(
    retries: int = 3,
    backoff_factor: float = 1.5,
    min_delay: Duration = 0.1,
    max_delay: Duration = 30,
    retry_on: RetryFilter = "default",
    **options: Any,
) -> Decorate:
    """Return a decorator that only retries.

    Args:
        retries: Calls made after the first one failed.
        backoff_factor: Growth of the pause from one retry to the next.
        min_delay: Shortest pause before a retry.
        max_delay: Longest pause before a retry.
        retry_on: Type, tuple of types, or predicate; "default": every Exception but final answers; "transient".
        options: jitter, retry_if_result, wait, stop, retry_after_max, retry_budget, retry_nested.

    Example:
        >>> from opero.testing import flaky
        >>> get_retry_decorator(retries=2, min_delay=0)(flaky("ok", failures=2))()
        'ok'
    """
    made: Decorate = standalone(
        "get_retry_decorator",
        "retry",
        retries=retries,
        backoff_factor=backoff_factor,
        min_delay=min_delay,
        max_delay=max_delay,
        retry_on=retry_on,
        **options,
    )
    return made
