# this_file: src/opero/caching/keys/names.py
"""What goes by name: functions, classes, methods and type hints.

A name is believed only when it leads to the very object.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any, Final

from opero.caching.keys.shape import Shape, Unkeyable, class_tag, module_name, type_name

__all__ = ["NAMED", "importable"]


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
    "types.UnionType": _alias,
    "typing._GenericAlias": _alias,
    "typing._UnionGenericAlias": _alias,
    "typing._LiteralGenericAlias": _alias,
    "typing._CallableGenericAlias": _alias,
    "typing._AnnotatedAlias": _alias,
}
"""By the name of the type, as in `standard`."""
