# this_file: src/opero/utils/matching.py
"""Decide whether an error or a result is one that an option such as `retry_on` means."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

from opero.errors import OperoUsageError, OperoWarning, RefusalError
from opero.utils.stack import users_stacklevel

__all__ = ["FailureFilter", "Rejected", "RetryFilter", "asks", "is_final", "matches"]

FailureFilter = (
    type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], bool]
)
"""An exception type, a tuple of types, or a predicate on the exception."""


RetryFilter = FailureFilter | Literal["default", "transient"]
"""What `retry_on` takes: a filter, or the name of one of opero's own."""


class Rejected(Exception):  # noqa: N818 - a signal between stages, no error of the user's
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
        warnings.warn(
            f"predicate {name} raised {type(error).__name__} and was taken as False",
            OperoWarning,
            stacklevel=users_stacklevel(),
        )
        return False
