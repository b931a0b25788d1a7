# this_file: src/opero/caching/keys/standard.py
"""What the content of the standard library's types is, and of a few that come with pydantic.

By the name of the type, so that nothing has to be imported to recognise it. Tags are our own where
the library moves its classes about (`pathlib` did between Python 3.11 and 3.13).
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any, Final

from opero.caching.keys.shape import Shape, Unkeyable, type_name

__all__ = ["STANDARD"]


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
