# this_file: src/opero/testing/identity.py
"""What a call is called in a recording: the function, and a digest of its arguments.

A recording is made on one machine, perhaps with a real client and a real password, and replayed on
another one without. So secrets are no part of it, nor is what has no content.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import WeakKeyDictionary

from opero.caching.keys import Unkeyable, digest
from opero.errors import UnkeyableError
from opero.utils.secrets import looks_secret

if TYPE_CHECKING:
    from opero.core.call import Call
    from opero.core.function import FunctionInfo
    from opero.core.options import Options

__all__ = ["Identity", "identify", "secrets_of"]


class Identity(NamedTuple):
    """The name of a call.

    Attributes:
        function: Module and qualified name, and what tells apart two functions of one name.
        call: Digest of the arguments.
    """

    function: str
    call: str

    def __str__(self) -> str:
        return f"{self.function} {self.call}"


def _function_name(info: FunctionInfo) -> str:
    """Return what a function is called, with a digest of what it is bound to or closes over, if anything."""
    # Looked at once, because what it closes over may change.
    with suppress(TypeError):  # an object without a hash
        known = _names.get(info.fn)
        if known is not None:
            return known
    name = f"{info.module}:{info.qualname}"
    bound = list(_digests(_bound_to(info.fn)))
    if bound:
        name = f"{name}#{digest(bound).hex()[:_SHORT]}"
    with suppress(TypeError):  # one that cannot be referred to weakly
        _names[info.fn] = name
    return name


_names: Final[WeakKeyDictionary[Any, str]] = WeakKeyDictionary()


def identify(info: FunctionInfo, options: Options, call: Call) -> Identity | None:
    """Return the name of a call; None if its arguments do not fit the function.

    Args:
        info: The function.
        options: Its `cache_key`, or `cache_ignore` and `secret`.
        call: The call.

    Raises:
        UnkeyableError: `cache_key` returns something without content.
    """
    arguments = _arguments(info, call)
    if arguments is None:
        return None
    function = _function_name(info)
    if options.cache_key is not None:
        made = options.cache_key(*call.args, **call.kwargs)
        try:
            return Identity(function, digest(made).hex()[:_LENGTH])
        except Unkeyable as signal:
            raise UnkeyableError(
                f"{info.name}() cannot be recorded: what cache_key returns must have content: {signal}."
            ) from None
    left_out, secret = frozenset(options.cache_ignore), frozenset(options.secret)
    kept = (
        (name, value)
        for name, value in arguments
        if name not in left_out and not looks_secret(name, secret)
    )
    return Identity(function, digest(list(_digests(kept))).hex()[:_LENGTH])


def secrets_of(info: FunctionInfo, options: Options, call: Call) -> list[str]:
    """Return the texts among the arguments that must not be written anywhere."""
    found: list[str] = []
    secret = frozenset(options.secret)
    for name, value in _arguments(info, call) or ():
        if looks_secret(name, secret):
            values = value if isinstance(value, list | tuple) else [value]
            found += [v for v in values if isinstance(v, str) and len(v) >= _TELLING]
    return found


_SHORT: Final = 12
_LENGTH: Final = 24
"""Digits of a digest, four bits each: enough for one file."""

_TELLING: Final = 4
"""Shorter texts stand everywhere, so that they are neither worth hiding nor possible to hide."""


def _arguments(info: FunctionInfo, call: Call) -> list[tuple[str, Any]] | None:
    """Return names and values of a call's arguments, defaults filled in and `**kwargs` one by one."""
    try:
        bound = info.declared.bind(*call.args, **call.kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    found: list[tuple[str, Any]] = []
    for name, value in bound.arguments.items():
        if info.declared.parameters[name].kind is info.declared.parameters[name].VAR_KEYWORD:
            found += sorted(value.items())
        else:
            found.append((name, value))
    return found


def _digests(named: Any) -> Iterator[tuple[str, bytes]]:
    """Return digests of what has content."""
    for name, value in named:
        try:
            yield name, digest(value)
        except Unkeyable:
            continue


_EMPTY_CELL: Final = CellType()


def _bound_to(fn: Any) -> Iterator[tuple[str, Any]]:
    while isinstance(fn, partial):
        yield "", fn.args
        yield from sorted(fn.keywords.items())
        fn = fn.func
    if isinstance(fn, MethodType):
        yield "self", fn.__self__
        fn = fn.__func__
    if isinstance(fn, FunctionType):
        cells = dict(zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True))
        for name, cell in sorted(cells.items()):
            if cell != _EMPTY_CELL and name != fn.__name__:
                yield name, cell.cell_contents
    elif not hasattr(fn, "__name__"):
        yield "self", fn
