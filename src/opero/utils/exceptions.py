# this_file: src/opero/utils/exceptions.py
"""Take exceptions apart and make them anew, for other callers, for other processes and for journals.

A constructor is not run again, since it may want other arguments than `args` holds. What carries an exception (nothing,
a pickle, JSON) says how a value is written and read, and keeps what links one exception to others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from types import MemberDescriptorType
from typing import Any, Final, TypeVar

E = TypeVar("E", bound=BaseException)
T = TypeVar("T")

LONGEST: Final = 10_000
"""Characters of a text that is kept of an exception."""

set_directly: Final = BaseException.__setattr__
"""Sets an attribute past the class's own `__setattr__`, as the interpreter does: it may be a frozen dataclass."""


def take_apart(
    error: BaseException, write: Callable[[Any], T]
) -> tuple[list[T | None], dict[str, T]]:
    """Return the parts of an exception that can be carried, for `new_error`.

    Args:
        error: The exception; of a group its message is the only argument.
        write: Returns what stands for a value; raises if it cannot be carried.

    Returns:
        Its `args`, with None for those that cannot be carried; and by name what its `__dict__`, slots and members in C
        (`OSError.errno`) hold, without what cannot be.
    """

    def written(value: object) -> T | None:
        try:
            return write(value)
        except Exception:  # noqa: BLE001 - whatever a class raises
            return None

    args = (error.message,) if isinstance(error, BaseExceptionGroup) else error.args
    held = {name: written(value) for name, value in _held(error).items()}
    if hasattr(type(error), "__getattr__"):
        # It may look into what is left out: with the body of an `HTTPError` gone, reading any other name would fail.
        held = {name: write(None) if value is None else value for name, value in held.items()}
    return [*map(written, args)], {n: value for n, value in held.items() if value is not None}


def new_error(
    kind: type[BaseException],
    args: Iterable[Any],
    attributes: Mapping[str, Any],
    read: Callable[[Any], Any] = lambda value: value,
    *,
    members: Sequence[BaseException] = (),
    trusted: bool = False,
) -> Any:
    """Make an exception of its parts.

    Args:
        kind: Its class.
        args: Its `args`, as they were written.
        attributes: What it holds by name, as it was written.
        read: Returns the value for which something stands.
        members: Those of a group, which stand behind its message.
        trusted: Whether the `__new__` of a class of the program may run, and refuse.

    Raises:
        Exception: The class cannot be made so.

    Example:
        >>> new_error(FileNotFoundError, (2, "No such file"), {"filename": "x.txt"})
        FileNotFoundError(2, 'No such file')
    """
    maker: Any = kind
    if not trusted:
        maker = next(base for base in kind.__mro__ if base.__module__ == "builtins")
    given = (*map(read, args), members) if members else (*map(read, args),)
    try:
        made = maker.__new__(kind, *given)
    except TypeError:
        made = maker.__new__(kind)
    set_directly(made, "args", given)
    for name, value in attributes.items():
        member = getattr(kind, name, None)
        if isinstance(member, MemberDescriptorType):
            with suppress(AttributeError, TypeError):  # only `__new__` sets some
                member.__set__(made, read(value))
        else:
            vars(made)[name] = read(value)
    return made


def copy_error(error: E) -> E:
    """Return a copy of an exception: type, args, attributes, notes, cause, context and traceback so far.

    Returns:
        The copy, or the exception itself if it cannot be copied.

    Example:
        >>> copy_error(FileNotFoundError(2, "No such file", "x.txt"))
        FileNotFoundError(2, 'No such file')
    """
    kind = type(error)
    try:
        held = _held(error)
        if isinstance(notes := held.get("__notes__"), list):
            held["__notes__"] = list(notes)
        made = new_error(kind, error.args, held, trusted=True)
        if type(made) is not kind or made is error:
            return error
        for name in _LINKS:
            set_directly(made, name, getattr(error, name))
    except Exception:  # noqa: BLE001 - a class may refuse anything; all callers share the object then
        return error
    return made


def text_of(value: object, show: Callable[[Any], str] = str) -> str:
    """Return the text of an exception, or of one of its arguments, whatever its class does."""
    try:
        return show(value)[:LONGEST]
    except Exception as error:  # noqa: BLE001 - a class may refuse anything
        return f"<{show.__name__}() raised {type(error).__name__}>"


def _held(error: BaseException) -> dict[str, Any]:
    """Return by name what an exception holds apart from its `args`, members and links."""
    held = dict(vars(error))
    for owner in (one for one in type(error).__mro__ if one not in _APART):
        for name, member in vars(owner).items():
            if isinstance(member, MemberDescriptorType):
                with suppress(AttributeError):  # an empty slot
                    value = member.__get__(error)
                    # An empty member in C reads as None, and would not be empty once None were written to it.
                    if value is not None or owner.__module__ != "builtins":
                        held[name] = value
    return held


_APART: Final = (BaseExceptionGroup, BaseException, object)
_LINKS: Final = ("__cause__", "__context__", "__suppress_context__", "__traceback__")
