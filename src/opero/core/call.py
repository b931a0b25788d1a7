# this_file: src/opero/core/call.py
"""Carry one call through the stages."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Hashable
from math import inf
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from opero import events
from opero.caching.keys import Unkeyable, fast_part
from opero.errors import Rejected
from opero.utils import ambient
from opero.utils.lazy import NamedTuple

if TYPE_CHECKING:
    from opero.core.decorated import Receipt, Source
    from opero.core.function import Stats
    from opero.events import Run
    from opero.events.bus import Emitter


T = TypeVar("T")


def part_key(value: object, index: int) -> Hashable:
    """Return the identity of a fallback value: its content.

    A value without content (a client, a lambda) goes by its place in the list.

    Example:
        >>> part_key("gpt-4", 0) == part_key("gpt-4", 3), part_key(lambda: 0, 2)
        (True, 2)
    """
    try:
        return fast_part(value)
    except Unkeyable:
        return index


class FailedCall(NamedTuple):
    """One real call that did not give a result.

    Attributes:
        label: Label of the fallback value it was made with (masked if secret), None without fallback.
        error: The exception; a `Rejected` if the result was refused.
    """

    label: str | None
    error: Exception


class RetryParked(BaseException):
    """The pause before the next attempt is longer than the call's `park_after`: the caller runs it again later.

    A BaseException, so that no stage takes it for a failure.

    Args:
        seconds: The pause.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class Call:
    """The state of one call on its way through the stages.

    Defaults are class attributes, so that a call which runs smoothly sets nothing but its arguments.

    Attributes:
        args, kwargs: Arguments of the function; `arg_fallback` replaces them value by value.
        key: Key in the cache once it is known.
        source: Where the value came from.
        attempts: Attempts begun.
        calls: Real calls made.
        failures: Every failed real call in order, None while there is none.
        attempt_errors: Errors of the present attempt, what `retry_on` is asked about.
        retry: State of the retry stage, None before the first failure.
        final_values: Places of the fallback values that a service has answered for good; None while there is none.
        items: Items of a stream that are out.
        stream: The plain generator whose first item is out; stages register there what they do at its end.
        label: Label of the fallback value in use.
        value, value_index: That value, and its place in the list.
        has_alternatives: Whether there is more than one value to try.
        slept: Seconds of pauses between attempts.
        waited: Seconds in the rate limiter.
        rejected: Whether the value is one that `retry_if_result` refused.
        started: Clock reading at the start; None if no option needed it.
        first_failed: Clock reading at the first failure.
        prior_outcome: What a real call that is already made has given so far: its awaitable, or its error; None
            otherwise.
        hint: Seconds that the service asked to wait after the last failure.
        remark: Why the call ends before all is spent; one more line of the note.
        reserved: The slot of the real call that is being made, where it may be given back or settled.
        orphan_thread: The thread that a call which timed out goes on in, None if there is none.
        deadline: Clock reading by which it must be over, None if there is none.
        overdue: Whether it ends because of that deadline.
        keep_failures: Whether a receipt will be written, so that the failures are still needed at the end.
        park_after: Longest pause between attempts, in seconds, that is slept here; before a longer one the call ends
            with `RetryParked` and may be run again.
        stop_wait: Called now and then while it waits for its rate limit; raises to end the wait.
        run: What its events are stamped with; None without a listener when it began.
        tried: Clock reading at the start of the last real call, where there is a listener.
        renews: Whether it shall renew what is stored rather than look it up.
        flight: What such a call leads already, None if nothing.
        taped: Whether it need not be recorded or replayed (any more).
    """

    key: Any = None
    source: Source = "fresh"
    attempts = 1
    calls = 0
    failures: list[FailedCall] | None = None
    attempt_errors: list[Exception] | None = None
    retry: Any = None
    final_values: set[int] | None = None
    items = 0
    stream: Any = None
    label: str | None = None
    value: Any = None
    value_index: int | None = None
    has_alternatives = False
    slept: float = 0.0
    waited: float = 0.0
    rejected = False
    started: float | None = None
    first_failed: float | None = None
    prior_outcome: Any = None
    hint: float = 0.0
    remark: str | None = None
    reserved: Any = None
    orphan_thread: Any = None
    deadline: float | None = None
    overdue = False
    keep_failures = False
    park_after = inf
    stop_wait: Callable[[], object] | None = None
    run: Run | None = None
    tried: float | None = None
    renews = False
    flight: Any = None
    taped = False

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args = args
        self.kwargs = kwargs

    def failed(self, error: Exception) -> None:
        """Take note of a real call that failed."""
        if self.failures is None:
            self.failures = []
        self.failures.append(FailedCall(self.label, error))
        if self.attempt_errors is None:
            self.attempt_errors = []
        self.attempt_errors.append(error)

    def take_prior_outcome(self) -> Any:
        """Return what the call that is already made has given, and forget it."""
        prior_outcome, self.prior_outcome = self.prior_outcome, None
        return prior_outcome

    def drop_failures(self) -> None:
        """Forget the failures: they hold tracebacks, those hold frames, and frames hold this call."""
        if not self.keep_failures:
            self.failures = self.attempt_errors = None

    def receipt(self, value: T, seconds: float, remaining: float | None = None) -> Receipt[T]:
        """Write the receipt of the call, which ended with `value`."""
        # Loaded with the first receipt.
        from opero.core.decorated import Receipt

        made, stale = self.source == "fresh", self.source == "stale"
        return Receipt(
            value=value,
            source=self.source,
            attempts=self.attempts if made or self.calls else 0,
            calls=self.calls,
            fallback=None if stale else self.value,
            label=None if stale else self.label,
            slept=self.slept,
            waited=self.waited,
            seconds=seconds,
            remaining=remaining,
            rejected=self.rejected,
            errors=tuple(f.error for f in self.failures or () if not isinstance(f.error, Rejected)),
        )

    def note_wait(self, seconds: float, stats: Stats, emitter: Emitter) -> None:
        """Take note of a wait for a limit or for a fallback value, count it and notify listeners."""
        self.waited += seconds
        stats.add(waited=seconds)
        if emitter.active:
            emitter.emit(events.LimiterWaited(seconds=seconds))

    def elapsed(self) -> float | None:
        """Return the seconds since the call began, None without a listener then."""
        if self.run is None or self.run.started is None:
            return None
        return ambient.clock().monotonic() - self.run.started

    def __repr__(self) -> str:
        # Arguments may be secret, so they are not shown.
        return f"<Call attempt {self.attempts}, {self.calls} calls, {self.source}>"


Proceed = Callable[[Call], Any]
"""What a synchronous stage calls to go on: the next stage, in the end the function."""

AsyncProceed = Callable[[Call], Coroutine[Any, Any, Any]]
"""The same for an asynchronous stage."""


class Stage(Protocol):
    """One step: it gets a call and the way on, and returns or raises what the caller shall get."""

    name: str
    """Its name in `explain()`."""

    def wrap_sync(self, proceed: Proceed) -> Proceed:
        """Put the stage before `proceed`."""
        ...

    def wrap_async(self, proceed: AsyncProceed) -> AsyncProceed:
        """Put the stage before `proceed`, for an event loop."""
        ...

    def describe(self) -> str:
        """One line for `explain()`: what the stage will do, with its numbers."""
        ...
