# this_file: src/opero/caching/keys/content.py
"""What an object's content is: every keyable value that is no plain builtin, described by
simpler ones.

No library is imported for this: types are recognised by the name of their module, fields by the
markers that dataclasses, attrs and pydantic leave on their classes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import types
from collections.abc import Callable, Iterator
from typing import Any, Final

from opero.caching.keys.shapes import (
    NAMED,
    Shape,
    Unkeyable,
    class_tag,
    importable,
    module_shape,
    type_name,
)
from opero.caching.plain_types import BY_NAME

__all__ = ["describe"]


def describe(value: Any) -> Shape:
    """Describe a value that is not itself a plain builtin.

    Args:
        value: Any object. Only `type(value)` is believed, not what the object says about its class.

    Returns:
        Its shape; the whole and the parts may need describing in turn.

    Raises:
        Unkeyable: When the value has no declared content and no importable name.

    Example:
        >>> describe(range(3))
        Shape(tag='range', whole=(0, 3, 1), parts=mappingproxy({}))
    """
    kind = type(value)
    exact = _listed(value, kind)
    if exact is not None:
        return exact
    if issubclass(kind, type):
        return importable(value)
    if issubclass(kind, types.ModuleType):
        return module_shape(value)
    if issubclass(kind, enum.Enum):
        return Shape(class_tag(kind), _within(kind, _member(value)))
    base, core = _core(value, kind)
    if core is not None and base is kind:
        return core if type(core) is Shape else Shape(class_tag(kind), core)
    declared = _declared(value, kind)
    if declared is None and core is None:
        return importable(value)
    state = _state(value, kind, base) if declared is None else declared
    return Shape(class_tag(kind), _within(kind, core), state)


def _listed(value: Any, base: type) -> Shape | None:
    """Describe a value as one of a plain type, or of a type whose values go by their names."""
    name = type_name(base)
    row = BY_NAME.get(name)
    if row is not None and row.key is not None:
        parts = row.key(value)
        if parts is None:
            raise Unkeyable(type_name(type(value)), "has no key: it was read from a file")
        return Shape(*parts)
    named = NAMED.get(name)
    return None if named is None else named(value)


# --- subclasses: what the nearest known base says about the value


def _core(value: Any, kind: type) -> tuple[type, object]:
    for base in kind.__mro__:
        plain = _BUILTINS.get(base)
        if plain is not None:
            return base, plain(value)
        listed = _listed(value, base)
        if listed is not None:
            return base, listed
        library = base.__module__.partition(".")[0]
        if library in ("numpy", "pandas"):
            from opero.caching.keys.arrays import describe_array

            shape = describe_array(value, base)
            if shape is not None:
                return base, shape
    return object, None


def _state(value: Any, kind: type, base: type) -> dict[str, object]:
    """What a subclass adds to its base: the instance's dict and slots."""
    state: dict[str, object] = {}
    for owner in kind.__mro__[: kind.__mro__.index(base)]:
        for name, member in vars(owner).items():
            if type(member) is types.MemberDescriptorType:
                with contextlib.suppress(AttributeError):  # a slot may be empty
                    state[name] = member.__get__(value)
    state.update(_own_dict(value))
    return state


def _own_dict(value: Any) -> dict[str, object]:
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return dict(found)


def _within(kind: type, core: object) -> object:
    """Add what the enclosing function gave to a class defined inside it.

    Two calls of a factory make two classes of one name; the plain values that their methods close
    over, and their plain class attributes, distinguish them.
    """
    given: dict[str, object] = {}
    for owner in kind.__mro__:
        if "<locals>" in owner.__qualname__:
            for name, item in vars(owner).items():
                if type(item) in _SCALARS and not name.startswith("__"):
                    given[name] = item
                given.update({f"{name}({cell})": held for cell, held in _closed_over(owner, item)})
    return Shape("enclosed", core, given) if given else core


def _closed_over(owner: type, item: object) -> Iterator[tuple[str, object]]:
    function = getattr(item, "fget" if type(item) is property else "__func__", item)
    if type(function) is not types.FunctionType or function.__closure__ is None:
        return
    # Methods that dataclasses and attrs generate close over machinery; their code has another name.
    if function.__code__.co_qualname.startswith(f"{owner.__qualname__}."):
        for name, cell in zip(function.__code__.co_freevars, function.__closure__, strict=True):
            try:
                held = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            if type(held) in _SCALARS:
                yield name, held


# --- classes that declare their content


def _declared(value: Any, kind: type) -> dict[str, object] | None:
    if hasattr(kind, "__dataclass_fields__"):
        compared = {field.name: field.compare for field in dataclasses.fields(kind)}
        return _fields(value, compared, own="__dataclass_fields__" in vars(kind))
    if hasattr(kind, "__attrs_attrs__"):
        compared = {field.name: bool(field.eq) for field in kind.__attrs_attrs__}
        return _fields(value, compared, own="__attrs_attrs__" in vars(kind))
    if hasattr(kind, "__pydantic_validator__"):
        return _pydantic(value, kind)
    return None


def _fields(value: Any, compared: dict[str, bool], *, own: bool) -> dict[str, object]:
    absent = object()
    found = {name: getattr(value, name, absent) for name, counts in compared.items() if counts}
    content = {name: item for name, item in found.items() if item is not absent}
    if not own:
        # A subclass that is no dataclass itself keeps what it adds outside the fields.
        content |= {name: item for name, item in _own_dict(value).items() if name not in compared}
    return content


def _pydantic(value: Any, kind: type) -> dict[str, object]:
    names = getattr(kind, "__pydantic_fields__", None)
    if names is None:  # before pydantic 2.10
        names = vars(kind).get("model_fields", {})
    held = _own_dict(value)
    content = {name: held[name] for name in names if name in held}
    for extra in ("__pydantic_extra__", "__pydantic_private__"):
        # Both take part in pydantic's own equality.
        added = getattr(value, extra, None)
        if added:
            content[extra] = dict(added)
    return content


def _member(value: Any) -> tuple[str | None, object]:
    content = value._value_  # documented for authors of enums; `.value` may be overridden
    items = content if type(content) is tuple else (content,)
    # The name alone identifies a member whose value has no plain content (a function, say).
    plain = all(type(item) in _SCALARS for item in items)
    name = None if issubclass(type(value), enum.Flag) else value._name_
    return name, content if plain else None


_SCALARS: Final = frozenset({str, int, float, complex, bytes, bool, types.NoneType})

_BUILTINS: Final[dict[type, Callable[[Any], object]]] = {
    # The base's own methods: a subclass may have overridden any of them.
    str: str.__str__,
    int: int.__index__,
    float: float.__float__,
    complex: complex.__complex__,
    bytes: bytes.__bytes__,
    tuple: lambda value: tuple(tuple.__iter__(value)),
    list: list.copy,
    dict: lambda value: dict(dict.items(value)),
    set: lambda value: set(set.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
}
