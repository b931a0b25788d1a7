# this_file: src/opero/utils/exceptions.py
"""Carry exceptions to other callers, to other processes and into journals, without running their constructors.

A constructor may want other arguments than `args` holds. Waiters get copies; what a pickle or a journal has kept of an
exception, each in a form of its own, is made an exception again here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from types import MemberDescriptorType
from typing import Any, Final, TypeVar

E = TypeVar("E", bound=BaseException)


def new_error(
    kind: type[BaseException],
    args: Sequence[Any],
    attributes: Mapping[str, Any],
    *,
    made_from: Sequence[Any] | None = None,
    members: Sequence[BaseException] = (),
    trusted: bool = False,
) -> Any:
    """Make an exception of its parts.

    Args:
        kind: Its class.
        args: Its `args`.
        attributes: What its `__dict__` holds.
        made_from: What built-in exceptions keep outside of both is made from this: an `OSError` hides the names of
            files from its `args`. None: the same as `args`.
        members: Those of a group, which stand behind its message.
        trusted: Whether the `__new__` of a class of the program may run, and refuse.

    Raises:
        Exception: The class cannot be made so.

    Example:
        >>> new_error(FileNotFoundError, (2, "No such file"), {}, made_from=(2, "No such file", "x.txt")).filename
        'x.txt'
    """
    maker: Any = kind
    if not trusted:
        maker = next(base for base in kind.__mro__ if base.__module__ == "builtins")
    if members:
        args = made_from = (*args, members)
    try:
        made = maker.__new__(kind, *(args if made_from is None else made_from))
    except TypeError:
        made = maker.__new__(kind)
    made.args = tuple(args)
    vars(made).update(attributes)
    return made


def copy_error(error: E) -> E:
    """Return a copy of an exception: type, args, attributes, notes, cause, context and traceback so far.

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
    except Exception:  # noqa: BLE001 - a class may refuse anything; all callers share the object then
        return error
    return made


def _carry_over(error: BaseException, made: BaseException) -> None:
    # Set past the class's own `__setattr__`: exceptions may be frozen dataclasses.
    put = BaseException.__setattr__
    for owner in type(error).__mro__:
        for member in vars(owner).values():
            value = _read(member, error)
            # An empty C member reads as None too, and would not be empty once None were written to it.
            if value is not _ABSENT and value is not _read(member, made):
                with contextlib.suppress(AttributeError, TypeError):  # only `__new__` sets some
                    member.__set__(made, value)
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


def _read(member: Any, error: BaseException) -> object:
    """Return what a member in C or a slot holds; `_ABSENT` if it is empty, or something else."""
    if isinstance(member, MemberDescriptorType):
        with contextlib.suppress(AttributeError):
            return member.__get__(error)
    return _ABSENT


_ABSENT: Final = object()
