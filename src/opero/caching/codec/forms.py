# this_file: src/opero/caching/codec/forms.py
"""How the plain values that MessagePack does not know are taken apart and put together again.

A form has a number that stands for it in stored entries: numbers are never used twice. Types of the
standard library are recognised by name, so that nothing is imported before it is needed, and then
by identity: a subclass, or a class that only bears the name, has no form.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import EllipsisType, NotImplementedType
from typing import Any, Final, NamedTuple

from opero.caching.codec.signals import NotPlain

__all__ = ["BY_NUMBER", "INTEGER", "Form", "form_of"]

INTEGER: Final = 4
"""Number of the form of integers beyond 64 bits; their bytes follow it directly."""


class Form(NamedTuple):
    """How values of one type travel.

    Attributes:
        number: What stands for the type.
        split: Takes a value apart into plain parts.
        join: Makes the value from the list of its parts; raises whatever it likes if they are wrong.
    """

    number: int
    split: Callable[[Any], Iterable[Any]]
    join: Callable[[list[Any]], Any]


def form_of(kind: type) -> Form | None:
    """Return the form of a type's values, None if they are not plain.

    Example:
        >>> form_of(tuple).number, form_of(dict)
        (1, None)
    """
    form = _BUILTINS.get(kind)
    if form is None:
        named = _NAMED.get((kind.__module__, kind.__qualname__))
        if named is not None and getattr(sys.modules[kind.__module__], kind.__name__, None) is kind:
            return named
    return form


def _same(value: Iterable[Any]) -> Iterable[Any]:
    return value


def _one(parts: list[Any]) -> Any:
    (part,) = parts
    return part


def _text(value: object) -> tuple[str]:
    return (str(value),)


def _span(value: Any) -> tuple[Any, Any, Any]:
    return value.start, value.stop, value.step


# --- times ----------------------------------------------------------------------------------------


def _split_datetime(value: Any) -> tuple[Any, ...]:
    return (value.year, value.month, value.day, *_split_time(value))


def _split_time(value: Any) -> tuple[Any, ...]:
    # The zone is a part of its own; one that is not plain makes the whole value not plain.
    return value.hour, value.minute, value.second, value.microsecond, value.fold, value.tzinfo


def _join_datetime(parts: list[Any]) -> Any:
    import datetime

    *fields, fold, zone = parts
    return datetime.datetime(*fields, tzinfo=zone, fold=fold)  # type: ignore[misc]  # as taken apart


def _join_time(parts: list[Any]) -> Any:
    import datetime

    *fields, fold, zone = parts
    return datetime.time(*fields, tzinfo=zone, fold=fold)  # type: ignore[misc]  # as taken apart


def _split_zoneinfo(value: Any) -> tuple[str]:
    if value.key is None:
        raise NotPlain  # read from a file: it has no name to be found by
    return (value.key,)


# --- by the name of the type ----------------------------------------------------------------------


def _call(module: str, name: str) -> Callable[[list[Any]], Any]:
    """Return what makes a value by calling its type."""

    def join(parts: list[Any]) -> Any:
        import importlib

        return getattr(importlib.import_module(module), name)(*parts)

    return join


_BUILTINS: Final[dict[type, Form]] = {
    tuple: Form(1, _same, tuple),
    set: Form(2, _same, set),
    frozenset: Form(3, _same, frozenset),
    complex: Form(5, lambda value: (value.real, value.imag), lambda parts: complex(*parts)),
    bytearray: Form(6, lambda value: (bytes(value),), lambda parts: bytearray(_one(parts))),
    range: Form(7, _span, lambda parts: range(*parts)),
    slice: Form(8, _span, lambda parts: slice(*parts)),
    EllipsisType: Form(9, lambda _: (), lambda _: ...),
    NotImplementedType: Form(10, lambda _: (), lambda _: NotImplemented),
}

_CALLED: Final[list[tuple[int, str, str, Callable[[Any], Iterable[Any]]]]] = [
    (11, "collections", "deque", lambda value: (list(value), value.maxlen)),
    (12, "collections", "OrderedDict", lambda value: (dict(value),)),
    (13, "collections", "Counter", lambda value: (dict(value),)),
    (22, "datetime", "date", lambda value: (value.year, value.month, value.day)),
    (23, "datetime", "timedelta", lambda value: (value.days, value.seconds, value.microseconds)),
    (24, "datetime", "timezone", lambda value: value.__getinitargs__()),
    (25, "zoneinfo", "ZoneInfo", _split_zoneinfo),
    (30, "decimal", "Decimal", _text),
    (31, "fractions", "Fraction", lambda value: (value.numerator, value.denominator)),
    (33, "ipaddress", "IPv4Address", _text),
    (34, "ipaddress", "IPv4Network", _text),
    (35, "ipaddress", "IPv4Interface", _text),
    (36, "ipaddress", "IPv6Address", _text),
    (37, "ipaddress", "IPv6Network", _text),
    (38, "ipaddress", "IPv6Interface", _text),
    (40, "pathlib", "PurePosixPath", _text),
    (41, "pathlib", "PureWindowsPath", _text),
    (42, "pathlib", "PosixPath", _text),
    (43, "pathlib", "WindowsPath", _text),
]

_NAMED: Final[dict[tuple[str, str], Form]] = {
    ("datetime", "datetime"): Form(20, _split_datetime, _join_datetime),
    ("datetime", "time"): Form(21, _split_time, _join_time),
    ("uuid", "UUID"): Form(
        32, lambda value: (value.bytes,), lambda parts: _call("uuid", "UUID")([None, _one(parts)])
    ),
    **{(module, name): Form(n, split, _call(module, name)) for n, module, name, split in _CALLED},
}
# Python 3.13 moved the classes, and their public name stayed.
_NAMED.update(
    {
        ("pathlib._local", name): form
        for (module, name), form in _NAMED.items()
        if module == "pathlib"
    }
)

BY_NUMBER: Final[dict[int, Form]] = {
    form.number: form for form in (*_BUILTINS.values(), *_NAMED.values())
}
