# this_file: src/opero/caching/keys/shapes.py
"""Describe objects in terms of simpler values, or by their names.

Types are recognised by their names, so that nothing has to be imported for it. Tags are our own
where the library moves its classes about (`pathlib` did between Python 3.11 and 3.13). A name is
believed only when it leads to the very object.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

__all__ = [
    "NAMED", "Shape", "Unkeyable", "class_tag", "importable", "module_name", "module_shape", "type_name",
]  # fmt: skip

_SHOWN_STEPS: Final = 15


class Unkeyable(Exception):  # noqa: N818 - a signal inside opero, not what users catch
    """A value, or a part of it, has no content that a key could be built from.

    Attributes:
        culprit: Type name of the offending part, never its value.
        reason: Why it has no key, as the rest of a sentence that begins with the culprit.
        path: Steps from the encoded value to the part: names, indices, or a placeholder such as
            "<element>". Of many steps the innermost are dropped.

    Example:
        >>> from opero.caching.keys import encode
        >>> try:
        ...     encode({"cfg": [1, object()]})
        ... except Unkeyable as signal:
        ...     print(signal.path, signal.culprit)
        ('cfg', 1) object
    """

    def __init__(self, culprit: str, reason: str = "has no content to build a key from") -> None:
        super().__init__(culprit, reason)
        self.culprit = culprit
        self.reason = reason
        self.path: tuple[str | int, ...] = ()

    def inside(self, step: str | int) -> None:
        """Prepend a step to the path, on the way out of a container.

        Args:
            step: Name or index of the part within its container.
        """
        self.path = (step, *self.path[:_SHOWN_STEPS])

    def __str__(self) -> str:
        where = f"{'.'.join(map(str, self.path))}: " if self.path else ""
        return f"{where}{self.culprit} {self.reason}"


class Shape(NamedTuple):
    """An object in terms of simpler values.

    Attributes:
        tag: What it is: a name of ours, or "module:qualname" of its class. Ours have no colon.
        whole: Content without a name of its own, such as the text of a `str` subclass.
        parts: Named content, such as fields.
    """

    tag: str
    whole: object = None
    parts: Mapping[str, object] = types.MappingProxyType({})


def type_name(kind: type) -> str:
    """Return a type's name for people: "module.qualname", without "builtins"."""
    module, name = kind.__module__, kind.__qualname__
    return name if module == "builtins" else f"{module}.{name}"


def class_tag(kind: type) -> str:
    """Return a class's name for keys: "module:qualname", the script always being `__main__`."""
    return f"{module_name(kind.__module__)}:{kind.__qualname__}"


def module_name(name: str) -> str:
    """Return a module's name for keys."""
    # A spawned worker imports the script under another name.
    return "__main__" if name == "__mp_main__" else name


# --- what goes by name: functions, classes, methods and type hints --------------------------------


def importable(value: Any) -> Shape:
    """Describe a value by the name it can be imported by.

    Args:
        value: A function, a class, or anything else that knows its module and name.

    Returns:
        The shape of that name.

    Raises:
        Unkeyable: When the name leads elsewhere (a lambda, a local function), or there is none.

    Example:
        >>> importable(len).whole
        'builtins:len'
    """
    module = getattr(value, "__module__", None)
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    if type(module) is str and type(name) is str:
        # `NoneType` says that it lives among the builtins, but only `types` has it.
        for place in (module, "types") if module == "builtins" else (module,):
            found: Any = sys.modules.get(place)
            for step in name.split("."):
                found = getattr(found, step, None)
            if found is value:
                return Shape("import", f"{module_name(module)}:{name}")
        if callable(value):
            raise Unkeyable(type_name(type(value)), "cannot be imported by its name")
    raise Unkeyable(type_name(type(value)))


def _method(value: Any) -> Shape:
    """By name where the owner's class has it under that name, else by the function itself."""
    holder = value.__self__
    owner = holder if issubclass(type(holder), type) else type(holder)
    function: Any = value.__func__
    name: Any = getattr(function, "__name__", None)
    for base in owner.__mro__:
        item = vars(base).get(name)
        if getattr(item, "__func__", item) is function:
            return Shape("method", f"{class_tag(base)}.{name}", {"__self__": holder})
    return Shape("method", None, {"__func__": function, "__self__": holder})


def _builtin_method(value: Any) -> Shape:
    holder = value.__self__
    if holder is None or type(holder) is types.ModuleType:
        return importable(value)
    return Shape("method", value.__qualname__, {"__self__": holder})


def _descriptor(value: Any) -> Shape:
    owner = value.__objclass__
    if vars(owner).get(value.__name__) is not value:
        raise Unkeyable(type_name(type(value)), "cannot be found by its name")
    return Shape("descriptor", value.__name__, {"__objclass__": owner})


def _alias(value: Any) -> Shape:
    names = ("__origin__", "__args__", "__metadata__", "__unpacked__")
    return Shape("alias", None, {name: getattr(value, name, None) for name in names})


def _union(value: Any) -> Shape:
    # `int | None` and `Optional[int]` are equal, and of one type since Python 3.14.
    parts = {"__origin__": None, "__metadata__": None, "__unpacked__": None}
    return Shape("alias", None, parts | {"__args__": value.__args__})


def module_shape(value: types.ModuleType) -> Shape:
    """Describe a module by its name.

    Raises:
        Unkeyable: It is not the one that is imported by that name.
    """
    name: Any = getattr(value, "__name__", None)
    if type(name) is not str or sys.modules.get(name) is not value:
        raise Unkeyable("module", "cannot be imported by its name")
    return Shape("module", module_name(name))


def _partial(value: Any) -> Shape:
    parts = {"func": value.func, "args": value.args, "keywords": value.keywords}
    return Shape("partial", None, parts)


NAMED: Final[dict[str, Callable[[Any], Shape]]] = {
    "functools.partial": _partial,
    "method": _method,
    "builtin_function_or_method": _builtin_method,
    "method-wrapper": _builtin_method,
    "method_descriptor": _descriptor,
    "wrapper_descriptor": _descriptor,
    "classmethod_descriptor": _descriptor,
    "types.GenericAlias": _alias,
    "types.UnionType": _union,
    "typing.Union": _union,
    "typing._GenericAlias": _alias,
    "typing._UnionGenericAlias": _union,
    "typing._LiteralGenericAlias": _alias,
    "typing._CallableGenericAlias": _alias,
    "typing._AnnotatedAlias": _alias,
}
"""By the name of the type, as in the table of plain types."""
