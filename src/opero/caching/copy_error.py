# this_file: src/opero/caching/copy_error.py
"""A copy of an exception, so that each caller of a shared computation raises one of its own."""

from __future__ import annotations

from types import MemberDescriptorType
from typing import Any, Final, TypeVar

__all__ = ["copy_error"]

E = TypeVar("E", bound=BaseException)


def copy_error(error: E) -> E:
    """Return a copy of an exception: type, args, attributes, notes, cause, context and traceback so
    far.

    Its class's `__init__` is not called, since it may want other arguments than `args` holds. What
    lives in C structures and slots (`OSError.errno`, `StopIteration.value`) is carried over member
    by member.

    Returns:
        The copy, or the exception itself if it cannot be copied.

    Example:
        >>> copy_error(FileNotFoundError(2, "No such file", "x.txt"))
        FileNotFoundError(2, 'No such file')
    """
    kind = type(error)
    try:
        made = kind.__new__(kind, *error.args)
        if type(made) is not kind or made is error:
            return error
        _carry_over(error, made)
    except Exception:  # noqa: BLE001 - a class may refuse anything; then all callers share the object
        return error
    return made


def _carry_over(error: BaseException, made: BaseException) -> None:
    # Set past the class's own `__setattr__`: exceptions may be frozen dataclasses.
    put = BaseException.__setattr__
    for owner in type(error).__mro__:
        for member in vars(owner).values():
            if isinstance(member, MemberDescriptorType):
                _carry_member(member, error, made)
    state: dict[str, Any] = dict(error.__dict__)
    notes = state.get("__notes__")
    if isinstance(notes, list):
        state["__notes__"] = list(notes)
    made.__dict__.update(state)
    put(made, "args", error.args)
    put(made, "__cause__", error.__cause__)
    put(made, "__context__", error.__context__)
    put(made, "__suppress_context__", error.__suppress_context__)
    put(made, "__traceback__", error.__traceback__)


def _carry_member(member: MemberDescriptorType, error: BaseException, made: BaseException) -> None:
    value = _read(member, error)
    # An empty C member reads as None too, and would not be empty once None were written to it.
    if value is _ABSENT or value is _read(member, made):
        return
    try:
        member.__set__(made, value)
    except (AttributeError, TypeError):
        return  # one that only `__new__` sets


def _read(member: MemberDescriptorType, error: BaseException) -> object:
    try:
        return member.__get__(error)
    except AttributeError:
        return _ABSENT


_ABSENT: Final = object()
