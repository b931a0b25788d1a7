# this_file: src/opero/caching/keys/shapes.py
"""Describe objects in terms of simpler values: types of the standard library, and what goes by its name.

Types are recognised by their names, so that nothing has to be imported for it. Tags are our own
where the library moves its classes about (`pathlib` did between Python 3.11 and 3.13). A name is
believed only when it leads to the very object.
"""

from __future__ import annotations

import collections
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

__all__ = [
    "NAMED", "STANDARD", "Shape", "Unkeyable", "class_tag", "importable", "module_name", "type_name",
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


# --- types of the standard library, and a few that come with pydantic -----------------------------


def _zoned(tag: str, fields: tuple[int, ...], value: Any) -> Shape:
    zone = value.tzinfo
    if zone is None:
        return Shape(tag, fields)
    # Wall time and offset give the instant; the zone's name tells zones of one offset apart.
    offset = value.utcoffset()
    label = getattr(zone, "key", None) or getattr(zone, "zone", None)
    parts = {
        "offset": offset,
        "name": value.tzname(),
        "zone": label if type(label) is str else None,
        "class": type_name(type(zone)),
    }
    return Shape(tag, fields, parts)


def _datetime(value: Any) -> Shape:
    day = (value.year, value.month, value.day)
    clock = (value.hour, value.minute, value.second, value.microsecond, value.fold)
    return _zoned("datetime", day + clock, value)


def _time(value: Any) -> Shape:
    fields = (value.hour, value.minute, value.second, value.microsecond, value.fold)
    return _zoned("time", fields, value)


def _zoneinfo(value: Any) -> Shape:
    if value.key is None:
        raise Unkeyable(type_name(type(value)), "has no key: it was read from a file")
    return Shape("zoneinfo", value.key)


def _decimal(value: Any) -> Shape:
    sign, digits, exponent = value.as_tuple()
    return Shape("decimal", (sign, "".join(map(str, digits)), exponent))


def _path(flavour: str) -> Callable[[Any], Shape]:
    return lambda value: Shape("path", (flavour, value.as_posix()))


def _network(value: Any) -> Shape:
    return Shape("ip", (type(value).__name__, value.network_address, value.prefixlen))


def _interface(value: Any) -> Shape:
    return Shape("ip", (type(value).__name__, value.ip, value.network.prefixlen))


def _view(value: memoryview) -> Shape:
    return Shape("memoryview", (value.format, value.shape, value.tobytes()))


_PATHS: Final = ("PurePath", "PurePosixPath", "PureWindowsPath", "Path", "PosixPath", "WindowsPath")

STANDARD: Final[dict[str, Callable[[Any], Shape]]] = {
    "bytearray": lambda value: Shape("bytearray", bytes(value)),
    "memoryview": _view,
    "range": lambda value: Shape("range", (value.start, value.stop, value.step)),
    "slice": lambda value: Shape("slice", (value.start, value.stop, value.step)),
    "mappingproxy": lambda value: Shape("mappingproxy", value.copy()),
    "types.SimpleNamespace": lambda value: Shape("namespace", None, dict(vars(value))),
    "array.array": lambda value: Shape("array", (value.typecode, value.tolist())),
    "collections.deque": lambda value: Shape(
        "deque", list(collections.deque.__iter__(value)), {"maxlen": value.maxlen}
    ),
    "collections.OrderedDict": lambda value: Shape(
        "ordereddict",
        dict(dict.items(value)),
        {"order": list(collections.OrderedDict.__iter__(value))},
    ),
    "collections.defaultdict": lambda value: Shape(
        "defaultdict", dict(dict.items(value)), {"default_factory": value.default_factory}
    ),
    "collections.Counter": lambda value: Shape("counter", dict(dict.items(value))),
    "datetime.datetime": _datetime,
    "datetime.date": lambda value: Shape("date", (value.year, value.month, value.day)),
    "datetime.time": _time,
    "datetime.timedelta": lambda value: Shape(
        "timedelta", (value.days, value.seconds, value.microseconds)
    ),
    "datetime.timezone": lambda value: Shape(
        "timezone", (value.utcoffset(None), value.tzname(None))
    ),
    "zoneinfo.ZoneInfo": _zoneinfo,
    "decimal.Decimal": _decimal,
    "fractions.Fraction": lambda value: Shape("fraction", (value.numerator, value.denominator)),
    "uuid.UUID": lambda value: Shape("uuid", value.int),
    # As numbers: the text form of mapped IPv6 addresses changed in Python 3.13.
    "ipaddress.IPv4Address": lambda value: Shape("ip", (4, int(value))),
    "ipaddress.IPv6Address": lambda value: Shape("ip", (6, int(value), value.scope_id)),
    "ipaddress.IPv4Network": _network,
    "ipaddress.IPv6Network": _network,
    "ipaddress.IPv4Interface": _interface,
    "ipaddress.IPv6Interface": _interface,
    "re.Pattern": lambda value: Shape("pattern", (value.pattern, value.flags)),
    **{
        f"{module}.{name}": _path(name)
        for module in ("pathlib", "pathlib._local")
        for name in _PATHS
    },
    "pydantic_core._pydantic_core.Url": lambda value: Shape("url", str(value)),
    "pydantic_core._pydantic_core.MultiHostUrl": lambda value: Shape("url", str(value)),
    "pydantic.networks._BaseUrl": lambda value: Shape("url", str(value)),
    "pydantic.networks._BaseMultiHostUrl": lambda value: Shape("url", str(value)),
    "pydantic.types._SecretBase": lambda value: Shape("secret", value.get_secret_value()),
}
