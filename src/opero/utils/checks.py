# this_file: src/opero/utils/checks.py
"""Checks of values that several layers take: each raises an error that names the option, the value and the fix."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Final

from opero.errors import OperoUsageError, did_you_mean
from opero.utils.async_utils import is_async_function
from opero.utils.secrets import mask_url
from opero.utils.units import parse_seconds, parse_size, parse_windows

Check = Callable[[str, Any], object]

_STORE_VERBS = ("get", "set", "delete", "clear")

BACKENDS: Final = MappingProxyType(
    {
        "disk": "opero.caching.stores.disk",
        "redis": "opero.caching.stores.redis",
        "rediss": "opero.caching.stores.redis",
        "unix": "opero.caching.stores.redis",
        "twat": "opero.caching.stores.twat",
    }
)
"""Module of a store by what its text begins with, up to a colon; the module's own name is that of the backend.

Memory has none: it belongs to one function. A new store is one module and one line here. The module has three
functions: `settle(text)`, which refuses a text that cannot be meant and makes it independent of the working directory,
`locate(text)`, which says where that is just now, and `open_at(place)`, which returns the `ByteStore`, and imports what
it needs only when that is used. Its constant `ACROSS_HOSTS` says whether other hosts may read and write there.
"""


class _ShownByType:
    """Stands, in an error, for a value whose own `repr` or `==` raises: only its type can be shown."""

    def __init__(self, value: object) -> None:
        self._kind = type(value).__name__

    def __repr__(self) -> str:
        return f"<{self._kind}>"


def apply(check: Check, name: str, value: object) -> None:
    """Check a value; the error names the option also where the value's own `repr` or `==` raises.

    Raises:
        OperoUsageError: The value cannot be meant.
    """
    try:
        check(name, value)
    except OperoUsageError:
        raise
    except Exception:  # noqa: BLE001 - code of the value may raise anything
        check(name, _ShownByType(value))


def must_be(what: str, fits: Callable[[Any], object], *, instance: bool = False) -> Check:
    """Return a check whose error says what the value must be.

    Args:
        what: What it must be, to follow "must be".
        fits: Whether a value is that.
        instance: Whether a class is a trap: its error says to call it.
    """

    def check(name: str, value: Any) -> None:
        if instance:
            refuse_class(name, value)
        if not fits(value):
            raise OperoUsageError(f"{name}={value!r} must be {what}.")

    return check


def none_or(check: Check) -> Check:
    """Return a check that lets None pass too."""

    def checked(name: str, value: Any) -> None:
        if value is not None:
            check(name, value)

    return checked


def refuse_class(name: str, value: Any) -> None:
    """Raise if a value is a class where an instance is meant."""
    if isinstance(value, type):
        raise OperoUsageError(f"{name}={value!r} is a class: write {name}={value.__name__}(...).")


def has(*methods: str) -> Callable[[Any], bool]:
    """Return what says whether a value has these methods."""
    # Of what class it is is not asked: that would have to be loaded first.
    return lambda value: all(callable(getattr(value, method, None)) for method in methods)


def is_whole(value: Any, least: float) -> bool:
    """Return whether a value is a whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Return whether a value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


boolean: Check = must_be("True or False", lambda value: isinstance(value, bool))
text: Check = must_be("text that is not empty", lambda value: isinstance(value, str) and value)
text_or_none: Check = none_or(text)
factor: Check = must_be(
    "a number, 1 or more (1 keeps the pauses equal)",
    lambda value: is_number(value) and 1 <= value < math.inf,
)
jitter: Check = must_be(
    "a number, 0 or more and less than 1", lambda value: is_number(value) and 0 <= value < 1
)
failure_rate: Check = must_be(
    "a number, more than 0, up to 1 (0.5 is half)",
    lambda value: is_number(value) and 0 < value <= 1,
)


function: Check = must_be("a function", callable)
logger: Check = must_be(
    "a logger of the standard library, such as get_logger('app')",
    lambda value: callable(getattr(value, "log", None)),
)


def whole(least: int) -> Check:
    """Return a check for whole numbers of at least `least`."""
    return must_be(f"a whole number, {least} or more", lambda value: is_whole(value, least))


def duration(name: str, value: Any) -> None:
    """A duration."""
    parse_seconds(value, name)


def duration_or_none(name: str, value: Any) -> None:
    """A duration of more than nothing, or None."""
    if value is not None and not parse_seconds(value, name) > 0:
        raise OperoUsageError(f"{name}={value!r} must be longer than 0; None means without end.")


def is_limit(name: str, value: Any, *methods: str) -> bool:
    """Return whether a value is a shared limit with these methods, or None."""
    found = value is not None and has(*methods)(value)
    if found:
        refuse_class(name, value)
    return found or value is None


def rate(name: str, value: Any) -> None:
    """A rate, a limiter or None."""
    # A concurrency limit is waited for too.
    if hasattr(value, "in_flight") or not is_limit(name, value, "wait"):
        parse_windows(value, name)


def size(name: str, value: Any) -> None:
    """A size in bytes."""
    parse_size(value, name)


def path(name: str, value: Any) -> None:
    """The path of a file, as text or as a path object."""
    found = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not (isinstance(found, str) and found) or found.endswith(os.sep):
        raise OperoUsageError(f'{name}={value!r} must be the path of a file, such as "run.db".')


def callable_or_none(name: str, value: Any) -> None:
    """Something callable, or None."""
    if value is not None and not callable(value):
        raise OperoUsageError(f"{name}={value!r} must be callable or None.")
    _not_async(name, value)


def _not_async(name: str, value: Any) -> None:
    # Its coroutine is not awaited here: it would always be true.
    if value is not None and is_async_function(value):
        raise OperoUsageError(f"{name}={value!r} must be a plain function, not an `async def`.")


def are_errors(value: Any) -> bool:
    """Return whether a value is a type of exceptions or a tuple of them."""
    kinds = value if isinstance(value, tuple) else (value,)
    return all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds)


def failure_filter(name: str, value: Any) -> None:
    """An exception type, a tuple of types or a predicate."""
    if isinstance(value, BaseException):
        kind = type(value).__name__
        raise OperoUsageError(f"{name}={value!r} is an instance: write the class, {name}={kind}.")
    if callable(value) and not isinstance(value, type):
        _not_async(name, value)
    elif value == () or not are_errors(value):
        raise OperoUsageError(
            f"{name}={value!r} must be an exception type, a tuple of types such as "
            "(ConnectionError, TimeoutError), or a predicate that gets the exception."
        )


def store(name: str, value: Any) -> None:
    """The name of a backend or an object with a store's verbs."""
    if isinstance(value, str):
        backend_of(name, value)
        return
    missing = [verb for verb in _STORE_VERBS if not callable(getattr(value, verb, None))]
    # An engine of twat-cache has no `delete`.
    if missing and not (missing == ["delete"] and callable(getattr(value, "cache", None))):
        raise OperoUsageError(
            f'{name}={value!r} is no cache backend. Write "memory", "disk" or "redis", or give a store object with '
            f"{', '.join(_STORE_VERBS)} (missing: {', '.join(missing)})."
        )


def backend_of(name: str, text: str) -> str:
    """Return the backend that a text names.

    Args:
        name: The option, for messages.
        text: "memory", "disk", "disk:PATH" ...

    Raises:
        OperoUsageError: There is no such backend.

    Example:
        >>> backend_of("cache_backend", "disk:~/answers")
        'disk'
    """
    scheme, colon, remainder = text.partition(":")
    if text == "memory":
        return text
    module = BACKENDS.get(scheme)
    if module is not None and (remainder or (not colon and scheme != "twat")):
        return module.rpartition(".")[2]
    known = ("memory", "disk", "disk:PATH", "redis", "redis://HOST:PORT/DB")
    raise OperoUsageError(
        f"{name}={mask_url(text)!r} is no cache backend.{did_you_mean(scheme, known)} "
        f"There are {', '.join(map(repr, known))}, and store objects with get, set, delete and clear."
    )


def one_of(*known: str) -> Check:
    """Return a check for one of a few words."""

    def check(name: str, value: Any) -> None:
        if not (isinstance(value, str) and value in known):
            near = did_you_mean(value, known) if isinstance(value, str) else ""
            words = ", ".join(f'"{word}"' for word in known)
            raise OperoUsageError(f"{name}={value!r} must be one of {words}.{near}")

    return check


_codec = must_be(
    '"auto", "plain", or an object with the methods encode(value) -> bytes and decode(data) -> value',
    has("encode", "decode"),
)


def codec(name: str, value: Any) -> None:
    """How results become bytes: a word, or an object that does it."""
    (one_of("auto", "plain") if isinstance(value, str) else _codec)(name, value)
