# this_file: src/opero/caching/copying.py
"""Copy mutable results: what is stored shares no mutable state with what any caller gets.

Immutable values are shared and cost nothing. Plain data (dicts, lists, sets and tuples of plain
data, arrays) is looked at once, when it is stored: the outcome is a small function that copies
exactly its mutable containers and shares the rest, which is quicker than unpickling. Everything
else goes through `copy.deepcopy`.
"""

from __future__ import annotations

import enum
import io
import sys
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from types import (
    BuiltinFunctionType,
    EllipsisType,
    FunctionType,
    MappingProxyType,
    NoneType,
    NotImplementedType,
)
from typing import Any, Final, cast

from opero.caching.plain_types import NotPlain, of_type, state_of

Copier = Callable[[Any], Any]

ATOMS: Final[frozenset[type]] = frozenset(
    {
        NoneType, bool, int, float, complex, str, bytes, range, EllipsisType, NotImplementedType,
        FunctionType, BuiltinFunctionType, type,
    }
)  # fmt: skip
"""Exact types whose values never change, or are never copied (functions and classes)."""


class Uncopyable(Exception):  # noqa: N818 - a signal between the cache and this module
    """A result cannot be isolated; the message says why."""


def freeze(value: Any, *, copy: bool = True) -> tuple[Any, Copier | None]:
    """Make a result ready to be stored.

    Args:
        value: The result; the caller keeps it.
        copy: False to share the object itself with all callers.

    Returns:
        What to store, and the function that makes a caller's copy from it: None if it can be shared
        as it is.

    Raises:
        Uncopyable: It can be used only once (an awaitable, an iterator, a file, a response whose body has
            not been read), or copying fails.

    Example:
        >>> stored, copier = freeze({"id": 1, "tags": ["a"]})
        >>> copier(stored)["tags"].append("b")
        >>> copier(stored)
        {'id': 1, 'tags': ['a']}
        >>> freeze("text")
        ('text', None)
    """
    if type(value) in ATOMS:
        return value, None
    if type(value) not in _CONTAINERS:
        _refuse_single_use(value)
    if not copy:
        _refuse_parts(value, _is_single_use)
        return value, None
    if type(value).__module__.partition(".")[0] == "pandas":
        return _pickled(value)
    try:
        copier = _plan(value, set(), {})
    except (NotPlain, RecursionError):
        _refuse_parts(value, _is_open)
        copier = _deep_copy()
    if copier is None:
        return value, None
    try:
        stored = copier(value)
    except Exception as error:
        raise Uncopyable(
            f"its result, {_named(value)}, cannot be copied ({_why(error)})"
        ) from error
    if type(stored) is not type(value):
        raise Uncopyable(f"a copy of its result, {_named(value)}, is {_named(stored)}")
    return stored, copier


def isolated(value: Any) -> Any:
    """Return a value that shares no mutable state with `value`.

    Raises:
        Uncopyable: As for `freeze`.
    """
    stored, copier = freeze(value)
    return stored if copier is None else copier(stored)


def _named(value: object) -> str:
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"


def _why(error: Exception) -> str:
    text = str(error)
    # Python's own message names a type; others may hold data.
    return text if text.startswith("cannot pickle") else type(error).__name__


def _refuse_single_use(value: object) -> None:
    if _is_single_use(value):
        raise Uncopyable(f"its result, {_named(value)}, can be used only once")


def _is_single_use(value: object) -> bool:
    kind = type(value)
    return (
        hasattr(kind, "__next__")
        or hasattr(kind, "__await__")
        or hasattr(kind, "__anext__")
        or isinstance(value, io.IOBase)
        or _is_open(value)
    )


_READS: Final = ("read", "aread", "recv", "readinto", "cursor", "iter_content", "__aiter__")
_MOST_PARTS: Final = 1000
"""Parts of a result that are looked at."""


def _is_open(value: object) -> bool:
    """Whether an object is a stream or a connection and says of itself that it is not closed.

    That is so for the responses of HTTP clients until their body has been read, and for files, cursors
    and connections. What is in memory only can be copied as it is.
    """
    kind = type(value)
    if issubclass(kind, io.BytesIO | io.StringIO):
        return False
    if not any(hasattr(kind, verb) for verb in _READS):
        return False
    try:
        return any(getattr(value, name, None) is False for name in ("is_closed", "closed"))
    except Exception:  # noqa: BLE001 - a property may raise anything
        return False


def _refuse_parts(value: object, refused: Callable[[object], bool]) -> None:
    """Raise if a result holds something that is refused, in containers or in attributes.

    A class that says how it is copied may leave that out of the copy, which is of no use then: httpx
    and requests do. Of such an object only its own attributes count.
    """
    parts, seen = [(value, True)], set[int]()
    while parts and len(seen) < _MOST_PARTS:
        part, descend = parts.pop()
        kind = type(part)
        if kind in ATOMS or isinstance(part, type) or id(part) in seen:
            continue
        seen.add(id(part))
        if refused(part):
            within = "" if part is value else f" holds {_named(part)} that"
            raise Uncopyable(f"its result, {_named(value)},{within} can be used only once")
        if not descend:
            continue
        inner = _items_of(part)
        if kind not in _CONTAINERS:
            inner += state_of(part, kind.__mro__).values()
            descend = not _copies_itself(kind)
        if not ATOMS.issuperset(map(type, inner)):
            parts += [(item, descend) for item in inner]


def _items_of(part: object) -> list[Any]:
    """Return what a container holds, whatever subclass of it it is."""
    found: Iterable[Any] = ()
    if isinstance(part, dict | MappingProxyType):
        found = part.values()
    elif isinstance(part, list | tuple | set | frozenset | deque):
        found = part
    elif isinstance(part, partial):
        found = (*part.args, *part.keywords.values())
    elif type(part).__module__ == "numpy" and type(part).__name__ == "ndarray":
        array = cast("Any", part)
        found = array.flat if array.dtype.hasobject else ()
    return list(islice(found, _MOST_PARTS))


def _copies_itself(kind: type) -> bool:
    """Whether a class says how its instances are copied or pickled."""
    return hasattr(kind, "__deepcopy__") or any(
        getattr(kind, name) is not getattr(object, name)
        for name in ("__reduce__", "__reduce_ex__", "__getstate__")
    )


def _deep_copy() -> Copier:
    from copy import deepcopy

    return deepcopy


def _pickled(value: Any) -> tuple[bytes, Copier]:
    # A deep copy of a frame shares the lists and dicts in its cells.
    import pickle

    try:
        return pickle.dumps(value, pickle.HIGHEST_PROTOCOL), pickle.loads
    except Exception as error:
        raise Uncopyable(
            f"its result, {_named(value)}, cannot be pickled ({_why(error)})"
        ) from error


# --- immutable values -----------------------------------------------------------------------------


def _immutable(value: Any) -> bool:
    """Whether a value can be shared: nothing reachable from it changes."""
    kind = type(value)
    if kind in ATOMS or isinstance(value, type | enum.Enum):
        return True
    row = of_type(kind)
    if row is not None and row.immutable:
        return True
    if isinstance(value, tuple | frozenset):
        return _bare(value) and all(map(_immutable, value))
    if kind.__module__ == "numpy":
        return _numpy_scalar(value)
    if isinstance(value, str | bytes | int | float | complex):
        return _bare(value)
    params = vars(kind).get("__dataclass_params__")
    return params is not None and params.frozen and _frozen_fields(value, kind)


def _bare(value: object) -> bool:
    """Whether an instance of a subclass carries nothing beside its content."""
    return not getattr(value, "__dict__", None)


def _frozen_fields(value: Any, kind: Any) -> bool:
    names = kind.__dataclass_fields__
    # A frozen dataclass may still keep a cached property beside its fields.
    if not names.keys() >= getattr(value, "__dict__", {}).keys():
        return False
    return all(_immutable(getattr(value, name, None)) for name in names)


def _numpy_scalar(value: Any) -> bool:
    numpy = sys.modules["numpy"]
    return isinstance(value, numpy.generic) and not isinstance(value, numpy.void)


# --- plans: how to copy plain data ----------------------------------------------------------------


def _plan(value: Any, seen: set[int], shapes: dict[Any, Copier]) -> Copier | None:
    """Return what copies `value`, None if it is immutable.

    Args:
        value: What is looked at.
        seen: Ids of the mutable containers met so far. A second meeting is for `deepcopy`, which
            keeps them one.
        shapes: Plans made so far, so that a thousand records of one shape share one plan.
    """
    kind = type(value)
    if kind in ATOMS:
        return None
    if kind not in _CONTAINERS:
        return _plan_other(value, seen)
    if kind is not tuple and kind is not frozenset:
        if id(value) in seen:
            raise NotPlain
        seen.add(id(value))
    if kind is dict:
        if not (ATOMS.issuperset(map(type, value)) or all(map(_immutable, value))):
            raise NotPlain
        return _plan_parts(value, value.items(), value.values(), seen, shapes)
    if kind is list or kind is tuple:
        return _plan_parts(value, enumerate(value), value, seen, shapes)
    if kind is bytearray:
        return bytearray.copy
    if not (ATOMS.issuperset(map(type, value)) or all(map(_immutable, value))):
        raise NotPlain
    return set.copy if kind is set else None


_CONTAINERS: Final = frozenset({dict, list, tuple, set, frozenset, bytearray})


def _plan_other(value: Any, seen: set[int]) -> Copier | None:
    if _immutable(value):
        return None
    _refuse_single_use(value)
    kind = type(value)
    if kind.__module__ == "numpy" and kind.__qualname__ == "ndarray" and not value.dtype.hasobject:
        if id(value) in seen:
            raise NotPlain
        seen.add(id(value))
        return _copy_array
    raise NotPlain


def _copy_array(value: Any) -> Any:
    return value.copy("K")  # keeps the memory layout


def _plan_parts(
    value: Any,
    pairs: Iterable[tuple[Any, Any]],
    items: Iterable[Any],
    seen: set[int],
    shapes: dict[Any, Copier],
) -> Copier | None:
    """Return what copies a dict, list or tuple, given what it holds with its keys or places, and without."""
    kind: Any = type(value)
    whole: Copier | None = None if kind is tuple else kind.copy
    if ATOMS.issuperset(map(type, items)):
        return whole
    parts = tuple(
        (key, inner) for key, item in pairs if (inner := _plan(item, seen, shapes)) is not None
    )
    if not parts:
        return whole
    first = parts[0][1]
    if kind is not dict and len(parts) == len(value) and all(inner is first for _, inner in parts):
        return shapes.setdefault((kind, first), _each_copier(kind, first))
    return shapes.setdefault((kind, parts), _parts_copier(kind, parts))


def _each_copier(kind: type, inner: Copier) -> Copier:
    def copier(value: Any) -> Any:
        return kind(map(inner, value))

    return copier


def _parts_copier(kind: type, parts: tuple[tuple[Any, Copier], ...]) -> Copier:
    def copier(value: Any) -> Any:
        made = list(value) if kind is tuple else value.copy()
        for key, inner in parts:
            made[key] = inner(value[key])
        return tuple(made) if kind is tuple else made

    return copier
