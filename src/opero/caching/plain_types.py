# this_file: src/opero/caching/plain_types.py
"""List the plain types: how values of each are recognised, copied, put into keys, taken apart and rebuilt.

One row for each type. Copying, cache keys, the codec of disk and Redis, the durable journal and
recordings all ask this table: a type that is added here is known to all of them. Types are
recognised by name, so that nothing is imported before it is needed, and then by identity: a
subclass, or a class that only bears the name, is another type.

Rebuilding executes nothing: parts are checked before a type is called with them, and classes of the
program are found among the modules that are loaded, their fields set without running their code.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from types import EllipsisType, MemberDescriptorType, NotImplementedType
from typing import Any, Final, NamedTuple

__all__ = [
    "BY_NAME", "BY_NUMBER", "Buffer", "NotPlain", "PlainType", "Undecodable", "Unencodable", "add", "class_name",
    "find_class", "of_type", "remove",
]  # fmt: skip

Buffer = bytes | bytearray | memoryview
"""What holds bytes."""

KeyParts = tuple[Any, ...]
"""Tag, content without a name, and perhaps content by name: what a key is made of."""


class Unencodable(Exception):  # noqa: N818 - a signal between codec and store
    """A value cannot be stored; the message says why, and shows nothing of the value."""


class Undecodable(Exception):  # noqa: N818 - as above
    """What was read is no entry: truncated, tampered with, of another key or another format."""


class NotPlain(Exception):  # noqa: N818 - as above
    """A value holds something else than plain data."""


class PlainType(NamedTuple):
    """What is known about one type.

    Attributes:
        name: "module.qualname", without "builtins".
        number: What stands for the type in stored entries; never used twice. None: it is not encoded.
        immutable: Whether values can be shared instead of copied.
        split: Takes a value apart into plain parts; raises `NotPlain` if it cannot.
        join: Makes the value from its parts; raises whatever it likes if they are wrong.
        key: Returns tag, content and perhaps named content for cache keys; None where there is none.
    """

    name: str
    number: int | None = None
    immutable: bool = True
    split: Callable[[Any], Iterable[Any]] | None = None
    join: Callable[[Sequence[Any]], Any] | None = None
    key: Callable[[Any], KeyParts | None] | None = None


BY_NAME: Final[dict[str, PlainType]] = {}
"""The rows by the names of their types; a type may have several."""
BY_NUMBER: Final[dict[int, PlainType]] = {}
_BUILTINS: Final[dict[type, PlainType]] = {}


def add(row: PlainType, *names: str) -> None:
    """Add a type to the table.

    Args:
        row: What is known about it.
        names: Further names under which the library has kept it.
    """
    if row.number is not None and row.number in BY_NUMBER:
        raise ValueError(f"{row.number} stands for {BY_NUMBER[row.number].name}")
    if row.number is not None:
        BY_NUMBER[row.number] = row
    for name in (row.name, *names):
        BY_NAME[name] = row
    _of_class.cache_clear()


def remove(row: PlainType) -> None:
    """Remove a type from the table."""
    if row.number is not None:
        del BY_NUMBER[row.number]
    for name in [name for name, known in BY_NAME.items() if known is row]:
        del BY_NAME[name]
    _of_class.cache_clear()


def of_type(kind: type) -> PlainType | None:
    """Return the row of a type, None if there is none.

    Example:
        >>> of_type(tuple).number, of_type(dict)
        (1, None)
    """
    row = _BUILTINS.get(kind)
    if row is not None:
        return row
    row = BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}")
    if row is not None:
        return (
            row if getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind else None
        )
    row = _of_class(kind)
    # A class may have been defined anew meanwhile.
    return row if row is not None and _is_findable(kind) else None


# --- checks -----------------------------------------------------------------------------------------------------------


def _check(parts: Sequence[Any], *kinds: type | tuple[type, ...]) -> Sequence[Any]:
    """Return parts if they are of exactly these types."""
    if len(parts) != len(kinds):
        raise ValueError("another number of parts")
    for part, kind in zip(parts, kinds, strict=True):
        if type(part) not in (kind if type(kind) is tuple else (kind,)):
            raise TypeError("a part of another type")
    return parts


_LONGEST_TEXT: Final = 100_000
_LARGEST_NUMBER: Final = 1 << 100_000
"""Beyond that, arithmetic on forged numbers would take longer than reading them."""


def _calls(name: str, *kinds: type | tuple[type, ...]) -> Callable[[Sequence[Any]], Any]:
    """Return what makes a value by calling a type of the standard library with checked parts."""
    module, _, attribute = name.rpartition(".")

    def join(parts: Sequence[Any]) -> Any:
        checked = _check(parts, *kinds)
        if type(checked[0]) is str and len(checked[0]) > _LONGEST_TEXT:
            raise ValueError("text of no such value")
        return getattr(import_module(module), attribute)(*checked)

    return join


def _text(value: object) -> tuple[str]:
    text = str(value)
    if len(text) > _LONGEST_TEXT:
        raise NotPlain
    return (text,)


def _nothing(value: object) -> tuple[()]:
    return ()


def _same(value: Iterable[Any]) -> Iterable[Any]:
    return value


# --- builtins ---------------------------------------------------------------------------------------------------------


def _span(value: Any) -> tuple[Any, Any, Any]:
    return value.start, value.stop, value.step


_BUILTIN_ROWS: Final[list[tuple[type, int, bool, Any, Any, Any]]] = [
    # Tuples and frozen sets are immutable as far as their items are.
    (tuple, 1, False, _same, tuple, None),
    (set, 2, False, _same, set, None),
    (frozenset, 3, False, _same, frozenset, None),
    (complex, 5, True, lambda v: (v.real, v.imag), lambda p: complex(*_check(p, float, float)), None),
    (
        bytearray, 6, False, lambda v: (bytes(v),), lambda p: bytearray(*_check(p, bytes)),
        lambda v: ("bytearray", bytes(v)),
    ),
    (range, 7, True, _span, lambda p: range(*_check(p, int, int, int)), lambda v: ("range", _span(v))),
    (slice, 8, False, _span, lambda p: slice(*_check(p, *map(type, p[:3]))), lambda v: ("slice", _span(v))),
    (EllipsisType, 9, True, _nothing, lambda p: [..., *_check(p)][0], None),
    (NotImplementedType, 10, True, _nothing, lambda p: [NotImplemented, *_check(p)][0], None),
]  # fmt: skip

for _kind, _number, _immutable, _split, _join, _key in _BUILTIN_ROWS:
    _row = PlainType(_kind.__qualname__, _number, _immutable, _split, _join, _key)
    _BUILTINS[_kind] = BY_NUMBER[_number] = _row
    if _key is not None:
        BY_NAME[_row.name] = _row


# --- the standard library ---------------------------------------------------------------------------------------------


def _zoned(tag: str, fields: tuple[int, ...], value: Any) -> KeyParts:
    zone = value.tzinfo
    if zone is None:
        return tag, fields
    # Wall time and offset give the instant; the zone's name tells zones of one offset apart.
    label = getattr(zone, "key", None) or getattr(zone, "zone", None)
    return (
        tag,
        fields,
        {
            "offset": value.utcoffset(),
            "name": value.tzname(),
            "zone": label if type(label) is str else None,
            "class": f"{type(zone).__module__}.{type(zone).__qualname__}",
        },
    )


def _day(value: Any) -> tuple[int, int, int]:
    return value.year, value.month, value.day


def _clock(value: Any) -> tuple[int, ...]:
    return value.hour, value.minute, value.second, value.microsecond, value.fold


def _join_moment(name: str, numbers: int) -> Callable[[Sequence[Any]], Any]:
    def join(parts: Sequence[Any]) -> Any:
        import datetime

        *fields, fold, zone = parts
        _check([*fields, fold], *[int] * (numbers + 1))
        if zone is not None and not isinstance(zone, datetime.tzinfo):
            raise TypeError("no time zone")
        return getattr(datetime, name)(*fields, tzinfo=zone, fold=fold)

    return join


def _split_zone(value: Any) -> tuple[str]:
    if value.key is None:
        raise NotPlain  # read from a file: it has no name to be found by
    return (value.key,)


def _ratio(value: Any) -> tuple[int, int]:
    return value.numerator, value.denominator


def _split_ratio(value: Any) -> tuple[int, int]:
    if max(abs(value.numerator), value.denominator) > _LARGEST_NUMBER:
        raise NotPlain
    return _ratio(value)


def _join_ratio(parts: Sequence[Any]) -> Any:
    from fractions import Fraction

    numerator, denominator = _check(parts, int, int)
    if max(abs(numerator), abs(denominator)) > _LARGEST_NUMBER:
        raise ValueError("too large")
    return Fraction(numerator, denominator)


def _decimal_key(value: Any) -> KeyParts:
    sign, digits, exponent = value.as_tuple()
    return "decimal", (sign, "".join(map(str, digits)), exponent)


def _join_id(parts: Sequence[Any]) -> Any:
    from uuid import UUID

    return UUID(bytes=_check(parts, bytes)[0])


def _path_key(name: str) -> Callable[[Any], KeyParts]:
    return lambda v: ("path", (name, v.as_posix()))


def _add_address(number: int, version: int) -> None:
    plain: dict[str, Callable[[Any], KeyParts]] = {
        # As numbers: the text form of mapped IPv6 addresses changed in Python 3.13.
        "Address": (lambda v: ("ip", (4, int(v))))
        if version == 4
        else (lambda v: ("ip", (6, int(v), v.scope_id))),
        "Network": lambda v: ("ip", (type(v).__name__, v.network_address, v.prefixlen)),
        "Interface": lambda v: ("ip", (type(v).__name__, v.ip, v.network.prefixlen)),
    }
    for offset, (form, key) in enumerate(plain.items()):
        name = f"ipaddress.IPv{version}{form}"
        add(PlainType(name=name, number=number + offset, split=_text, join=_calls(name, str), key=key))  # fmt: skip


def _secret_value(value: Any) -> KeyParts:
    return "secret", value.get_secret_value()


def _url(value: Any) -> KeyParts:
    return "url", str(value)


# --- classes of the program -------------------------------------------------------------------------------------------


def class_name(kind: type) -> str:
    """Return "module:qualname"; a script is `__main__` in its workers, too."""
    module = "__main__" if kind.__module__ == "__mp_main__" else kind.__module__
    return f"{module}:{kind.__qualname__}"


def find_class(name: object) -> type:
    """Return a class by its name "module:qualname", among the modules that are loaded.

    Raises:
        Undecodable: It is not there; the message says so.
    """
    if type(name) is not str or len(name) > _LONGEST_TEXT:
        raise Undecodable("it names no class")
    module, _, qualname = name.partition(":")
    spaces = [module, "__mp_main__"] if module == "__main__" else [module]
    for space in spaces:
        # Not by getattr: a module may import what it is asked for.
        found: Any = sys.modules.get(space)
        for part in qualname.split("."):
            found = vars(found).get(part) if hasattr(found, "__dict__") else None
        if isinstance(found, type):
            return found
    if module not in sys.modules:
        raise Undecodable(f"it needs the module {module}, which is not loaded")
    raise Undecodable(f"its class {qualname} is not in {module} any more")


def _is_findable(kind: type) -> bool:
    try:
        return find_class(class_name(kind)) is kind
    except Undecodable:
        return False


@lru_cache(maxsize=1000)
def _of_class(kind: type) -> PlainType | None:
    """Return the row of a class of the program: an enum, a dataclass, a model."""
    if "<" in kind.__qualname__ or kind.__module__ == "builtins":
        return None
    if issubclass(kind, enum.Enum):
        return ENUM
    if kind.__base__ is tuple and hasattr(kind, "_fields"):
        return NAMED_TUPLE
    names = _field_names(kind)
    if names is None or not _holds_only_fields(kind):
        return None
    return MODEL if hasattr(kind, "__pydantic_validator__") and _is_model(kind) else RECORD


def _is_model(kind: type) -> bool:
    return any(base.__module__ == "pydantic.main" for base in kind.__mro__)


def _field_names(kind: Any) -> Mapping[str, Any] | None:
    """Return the declared fields of a class: name and field."""
    if _is_model(kind):
        names: Mapping[str, Any] | None = getattr(kind, "__pydantic_fields__", None)
        return vars(kind).get("model_fields") if names is None else names
    if "__dataclass_fields__" in vars(kind):
        return {field.name: field for field in dataclasses.fields(kind)}
    if "__attrs_attrs__" in vars(kind):
        return {field.name: field for field in kind.__attrs_attrs__}
    return None


_OWN_WAYS: Final = (
    "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__",
    "__copy__", "__deepcopy__", "__del__",
)  # fmt: skip


def _holds_only_fields(kind: type) -> bool:
    """Whether instances are what their fields say, with no own way to be pickled, copied or ended."""
    for base in kind.__mro__[:-1]:
        if not base.__flags__ & _HEAP_TYPE:
            return False
        if base.__module__.partition(".")[0] in ("pydantic", "typing", "abc", "attr", "attrs"):
            continue
        for name in _OWN_WAYS:
            method = vars(base).get(name)
            generated = getattr(method, "__module__", None) in ("dataclasses", "attr._make")
            if method is not None and not generated:
                return False
    return True


_HEAP_TYPE: Final = 1 << 9


def _slots(kind: type) -> dict[str, Any]:
    return {
        name: member
        for base in kind.__mro__
        for name, member in vars(base).items()
        if type(member) is MemberDescriptorType
    }


def _own_dict(value: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return found


def _split_record(value: Any) -> tuple[str, dict[str, Any]]:
    kind = type(value)
    names = _field_names(kind) or {}
    held = _own_dict(value)
    if not held.keys() <= names.keys():
        raise NotPlain  # it carries more than its fields
    slots = _slots(kind)
    fields = {}
    for name in names:
        if name in held:
            fields[name] = held[name]
        elif name in slots:
            fields[name] = slots[name].__get__(value)
        else:
            raise NotPlain
    return class_name(kind), fields


def _join_record(parts: Sequence[Any]) -> Any:
    name, given = _check(parts, str, dict)
    kind = find_class(name)
    if _of_class(kind) is not RECORD:
        raise Undecodable(f"{name} is no dataclass any more")
    made: Any = object.__new__(kind)
    slots, held = _slots(kind), _own_dict(made)
    for field, value in _completed(kind, given).items():
        if field in slots:
            slots[field].__set__(made, value)
        else:
            held[field] = value
    return made


def _completed(kind: type, given: dict[Any, Any]) -> dict[str, Any]:
    """Return the values of all fields; those that are newer than the entry have their defaults."""
    names = _field_names(kind) or {}
    if not given.keys() <= names.keys():
        raise Undecodable(f"{kind.__qualname__} has other fields now")
    return {name: given[name] if name in given else _default(kind, field) for name, field in names.items()}  # fmt: skip


def _default(kind: type, field: Any) -> Any:
    if hasattr(field, "get_default"):  # of pydantic
        if not field.is_required():
            return field.get_default(call_default_factory=True)
    elif isinstance(field, dataclasses.Field):
        if field.default is not dataclasses.MISSING:
            return field.default
        if field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
    elif not isinstance(field.default, type) and hasattr(field.default, "factory"):  # of attrs
        if not field.default.takes_self:
            return field.default.factory()
    elif type(field.default).__qualname__ != "_Nothing":
        return field.default
    raise Undecodable(
        f"{kind.__qualname__} has a new field {getattr(field, 'name', '')} without a default"
    )


_MODEL_PARTS: Final = ("__pydantic_extra__", "__pydantic_private__", "__pydantic_fields_set__")


def _split_model(value: Any) -> tuple[Any, ...]:
    kind = type(value)
    names = _field_names(kind) or {}
    held = _own_dict(value)
    if not held.keys() <= names.keys():
        raise NotPlain
    extra, private, given = (getattr(value, name, None) for name in _MODEL_PARTS)
    if private is not None:
        private = {
            name: item
            for name, item in private.items()
            if type(item).__name__ != "PydanticUndefinedType"
        }
    return class_name(kind), dict(held), extra, private, set(given or ())


def _join_model(parts: Sequence[Any]) -> Any:
    name, given, extra, private, chosen = _check(
        parts, str, dict, (dict, type(None)), (dict, type(None)), set
    )
    kind: Any = find_class(name)
    if _of_class(kind) is not MODEL:
        raise Undecodable(f"{name} is no model any more")
    made = object.__new__(kind)
    object.__setattr__(made, "__dict__", _completed(kind, given))
    for field, value in zip(_MODEL_PARTS, (extra, private, chosen), strict=True):
        object.__setattr__(made, field, value)
    return made


def _split_enum(value: Any) -> tuple[str, str | None, Any]:
    kind = type(value)
    if kind.__members__.get(value.name) is value:
        return class_name(kind), value.name, None
    return class_name(kind), None, value.value  # combined flags have no name


def _join_enum(parts: Sequence[Any]) -> Any:
    name, member, value = parts
    kind = find_class(name)
    if not issubclass(kind, enum.Enum):
        raise Undecodable(f"{name} is no enum any more")
    if member is not None:
        return kind.__members__[member]
    if not issubclass(kind, enum.Flag) or type(value) is not int:
        raise Undecodable(f"{name} has no such member")
    return kind(value)


def _join_named_tuple(parts: Sequence[Any]) -> Any:
    name, items = _check(parts, str, list)
    kind: Any = find_class(name)
    if _of_class(kind) is not NAMED_TUPLE or len(items) != len(kind._fields):
        raise Undecodable(f"{name} has other fields now")
    return tuple.__new__(kind, items)


ENUM: Final = PlainType(name="an enum", number=60, split=_split_enum, join=_join_enum)
RECORD: Final = PlainType(
    name="a dataclass", number=61, immutable=False, split=_split_record, join=_join_record
)
NAMED_TUPLE: Final = PlainType(
    name="a named tuple",
    number=62,
    immutable=False,
    split=lambda v: (class_name(type(v)), list(v)),
    join=_join_named_tuple,
)
MODEL: Final = PlainType(
    name="a model", number=63, immutable=False, split=_split_model, join=_join_model
)
"""A model of pydantic, taken apart by its fields; nothing of it runs."""


# --- the table --------------------------------------------------------------------------------------------------------

_COLLECTIONS: Final[list[tuple[str, int | None, Any, Any, Any]]] = [
    (
        "collections.deque", 11, lambda v: (list(v), v.maxlen),
        _calls("collections.deque", list, (int, type(None))),
        lambda v: ("deque", list(deque.__iter__(v)), {"maxlen": v.maxlen}),
    ),
    (
        "collections.OrderedDict", 12, lambda v: (dict(v),), _calls("collections.OrderedDict", dict),
        lambda v: ("ordereddict", dict(dict.items(v)), {"order": list(OrderedDict.__iter__(v))}),
    ),
    (
        "collections.Counter", 13, lambda v: (dict(v),), _calls("collections.Counter", dict),
        lambda v: ("counter", dict(dict.items(v))),
    ),
    (
        "collections.defaultdict", None, None, None,
        lambda v: ("defaultdict", dict(dict.items(v)), {"default_factory": v.default_factory}),
    ),
    ("array.array", None, None, None, lambda v: ("array", (v.typecode, v.tolist()))),
    ("types.SimpleNamespace", None, None, None, lambda v: ("namespace", None, dict(vars(v)))),
    ("mappingproxy", None, None, None, lambda v: ("mappingproxy", v.copy())),
    ("memoryview", None, None, None, lambda v: ("memoryview", (v.format, v.shape, v.tobytes()))),
]  # fmt: skip

_VALUES: Final[list[tuple[str, int | None, Any, Any, Any]]] = [
    (
        "datetime.datetime", 20, lambda v: (*_day(v), *_clock(v), v.tzinfo), _join_moment("datetime", 7),
        lambda v: _zoned("datetime", _day(v) + _clock(v), v),
    ),
    (
        "datetime.time", 21, lambda v: (*_clock(v), v.tzinfo), _join_moment("time", 4),
        lambda v: _zoned("time", _clock(v), v),
    ),
    ("datetime.date", 22, _day, _calls("datetime.date", int, int, int), lambda v: ("date", _day(v))),
    (
        "datetime.timedelta", 23, lambda v: (v.days, v.seconds, v.microseconds),
        _calls("datetime.timedelta", int, int, int),
        lambda v: ("timedelta", (v.days, v.seconds, v.microseconds)),
    ),
    (
        "zoneinfo.ZoneInfo", 25, _split_zone, _calls("zoneinfo.ZoneInfo", str),
        lambda v: None if v.key is None else ("zoneinfo", v.key),
    ),
    ("decimal.Decimal", 30, _text, _calls("decimal.Decimal", str), _decimal_key),
    ("fractions.Fraction", 31, _split_ratio, _join_ratio, lambda v: ("fraction", _ratio(v))),
    ("uuid.UUID", 32, lambda v: (v.bytes,), _join_id, lambda v: ("uuid", v.int)),
    ("re.Pattern", None, None, None, lambda v: ("pattern", (v.pattern, v.flags))),
    *((f"pydantic_core._pydantic_core.{name}", None, None, None, _url) for name in ("Url", "MultiHostUrl")),
    *((f"pydantic.networks.{name}", None, None, None, _url) for name in ("_BaseUrl", "_BaseMultiHostUrl")),
]  # fmt: skip


def _fill() -> None:
    for immutable, rows in ((False, _COLLECTIONS), (True, _VALUES)):
        for name, number, split, join, key in rows:
            add(PlainType(name=name, number=number, immutable=immutable, split=split, join=join, key=key))  # fmt: skip
    for row in (ENUM, RECORD, NAMED_TUPLE, MODEL):
        add(row)
    _add_address(33, 4)
    _add_address(36, 6)
    for number, name in (
        (40, "PurePosixPath"), (41, "PureWindowsPath"), (42, "PosixPath"), (43, "WindowsPath"),
        (None, "PurePath"), (None, "Path"),
    ):  # fmt: skip
        full = f"pathlib.{name}"
        path = PlainType(name=full, key=_path_key(name))
        if number is not None:
            join = _calls(full, str)
            path = path._replace(number=number, split=_text, join=join)
        # Python 3.13 moved the classes, and their public name stayed.
        add(path, f"pathlib._local.{name}")
    add(PlainType(name="pydantic.types._SecretBase", immutable=False, key=_secret_value))

    def join_timezone(parts: Sequence[Any]) -> Any:
        import datetime

        kinds: list[type] = [datetime.timedelta, str]
        return datetime.timezone(*_check(parts, *kinds[: max(1, len(parts))]))

    add(
        PlainType(
            name="datetime.timezone",
            number=24,
            split=lambda v: v.__getinitargs__(),
            join=join_timezone,
            key=lambda v: ("timezone", (v.utcoffset(None), v.tzname(None))),
        )
    )


_fill()
