# this_file: src/opero/core/retry.py
"""Retry: make another attempt after a failed one, after a pause, and report how the call has ended."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from opero import events
from opero.core.call import RetryParked
from opero.core.deadline import overdue
from opero.core.failures import inner_of
from opero.core.function import used_up
from opero.core.options import standalone
from opero.errors import Rejected, asks, is_final, matches, warn_user
from opero.utils import ambient
from opero.utils.ambient import switch
from opero.utils.units import format_seconds, parse_seconds

if TYPE_CHECKING:
    from opero.core.call import AsyncProceed, Call, Proceed
    from opero.core.circuit_breaker import Circuit
    from opero.core.decorated import Decorate
    from opero.core.failures import Report
    from opero.core.function import FunctionInfo
    from opero.core.options import Options
    from opero.core.retry_budget import RetryBudget
    from opero.core.stats import Stats
    from opero.errors import RetryFilter
    from opero.events.bus import Emitter
    from opero.utils.units import Duration

__all__ = [
    "Retry", "RetryPolicy", "RetryState", "get_retry_decorator", "grown", "is_retry_error", "pause_bounds",
    "retry_error",
]  # fmt: skip


def pause_bounds(retry: int, low: float, high: float, factor: float) -> tuple[float, float]:
    """Return the bounds of the pause before retry number `retry`, from 1.

    The pause is drawn uniformly from [low, min(high, low · factor^retry)]: exponential backoff
    whose lower bound keeps a minimum distance, after
    "Exponential Backoff And Jitter" (M. Brooker, AWS Architecture Blog, 2015).

    Args:
        retry: Number of the retry, from 1.
        low: Shortest pause in seconds.
        high: Longest pause in seconds.
        factor: Growth from one retry to the next.

    Example:
        >>> pause_bounds(2, low=1.0, high=30.0, factor=2.0)
        (1.0, 4.0)
    """
    return low, grown(low, high, factor, retry)


def grown(low: float, high: float, factor: float, exponent: int) -> float:
    """Return `low` after so many steps of growth, at most `high`."""
    try:
        return min(high, low * factor**exponent)
    except OverflowError:
        # factor^10000 is more than a float holds, and long past any cap; zero stays zero however often it grows.
        return high if low else 0.0


class RetryPolicy(NamedTuple):
    """When to try again and how long to wait, as tenacity strategies where they matter.

    Attributes:
        retries: Attempts after the first; ignored where `stop` is given.
        low, high, factor, jitter: The pauses, in seconds; ignored where `wait` is given.
        retry_on: Type, tuple of types, predicate on the exception, tenacity retry strategy, "default" or
            "transient".
        wait, stop: tenacity strategies of the user's.
        longest_hint: Longest pause that a service may ask for, in seconds.
    """

    retries: int = 3
    low: float = 0.1
    high: float = 30.0
    factor: float = 1.5
    jitter: bool = True
    retry_on: Any = "default"
    wait: Callable[[Any], float] | None = None
    stop: Callable[[Any], bool] | None = None
    longest_hint: float = 60.0

    @classmethod
    def of(cls, options: Options) -> RetryPolicy:
        """Make the policy that the options describe."""
        return cls(
            retries=options.retries,
            low=parse_seconds(options.min_delay, "min_delay"),
            high=parse_seconds(options.max_delay, "max_delay"),
            factor=options.backoff_factor,
            jitter=options.jitter,
            retry_on=options.retry_on,
            wait=options.wait,
            stop=options.stop,
            longest_hint=parse_seconds(options.retry_after_max, "retry_after_max"),
        )

    @property
    def needs_start(self) -> bool:
        """Whether the clock must be read before the first attempt, because `stop` may ask for the time spent."""
        return self.stop is not None

    def wants(self, error: Exception, state: Callable[[], Any]) -> bool:
        """Return whether one error of an attempt is a reason for another attempt.

        Args:
            error: The error.
            state: Makes the state in which a tenacity strategy looks for it.
        """
        if isinstance(self.retry_on, str) and not isinstance(error, Rejected):
            from opero.core.classify import classify

            verdict = classify(error)
            if self.retry_on == "transient":
                return verdict.kind == "transient"
            return not verdict.ends_value
        if isinstance(error, Rejected) or not _is_strategy(self.retry_on):
            return matches(self.retry_on, error)
        return asks(cast("Callable[[Any], object]", self.retry_on), state())

    def retries_on(self, error: Exception) -> bool:
        """Return whether an error is one that `retry_on` means, outside of any call."""
        made = RetryState(self)
        return self.wants(error, lambda: _state_class()(made, error, made.started))

    def pause(self, state: Any) -> float:
        """Seconds before the next attempt; takes a `tenacity.RetryCallState`, so it is a wait strategy itself."""
        if self.wait is not None:
            try:
                return _finite(float(self.wait(state)))
            except Exception as error:  # noqa: BLE001 - the call's own outcome goes before a broken strategy
                _warn_of("wait", error, "the usual pauses are used instead")
        if not self.jitter:
            return grown(self.low, self.high, self.factor, state.attempt_number - 1)
        import random

        return random.uniform(*pause_bounds(state.attempt_number, self.low, self.high, self.factor))

    def pauses(self) -> tuple[float, float]:
        """Shortest and longest sum of all pauses of a call that fails to the end, in seconds."""
        first = 1 if self.jitter else 0
        exponents = range(first, first + min(self.retries, 1000))
        longest = [grown(self.low, self.high, self.factor, n) for n in exponents]
        return self.low * len(longest) if self.jitter else sum(longest), sum(longest)


def _finite(seconds: float) -> float:
    if math.isfinite(seconds):
        return seconds
    raise ValueError(seconds)


def _warn_of(option: str, error: Exception, consequence: str) -> None:
    warn_user(f"the {option} strategy raised {type(error).__name__}: {consequence}")


class RetryState:
    """What a retry knows: small and picklable, so that a map can park it and a journal can keep it.

    Attributes:
        policy: The rules.
        attempt: Attempts begun.
        started: Clock reading at the start of the first attempt, or at its failure where the start was not needed.
        slept: Seconds of pauses so far.
        value_index: Place of the fallback value that failed last, None without fallback.
        hints: Seconds that the service asked to wait; the next pause is no shorter than the longest of them.
        deadline: Clock reading by which the call must be over; no pause is begun that would outlast it.
        pause_refused: The pause, in seconds, that was not begun for that reason.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        attempt: int = 1,
        started: float = 0.0,
        slept: float = 0.0,
        *,
        value_index: int | None = None,
        hints: Iterable[float] = (),
        deadline: float | None = None,
    ) -> None:
        self.policy: RetryPolicy = policy
        self.attempt: int = attempt
        self.started: float = started
        self.slept: float = slept
        self.value_index: int | None = value_index
        self.hints: list[float] = [*hints]
        self.deadline: float | None = deadline
        self.pause_refused: float | None = None

    def next_delay(
        self, error: Exception, *, now: float, attempt_errors: Sequence[Exception] = ()
    ) -> float:
        """Begin another attempt: count it and return the pause before it, in seconds.

        Args:
            error: What the attempt ended with.
            now: Clock reading.
            attempt_errors: All errors of the attempt, where it tried several values; one that matches
                `retry_on` is enough.

        Raises:
            Exception: `error` itself, when nothing more is to be tried.
        """
        delay = self._decide(error, now, attempt_errors)
        if delay is None:
            try:
                raise error
            finally:
                # A frame that names an error which passes through it is a reference cycle.
                del error, attempt_errors
        self.attempt += 1
        self.slept += delay
        self.hints.clear()
        return delay

    def _decide(
        self, error: Exception, now: float, attempt_errors: Sequence[Exception]
    ) -> float | None:
        """Return the pause before the next attempt, None if there is none."""
        if is_final(error, attempt_errors):
            return None
        state = _state_class()(self, error, now)
        errors = [*attempt_errors]
        if all(each is not error for each in errors):
            errors.append(error)
        wants = self.policy.wants
        if not any(wants(e, functools.partial(_state_class(), self, e, now)) for e in errors):
            return None
        # As in tenacity, the pause comes first: `stop_before_delay` asks whether it still fits.
        state.upcoming_sleep = max(0.0, self.policy.pause(state), *self.hints)
        pause: float = state.upcoming_sleep
        if self._spent(state):
            return None
        if self.deadline is not None and now + pause >= self.deadline:
            self.pause_refused = pause
            return None
        return pause

    def _spent(self, state: Any) -> bool:
        if self.policy.stop is not None:
            try:
                return bool(self.policy.stop(state))
            except Exception as error:  # noqa: BLE001 - the call's own outcome goes before a broken strategy
                _warn_of("stop", error, "no more attempts are made")
                return True
        return bool(_stop_after(self.policy.retries + 1)(state))


# --- tenacity, which is loaded when the first call fails -----------------------------------------


def _is_strategy(wanted: object) -> bool:
    """Return whether `retry_on` is one of tenacity's retry strategies, which ask for a state instead of an error."""
    if isinstance(wanted, type | tuple | str):
        return False
    from tenacity.retry import retry_base

    return isinstance(wanted, retry_base)


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


@functools.cache
def _state_class() -> Callable[[Any, Exception, float], Any]:
    """Return the class of the state that tenacity's strategies read."""
    from tenacity import Future, RetryCallState

    class State(RetryCallState):
        """It knows no arguments of the call, which may be secret, and makes its outcome when a strategy looks at it."""

        def __init__(self, retry: Any, error: Exception, now: float) -> None:
            self.retry_object = self.fn = self.next_action = None  # type: ignore[assignment]  # there is no Retrying
            self.args, self.kwargs = (), {}
            self.attempt_number = retry.attempt
            self.start_time = retry.started
            self.outcome_timestamp = now
            self.idle_for = retry.slept
            self.upcoming_sleep = 0.0
            self._error = error

        @functools.cached_property
        def outcome(self) -> Future:  # type: ignore[override]  # pyright: ignore[reportIncompatibleVariableOverride]
            # Read-only, other than in the class above: nothing sets the outcome of this state.
            future = Future(self.attempt_number)
            if isinstance(self._error, Rejected):
                future.set_result(self._error.value)
            else:
                future.set_exception(self._error)
            return future

    return State


# --- stage ----------------------------------------------------------------------------------------

_MOST_NAMES: Final = 5
"""Functions within that `explain()` names."""


class Retry:
    """The stage: runs attempts until one succeeds or the policy ends the call, and reports how it has ended.

    It stands just inside the cache, so that it sees each computed call once. Without retries it only reports.

    Args:
        policy: The rules; None for a single attempt.
        info: The function.
        stats: Its counters.
        emitter: Where its events go.
        report: Reports how calls have ended.
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
        info: FunctionInfo,
        stats: Stats,
        emitter: Emitter,
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
        self._info = info
        self._stats = stats
        self._emitter = emitter

    def describe(self) -> str:
        """Return the line for `explain()`, nothing without retries."""
        policy = self.policy
        if policy is None:
            return ""
        often = "until the given stop" if policy.stop else f"1 + {policy.retries} attempts"
        if policy.wait:
            pauses = "pauses by the given wait"
        elif policy.low == 0:
            pauses = "no pauses"
        else:
            first = 1 if policy.jitter else 0
            shown = [grown(policy.low, policy.high, policy.factor, first + n) for n in range(3)]
            shown = shown[: policy.retries]
            lead = f"{policy.low:.3g} s to " if policy.jitter else ""
            more = ", …" if policy.retries > len(shown) else ""
            pauses = f"pause {lead}{', '.join(f'{s:.3g}' for s in shown)}{more} s"
        more = "" if self.budget is None else f"; at most {self.budget.describe()}"
        if self.within:
            names = ", ".join(f"{name}()" for name in self.within)
            then = "so calls multiply" if self._nested else "and that is not retried again"
            more += f"; {names} within it retries too, {then}"
        return f"{often} on {_named(policy.retry_on)}, {pauses}{more}"

    def before_next(self, call: Call, error: Exception) -> float:
        """Return the pause before the next attempt, or raise `error` when there is none."""
        try:
            policy = self.policy
            # What was handed out of a stream cannot be taken back.
            if policy is None or call.items or ambient.disabled():
                raise error
            inner = self._inner(call, error)
            self._refuse(call, error, self._asked_too_much(call, error, policy))
            if inner is not None and not self._nested:
                remark = f"{inner}() within it had retried, and retry_nested=False"
                self._refuse(call, error, remark)
            now = ambient.clock().monotonic()
            state: RetryState | None = call.retry
            if state is None:
                started = call.started if call.started is not None else now
                state = call.retry = RetryState(
                    policy,
                    attempt=call.attempts,
                    started=started,
                    slept=call.slept,
                    deadline=call.deadline,
                )
            state.value_index = call.value_index
            if call.hint:
                state.hints.append(call.hint)
            try:
                delay = state.next_delay(error, now=now, attempt_errors=call.attempt_errors or ())
            except Exception:
                if state.pause_refused is not None:
                    self._overdue(call, state.pause_refused)
                elif isinstance(policy.retry_on, str) and not policy.retries_on(error):
                    call.remark = _not_wanted(error)
                raise
            name = self._info.single_use_argument(call.args, call.kwargs)
            self._refuse(call, error, None if name is None else used_up(name))
            if self.circuit is not None:
                self._refuse(call, error, self.circuit.outlasts(call, delay))
            if self.budget is not None:
                self._refuse(call, error, self._spent(self.budget))
        finally:
            del error
        call.attempts = state.attempt
        call.attempt_errors = None
        self._stats.add(retries=1)
        emitter = self._emitter
        if emitter.active:
            name = emitter.function
            if inner is not None:
                emitter.emit(events.RetriesNested(function=name, inner=inner))
            emitter.emit(events.RetryScheduled(function=name, attempt=state.attempt, delay=delay))
        return delay

    @staticmethod
    def _refuse(call: Call, error: Exception, remark: str | None) -> None:
        """Raise `error` if there is a reason against another attempt, and leave that in the call."""
        if remark is not None:
            call.remark = remark
            try:
                raise error
            finally:
                del error

    def _inner(self, call: Call, error: Exception) -> str | None:
        """Return the name of an opero function that has retried in vain in each call of this attempt."""
        found = [inner_of(e, self._info.owner) for e in call.attempt_errors or (error,)]
        for each in found:
            if each is not None and len(self.within) < _MOST_NAMES:
                self.within[each.name] = None
        last = found[-1]
        return None if last is None or None in found else last.name

    def _spent(self, budget: RetryBudget) -> str | None:
        """Take a retry out of the budget; return why there is none."""
        if budget.withdraw():
            return None
        if self._emitter.active:
            self._emitter.emit(
                events.RetryBudgetSpent(function=self._emitter.function, budget=budget.name)
            )
        return f"no retry is left in {budget!r}"

    def _overdue(self, call: Call, pause: float) -> None:
        """Take note that the call ends because of its deadline, and why."""
        before = f"the end of a pause of {format_seconds(round(pause, 3))}"
        call.remark = f"the deadline comes before {before if pause else 'the next attempt'}"
        overdue(call, self._emitter, "before the next attempt")

    @staticmethod
    def _asked_too_much(call: Call, error: Exception, policy: RetryPolicy) -> str | None:
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
        if hint.seconds <= policy.longest_hint:
            return None
        return (
            f"the service asks to wait {format_seconds(hint.seconds)} ({hint.source}), longer than "
            f"retry_after_max={format_seconds(policy.longest_hint)}"
        )

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
                    except Exception as error:  # noqa: BLE001 - the policy decides which ones are retried
                        # Asked while the error is handled, because raising it later would replace its context by what
                        # the caller is handling.
                        delay = self.before_next(call, error)
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
                    except Exception as error:  # noqa: BLE001 - the policy decides which ones are retried
                        # As above.
                        delay = self.before_next(call, error)
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


def _not_wanted(error: Exception) -> str:
    """Say why opero's own rules make no other attempt after an error, and how to ask for one."""
    from opero.core.classify import classify

    verdict = classify(error)
    if verdict.kind == "unknown":
        return f'{type(error).__name__} is not known to pass, and retry_on="transient"'
    answer = "says that the budget is spent" if verdict.kind == "exhausted" else "is a final answer"
    return f"{verdict.reason} {answer}; retry_on=Exception retries that too"


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
