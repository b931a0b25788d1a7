# this_file: src/opero/errors.py
"""The errors that opero itself raises.

A call that fails raises *its own* exception; what stands here is only raised where there is none:

    OperoError
    ├── OperoUsageError (TypeError, ValueError)   a wrong option or argument, and the fix
    │   ├── ShippingError                         something cannot travel between processes
    │   └── UnkeyableError                        an argument without content has no cache key
    ├── CallTimeoutError (TimeoutError)           a real call took longer than its `timeout`
    ├── StoreError                                a store behind the cache failed
    ├── DurableError                              a workflow or its journal
    │   ├── JournalError                          the journal cannot be read or written
    │   ├── NonDeterminismError                   the program is no longer the one that was journaled
    │   ├── IdConflictError                       the id belongs to a run with other arguments
    │   ├── UnknownWorkflowError (LookupError, ValueError)    no such workflow
    │   ├── UnserializableError (TypeError)       a value that the journal cannot keep
    │   ├── ActivityError                         stands for an error that cannot be kept as it is
    │   └── WorkflowEndedError                    it was cancelled, or given up as dead: no result
    ├── WorkerLostError                           a worker process died of an item
    ├── MapStopped                                a map ended before its input; what is done is kept
    │   └── MapError                              its workers are gone
    ├── RemoteError                               stands for an exception that cannot travel between processes
    ├── WorkerStartError                          worker processes die before they are ready
    └── RefusalError                              opero refuses to call; never retried
        ├── BulkheadFullError                     too many wait for the concurrency limit
        ├── CircuitOpenError                      the circuit breaker lets no call through
        ├── DeadlineError (TimeoutError)          the time was up before the first real failure
        ├── RateLimitPausedError                  the service has asked to wait longer than the call would
        └── SpendCapError                         what may be spent is spent

`OperoWarning` is the category of opero's warnings.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any, Literal

from opero.utils.secrets import mask_urls

__all__ = [
    "ActivityError", "BulkheadFullError", "CallTimeoutError", "CircuitOpenError", "DeadlineError", "DurableError",
    "IdConflictError", "JournalError", "MapError", "MapStopped", "NonDeterminismError", "OperoError",
    "OperoUsageError", "OperoWarning", "RateLimitPausedError", "RefusalError", "RemoteError", "ShippingError",
    "SpendCapError", "StoreError", "UnkeyableError", "UnknownWorkflowError", "UnserializableError",
    "WorkerLostError", "WorkerStartError", "WorkflowEndedError",
]  # fmt: skip


class OperoError(Exception):
    """Base class of everything that opero itself raises."""

    def __repr__(self) -> str:
        return mask_urls(super().__repr__())


class OperoUsageError(OperoError, TypeError, ValueError):
    """An option, an argument or a combination that cannot work; the message names the fix.

    It is both a `TypeError` and a `ValueError`, so either `except` clause catches it.

    Example:
        >>> from opero import opero
        >>> opero(retires=5)
        Traceback (most recent call last):
        ...
        opero.errors.OperoUsageError: opero() has no option 'retires'. Did you mean 'retries'?
    """

    def __init__(self, *args: object) -> None:
        # What is wrong may be an address with a password.
        super().__init__(*(mask_urls(a) if isinstance(a, str) else a for a in args))


class UnkeyableError(OperoUsageError):
    """An argument without content (a lock, a client, a lambda) cannot be part of a cache key."""


class ShippingError(OperoUsageError):
    """A function, an item or a result cannot travel to a worker process or back; the message says why."""


class RemoteError(OperoError):
    """An exception of a worker process that cannot be made again here: its class, its text and its arguments.

    Attributes:
        kind: Its class, with the module.
        text: What it said.
        arguments: Its arguments, as text.
    """

    def __init__(self, kind: str, text: str, arguments: str) -> None:
        super().__init__(kind, text, arguments)
        self.kind = kind
        self.text = text
        self.arguments = arguments

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}" if self.text else self.kind


class WorkerStartError(OperoError):
    """Worker processes die before they are ready, so no other is tried.

    Attributes:
        said: What the last one wrote to stderr.
        exitcode: How it ended, negative for a signal; None if that is not known.
    """

    def __init__(self, said: str, exitcode: int | None) -> None:
        super().__init__(said, exitcode)
        self.said = said
        self.exitcode = exitcode

    def __str__(self) -> str:
        ended = "" if self.exitcode is None else f" (exit code {self.exitcode})"
        output = f":\n{self.said}" if self.said else ", and says nothing"
        return f"a worker process cannot start{ended}{output}"


class RefusalError(OperoError):
    """opero declines to make a call. The pipeline that raised it neither retries nor falls back."""


class CircuitOpenError(RefusalError):
    """A circuit breaker refuses the call, because those before it have failed.

    Args:
        name: Name of the circuit.
        retry_after: Seconds until it may let a call through; None while it is held open by hand.

    Example:
        >>> raise CircuitOpenError("geocoder", 30.0)
        Traceback (most recent call last):
        ...
        opero.errors.CircuitOpenError: circuit 'geocoder' is open: try again in 30 s
    """

    def __init__(self, name: str, retry_after: float | None) -> None:
        super().__init__(name, retry_after)
        self.name = name
        self.retry_after = retry_after

    def __str__(self) -> str:
        if self.retry_after is None:
            return mask_urls(f"circuit {self.name!r} is held open by hand")
        seconds = (
            f"{self.retry_after:.3g}" if self.retry_after < 1000 else f"{self.retry_after:.0f}"
        )
        return mask_urls(f"circuit {self.name!r} is open: try again in {seconds} s")


class BulkheadFullError(RefusalError):
    """A concurrency limit is reached, and as many callers wait for it as may.

    Attributes:
        name: Name of the limit.
        limit: Most calls in flight.
        queue: Most callers that may wait.
    """

    def __init__(self, name: str, limit: int, queue: int) -> None:
        super().__init__(name, limit, queue)
        self.name = name
        self.limit = limit
        self.queue = queue

    def __str__(self) -> str:
        return mask_urls(
            f"concurrency limit {self.name!r} is full: "
            f"{self.limit} calls in flight, {self.queue} waiting"
        )


class CallTimeoutError(OperoError, TimeoutError):
    """A real call took longer than its `timeout`.

    It is retried and fallen back on like any failure of the function.

    Attributes:
        function: The function that was called.
        seconds: The limit.
    """

    def __init__(self, function: str, seconds: float) -> None:
        super().__init__(function, seconds)
        self.function = function
        self.seconds = seconds

    def __str__(self) -> str:
        return f"{self.function}() took longer than {self.seconds:g} s"


class StoreError(OperoError):
    """A store behind the cache failed: it is down, busy, full, broken or refused.

    Calls of cached functions never raise it: a store that fails is a miss and an event. It is raised
    to code that manages entries by hand, and by stores. The message says what happened; keys, values
    and passwords are not in it.
    """


class WorkerLostError(OperoError):
    """A worker process died while it ran an item. It is retried like any failure of the function.

    Attributes:
        function: The function that was called.
        why: "crash" or "memory".
        pid: The process.
        exitcode: What it ended with; negative for a signal.
        said: What it wrote to stderr before it died.
    """

    def __init__(
        self, function: str, why: str, pid: int | None, exitcode: int | None, said: str = ""
    ) -> None:
        super().__init__(function, why, pid, exitcode, said)
        self.function = function
        self.why = why
        self.pid = pid
        self.exitcode = exitcode
        self.said = said

    def __str__(self) -> str:
        how = "took more than memory_limit" if self.why == "memory" else "died"
        process = "a worker" if self.pid is None else f"worker process {self.pid}"
        end = "" if self.exitcode is None else f" with exit code {self.exitcode}"
        said = f": {self.said.strip()}" if self.said.strip() else ""
        return f"{process} {how} in {self.function}(){end}{said}"


class MapStopped(OperoError):
    """A map ended before its input did: too many items failed, or its stop token was set.

    Attributes:
        reason: Why.
        result: What is done: a `MapResult`.
    """

    def __init__(self, reason: str, result: Any = None) -> None:
        super().__init__(reason, result)
        self.reason = reason
        self.result = result

    def __str__(self) -> str:
        return self.reason


class MapError(MapStopped):
    """A map ended because there are no workers any more, such as in a broken executor."""


class DeadlineError(RefusalError, TimeoutError):
    """The deadline passed before any real call had failed with an error of its own."""


class RateLimitPausedError(RefusalError):
    """The rate limiter is paused, because the service asked to wait, for longer than this call
    would; or all fallback values are.

    Args:
        retry_after: Seconds that are left of the pause.
        what: What is paused.

    Example:
        >>> raise RateLimitPausedError(120.0)
        Traceback (most recent call last):
        ...
        opero.errors.RateLimitPausedError: the rate limiter is paused, because the service asked to wait
    """

    def __init__(self, retry_after: float, what: str = "the rate limiter") -> None:
        super().__init__(retry_after, what)
        self.retry_after = retry_after
        self.what = what

    def __str__(self) -> str:
        # The same for all calls that meet one pause, so that they can be counted; `retry_after` says how long.
        return mask_urls(f"{self.what} is paused, because the service asked to wait")


class DurableError(OperoError):
    """Base class of what goes wrong with workflows and their journal."""


class JournalError(DurableError):
    """The journal cannot be read or written; the message says why, and nothing in it was changed."""


class NonDeterminismError(DurableError):
    """The program does at some step something else than the journal says it did.

    Attributes:
        workflow: Id of the run.
        step: Path of the step.
        recorded: What the journal has there.
        called: What the program calls there.
    """

    def __init__(self, workflow: str, step: str, recorded: str, called: str) -> None:
        super().__init__(workflow, step, recorded, called)
        self.workflow = workflow
        self.step = step
        self.recorded = recorded
        self.called = called

    def __str__(self) -> str:
        return (
            f"workflow {self.workflow!r}, step {self.step}: the journal has {self.recorded}, the program "
            f"calls {self.called}. Bring the old code back, or fork the workflow from before this step."
        )


class IdConflictError(DurableError):
    """A workflow id is taken by a run with another name or other arguments."""


class UnknownWorkflowError(DurableError, LookupError, ValueError):
    """No workflow of that name is registered, or none of that id is in the journal."""


class UnserializableError(DurableError, TypeError):
    """A value that the journal cannot keep, or can no longer read; the message names it."""


class ActivityError(DurableError):
    """Stands for an activity's error whose type cannot be kept in the journal.

    Attributes:
        type: Name of that type.
        message: Its text.
    """

    def __init__(self, type: str, message: str) -> None:
        super().__init__(type, message)
        self.type = type
        self.message = message

    def __str__(self) -> str:
        return f"{self.type}: {self.message}"


class WorkflowEndedError(DurableError):
    """The workflow was cancelled, or given up as dead, so there is no result."""


class SpendCapError(RefusalError):
    """A limiter's `cap` has no room for what the call costs. Waiting does not help.

    Attributes:
        cost: What the call costs.
        spent: What was spent before.
        cap: The most that may be.

    Example:
        >>> raise SpendCapError(0.5, 19.75, 20.0)
        Traceback (most recent call last):
        ...
        opero.errors.SpendCapError: a call that costs 0.5 is over the cap: 19.75 of 20 are spent
    """

    def __init__(self, cost: float, spent: float, cap: float) -> None:
        super().__init__(cost, spent, cap)
        self.cost = cost
        self.spent = spent
        self.cap = cap

    def __str__(self) -> str:
        return (
            f"a call that costs {self.cost:g} is over the cap: "
            f"{self.spent:g} of {self.cap:g} are spent"
        )


class OperoWarning(UserWarning):
    """Something works otherwise than the user may think: said once, never an error."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(mask_urls(a) if isinstance(a, str) else a for a in args))


def warn_user(message: str, category: type[Warning] = OperoWarning) -> None:
    """Warn, at the line of the user's own code that called opero."""
    level = 2
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - what `warnings` itself uses
    while frame is not None and frame.f_back is not None and _is_ours(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _is_ours(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__", "")
    return name.startswith("opero.") or frame.f_code.co_filename.startswith("<opero wrapper")


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the nearest known name, or an empty string."""
    import difflib

    near = difflib.get_close_matches(wrong, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


# --- which errors an option means ------------------------------------------------------------------

FailureFilter = (
    type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], bool]
)
"""An exception type, a tuple of types, or a predicate on the exception."""


RetryFilter = FailureFilter | Literal["default", "transient"]
"""What `retry_on` takes: a filter, or the name of one of opero's own."""


class Rejected(Exception):
    """A result that `retry_if_result` refused travels like a failure; no caller ever sees this."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value


def is_final(error: BaseException, attempt_errors: Sequence[BaseException] = ()) -> bool:
    """Return whether no retry and no other value can help: a usage error, or a refusal of this very pipeline.

    Args:
        error: What ended an attempt.
        attempt_errors: The errors of the attempt's real calls. A refusal among them came from another
            pipeline further in, and is a failure like any other here.
    """
    if isinstance(error, OperoUsageError):
        return True
    return isinstance(error, RefusalError) and all(error is not e for e in attempt_errors)


def matches(wanted: Any, error: Exception) -> bool:
    """Return whether an error is one that `retry_on` or `fallback_on` means.

    Args:
        wanted: A type, a tuple of types, or a predicate. An exception group matches types that all
            its members match.
        error: The error. A `Rejected` result always matches: its own predicate has already spoken.
    """
    if isinstance(error, Rejected):
        return True
    if isinstance(wanted, type | tuple):
        return isinstance(error, wanted) or _all_members_match(wanted, error)
    return asks(wanted, error)


def _all_members_match(wanted: Any, error: BaseException) -> bool:
    # Asked of the type: an object may lie about its class, or raise.
    return issubclass(type(error), BaseExceptionGroup) and all(
        isinstance(e, wanted) or _all_members_match(wanted, e)
        for e in getattr(error, "exceptions", ())
    )


def asks(predicate: Callable[[Any], object], subject: object) -> bool:
    """Ask a user's predicate; one that raises warns and counts as "no", and never hides the call's own outcome."""
    try:
        return bool(predicate(subject))
    except Exception as error:  # noqa: BLE001 - whatever it raises, the call's own outcome goes first
        name = getattr(predicate, "__qualname__", type(predicate).__name__)
        warn_user(f"predicate {name} raised {type(error).__name__} and was taken as False")
        return False
