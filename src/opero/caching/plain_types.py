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

import enum
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from types import EllipsisType, MemberDescriptorType, NoneType, NotImplementedType
from typing import Any, Final

from opero.utils.lazy import NamedTuple

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
        known = getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind
    else:
        row = _of_class(kind)
        known = row is not None and _is_findable(kind)  # it may have been defined anew meanwhile
    return row if known else None


# --- checks -----------------------------------------------------------------------------------------------------------

_LONGEST_TEXT: Final = 100_000
_LARGEST_NUMBER: Final = 1 << 100_000
"""Beyond that, arithmetic on forged numbers would take longer than reading them."""


def _check(parts: Sequence[Any], *kinds: type | tuple[type, ...]) -> Sequence[Any]:
    """Return parts if they are of exactly these types, and no larger than any that is written."""
    if len(parts) != len(kinds):
        raise ValueError("another number of parts")
    for part, kind in zip(parts, kinds, strict=True):
        if type(part) not in (kind if type(kind) is tuple else (kind,)):
            raise TypeError("a part of another type")
        if type(part) is str and len(part) > _LONGEST_TEXT:
            raise ValueError("text of no such value")
        if type(part) is int and not -_LARGEST_NUMBER <= part <= _LARGEST_NUMBER:
            raise ValueError("too large")
    return parts


def _calls(name: str, *kinds: type | tuple[type, ...]) -> Callable[[Sequence[Any]], Any]:
    """Return what makes a value by calling a type of the standard library with checked parts."""
    module, _, attribute = name.rpartition(".")
    return lambda parts: getattr(import_module(module), attribute)(*_check(parts, *kinds))


def _calls_loaded(name: str, kind: type) -> Callable[[Sequence[Any]], Any]:
    """Return the same for a class of a library, "module:qualname", which a stored entry is no reason to load."""
    return lambda parts: find_class(name)(*_check(parts, kind))


def _text(value: object) -> tuple[str]:
    text = str(value)
    if len(text) > _LONGEST_TEXT:
        raise NotPlain
    return (text,)


MOST_ALIKE: Final = 50
"""Different values of a set, or keys of a dict, that may have one hash."""

_SPREAD: Final = frozenset({str, bytes, bool, float, NoneType})
"""Types of whose values never many have one hash."""
_WORD: Final = 1 << 64
"""Of smaller integers neither."""


def refuse_alike(values: Collection[Any]) -> None:
    """Raise if too many values have one hash: a set of forged ones would take for ever."""
    if len(values) <= MOST_ALIKE:
        return
    kinds = set(map(type, values))
    if kinds <= _SPREAD or (kinds == {int} and max(values) < _WORD and min(values) > -_WORD):
        return
    first: dict[int, Any] = {}
    alike: dict[int, int] = {}
    for value in values:
        code = hash(value)
        known = first.setdefault(code, value)
        if known is not value and known != value:
            alike[code] = alike.get(code, 0) + 1
            if alike[code] > MOST_ALIKE:
                raise ValueError("too many values of one hash")


def _set_of(kind: type) -> Callable[[Sequence[Any]], Any]:
    """Return what makes a set of checked parts."""

    def join(parts: Sequence[Any]) -> Any:
        refuse_alike(parts)
        return kind(parts)

    return join


# --- values of the standard library -----------------------------------------------------------------------------------


def _span(value: Any) -> tuple[Any, Any, Any]:
    return value.start, value.stop, value.step


def _zoned(tag: str, fields: tuple[int, ...], value: Any) -> KeyParts:
    zone = value.tzinfo
    if zone is None:
        return tag, fields
    # Wall time and offset give the instant; the zone's name distinguishes zones of one offset.
    label = getattr(zone, "key", None) or getattr(zone, "zone", None)
    return (
        tag,
        fields,
        {
            "offset": value.utcoffset(),
            "name": value.tzname(),
            "zone": label if type(label) is str else None,
            "class": f"{type(zone).__module__}.{type(zone).__qualname__}",
            **{name: item for name, item in own_dict(zone).items() if type(item) in _DISTINCTIVE},
        },
    )


_DISTINCTIVE: Final = frozenset({int, str, float, bool})
"""Types of attributes by which two time zones of a class of the program differ."""


def _day(value: Any) -> tuple[int, int, int]:
    return value.year, value.month, value.day


def _clock(value: Any) -> tuple[int, ...]:
    return value.hour, value.minute, value.second, value.microsecond, value.fold


def _duration(value: Any) -> tuple[int, int, int]:
    return value.days, value.seconds, value.microseconds


def _join_moment(name: str, numbers: int) -> Callable[[Sequence[Any]], Any]:
    def join(parts: Sequence[Any]) -> Any:
        import datetime

        *fields, fold, zone = parts
        _check([*fields, fold], *[int] * (numbers + 1))
        if zone is not None and not isinstance(zone, datetime.tzinfo):
            raise TypeError("no time zone")
        return getattr(datetime, name)(*fields, tzinfo=zone, fold=fold)

    return join


def _join_timezone(parts: Sequence[Any]) -> Any:
    import datetime

    kinds: list[type] = [datetime.timedelta, str]
    return datetime.timezone(*_check(parts, *kinds[: max(1, len(parts))]))


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


def _decimal_key(value: Any) -> KeyParts:
    sign, digits, exponent = value.as_tuple()
    return "decimal", (sign, "".join(map(str, digits)), exponent)


def _join_id(parts: Sequence[Any]) -> Any:
    return import_module("uuid").UUID(bytes=_check(parts, bytes)[0])


def _path_key(name: str) -> Callable[[Any], KeyParts]:
    return lambda v: ("path", (name, v.as_posix()))


def _address_key(value: Any) -> KeyParts:
    # As numbers: the text form of mapped IPv6 addresses changed in Python 3.13.
    scope = (value.scope_id,) if value.version == 6 else ()
    return "ip", (value.version, int(value), *scope)


def _url(value: Any) -> KeyParts:
    return "url", str(value)


def _split_url(value: Any) -> tuple[str]:
    # What the text alone does not give back was parsed with settings of its own.
    if type(value)(str(value)) != value:
        raise NotPlain
    return _text(value)


# --- classes of the program -------------------------------------------------------------------------------------------


def class_name(kind: type) -> str:
    """Return "module:qualname"."""
    return f"{module_name(kind.__module__)}:{kind.__qualname__}"


def module_name(name: str) -> str:
    """Return the name of a module; a spawned worker imports the script under another one."""
    return "__main__" if name == "__mp_main__" else name


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
    with suppress(Undecodable):
        return find_class(class_name(kind)) is kind
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
    names = field_names(kind)
    if names is None or not _holds_only_fields(kind):
        return None
    return MODEL if hasattr(kind, "__pydantic_validator__") and _is_model(kind) else RECORD


def _is_model(kind: type) -> bool:
    return any(base.__module__ == "pydantic.main" for base in kind.__mro__)


def field_names(kind: Any) -> Mapping[str, Any] | None:
    """Return the declared fields of a class: name and field."""
    if _is_model(kind):
        names: Mapping[str, Any] | None = getattr(kind, "__pydantic_fields__", None)
        return vars(kind).get("model_fields") if names is None else names
    if "__dataclass_fields__" in vars(kind):
        import dataclasses

        return {field.name: field for field in dataclasses.fields(kind)}
    if "__attrs_attrs__" in vars(kind):
        return {field.name: field for field in kind.__attrs_attrs__}
    return None


_OWN_WAYS: Final = {
    "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__",
    "__copy__", "__deepcopy__", "__del__",
}  # fmt: skip


def _holds_only_fields(kind: type) -> bool:
    """Whether instances are what their fields say, with no own way to be pickled, copied or ended."""
    bases = kind.__mro__[:-1]
    own = (
        method
        for base in bases
        if base.__module__.partition(".")[0] not in ("pydantic", "typing", "abc", "attr", "attrs")
        for name, method in vars(base).items()
        if name in _OWN_WAYS and method is not None
    )
    return all(base.__flags__ & _HEAP_TYPE for base in bases) and all(
        getattr(method, "__module__", None) in ("dataclasses", "attr._make") for method in own
    )


_HEAP_TYPE: Final = 1 << 9


def slots_of(classes: Iterable[type]) -> dict[str, Any]:
    """Return the descriptors of slots by name."""
    return {
        name: member
        for base in classes
        for name, member in vars(base).items()
        if type(member) is MemberDescriptorType
    }


def own_dict(value: Any) -> dict[str, Any]:
    """Return the dict of an instance itself, whatever its class says; empty without one."""
    try:
        found: dict[str, Any] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return found


def state_of(value: Any, classes: Iterable[type]) -> dict[str, Any]:
    """Return what an instance keeps in the slots of these classes, and in its dict."""
    state: dict[str, Any] = {}
    for name, member in slots_of(classes).items():
        try:
            state[name] = member.__get__(value)
        except AttributeError:  # a slot may be empty
            continue
    return state | own_dict(value)


_MODEL_PARTS: Final = ("__pydantic_extra__", "__pydantic_private__", "__pydantic_fields_set__")


def _split_fields(value: Any) -> tuple[Any, ...]:
    """Take an instance of a dataclass, attrs class or model apart: name of its class, fields, further parts."""
    kind = type(value)
    names = field_names(kind) or {}
    held = state_of(value, kind.__mro__)
    extra, private, given = (held.pop(name, None) for name in _MODEL_PARTS)
    if held.keys() != names.keys():
        raise NotPlain  # it carries more than its fields, or less
    fields = {name: held[name] for name in names}
    if not _is_model(kind):
        return class_name(kind), fields
    if private is not None:
        private = {
            name: item
            for name, item in private.items()
            if type(item).__name__ != "PydanticUndefinedType"
        }
    return class_name(kind), fields, extra, private, set(given or ())


def _join_fields(parts: Sequence[Any]) -> Any:
    """Make an instance without running its code."""
    name, given = _check(parts[:2], str, dict)
    further = parts[2:] and _check(parts[2:], (dict, NoneType), (dict, NoneType), set)
    kind = find_class(name)
    if _of_class(kind) is not (MODEL if further else RECORD):
        raise Undecodable(f"{name} is no dataclass or model any more")
    made = make_instance(kind, given, field_names(kind) or {})
    slots = slots_of(kind.__mro__) if further else {}
    for part, value in zip(_MODEL_PARTS, further, strict=False):
        slots[part].__set__(made, value)
    return made


def make_instance(kind: type, given: dict[Any, Any], fields: Mapping[str, Any]) -> Any:
    """Make an instance without running its code; fields that are newer than what was stored have their defaults.

    Args:
        kind: Its class.
        given: The stored values by field.
        fields: The fields that the class has now.

    Raises:
        Undecodable: The class has other fields now; the message names one.
    """
    if unknown := given.keys() - fields.keys():
        raise Undecodable(f"{kind.__qualname__} has no field {min(unknown)!r} any more")
    made: Any = object.__new__(kind)
    slots, held = slots_of(kind.__mro__), own_dict(made)
    for name, field in fields.items():
        if name not in given and getattr(field, "init", True) is False:
            continue  # it had not been set
        value = given[name] if name in given else _default(kind, name, field)
        if name in slots:
            slots[name].__set__(made, value)
        else:
            held[name] = value
    return made


def _default(kind: type, name: str, field: Any) -> Any:
    import dataclasses

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
    raise Undecodable(f"{kind.__qualname__} has a new field {name!r} without a default")


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


ENUM: Final = PlainType("an enum", 60, True, _split_enum, _join_enum)
RECORD: Final = PlainType("a dataclass", 61, False, _split_fields, _join_fields)
NAMED_TUPLE: Final = PlainType(
    "a named tuple", 62, False, lambda v: (class_name(type(v)), list(v)), _join_named_tuple
)
MODEL: Final = PlainType("a model", 63, False, _split_fields, _join_fields)
"""A model of pydantic, taken apart by its fields; nothing of it runs."""


# --- the table --------------------------------------------------------------------------------------------------------

# Tuples and frozen sets are immutable as far as their items are.
_BUILTINS: Final[dict[type, PlainType]] = {
    tuple: PlainType("tuple", 1, False, iter, tuple),
    set: PlainType("set", 2, False, iter, _set_of(set)),
    frozenset: PlainType("frozenset", 3, False, iter, _set_of(frozenset)),
    complex: PlainType(
        "complex", 5, True, lambda v: (v.real, v.imag), _calls("builtins.complex", float, float)
    ),
    bytearray: PlainType(
        "bytearray", 6, False, lambda v: (bytes(v),), _calls("builtins.bytearray", bytes),
        lambda v: ("bytearray", bytes(v)),
    ),
    range: PlainType(
        "range", 7, True, _span, _calls("builtins.range", int, int, int), lambda v: ("range", _span(v))
    ),
    slice: PlainType(
        "slice", 8, False, _span, lambda p: slice(*_check(p, *map(type, p[:3]))), lambda v: ("slice", _span(v))
    ),
    EllipsisType: PlainType("ellipsis", 9, True, lambda v: (), lambda p: [..., *_check(p)][0]),
    NotImplementedType: PlainType(
        "NotImplementedType", 10, True, lambda v: (), lambda p: [NotImplemented, *_check(p)][0]
    ),
}  # fmt: skip

_ROWS: Final[list[PlainType]] = [
    ENUM, RECORD, NAMED_TUPLE, MODEL,
    PlainType(
        "collections.deque", 11, False, lambda v: (list(v), v.maxlen),
        _calls("collections.deque", list, (int, NoneType)),
        lambda v: ("deque", list(deque.__iter__(v)), {"maxlen": v.maxlen}),
    ),
    PlainType(
        "collections.OrderedDict", 12, False, lambda v: (dict(v),), _calls("collections.OrderedDict", dict),
        lambda v: ("ordereddict", dict(dict.items(v)), {"order": list(OrderedDict.__iter__(v))}),
    ),
    PlainType(
        "collections.Counter", 13, False, lambda v: (dict(v),), _calls("collections.Counter", dict),
        lambda v: ("counter", dict(dict.items(v))),
    ),
    PlainType(
        "collections.defaultdict", immutable=False,
        key=lambda v: ("defaultdict", dict(dict.items(v)), {"default_factory": v.default_factory}),
    ),
    PlainType("array.array", immutable=False, key=lambda v: ("array", (v.typecode, v.tolist()))),
    PlainType("types.SimpleNamespace", immutable=False, key=lambda v: ("namespace", None, dict(vars(v)))),
    PlainType("mappingproxy", immutable=False, key=lambda v: ("mappingproxy", v.copy())),
    PlainType("memoryview", immutable=False, key=lambda v: ("memoryview", (v.format, v.shape, v.tobytes()))),
    PlainType(
        "datetime.datetime", 20, True, lambda v: (*_day(v), *_clock(v), v.tzinfo), _join_moment("datetime", 7),
        lambda v: _zoned("datetime", _day(v) + _clock(v), v),
    ),
    PlainType(
        "datetime.time", 21, True, lambda v: (*_clock(v), v.tzinfo), _join_moment("time", 4),
        lambda v: _zoned("time", _clock(v), v),
    ),
    PlainType("datetime.date", 22, True, _day, _calls("datetime.date", int, int, int), lambda v: ("date", _day(v))),
    PlainType(
        "datetime.timedelta", 23, True, _duration, _calls("datetime.timedelta", int, int, int),
        lambda v: ("timedelta", _duration(v)),
    ),
    PlainType(
        "datetime.timezone", 24, True, lambda v: v.__getinitargs__(), _join_timezone,
        lambda v: ("timezone", (v.utcoffset(None), v.tzname(None))),
    ),
    PlainType(
        "zoneinfo.ZoneInfo", 25, True, _split_zone, _calls("zoneinfo.ZoneInfo", str),
        lambda v: None if v.key is None else ("zoneinfo", v.key),
    ),
    PlainType("decimal.Decimal", 30, True, _text, _calls("decimal.Decimal", str), _decimal_key),
    PlainType(
        "fractions.Fraction", 31, True, _split_ratio, _calls("fractions.Fraction", int, int),
        lambda v: ("fraction", _ratio(v)),
    ),
    PlainType("uuid.UUID", 32, True, lambda v: (v.bytes,), _join_id, lambda v: ("uuid", v.int)),
    *(
        PlainType(name, number + 3 * (version == 6), True, _text, _calls(name, str), key)
        for version in (4, 6)
        for number, form, key in (
            (33, "Address", _address_key),
            (34, "Network", lambda v: ("ip", (type(v).__name__, v.network_address, v.prefixlen))),
            (35, "Interface", lambda v: ("ip", (type(v).__name__, v.ip, v.network.prefixlen))),
        )
        for name in (f"ipaddress.IPv{version}{form}",)
    ),
    *(
        PlainType(f"pathlib.{name}", number, True, _text, _calls(f"pathlib.{name}", str), _path_key(name))
        for number, name in enumerate(("PurePosixPath", "PureWindowsPath", "PosixPath", "WindowsPath"), 40)
    ),
    *(PlainType(f"pathlib.{name}", key=_path_key(name)) for name in ("PurePath", "Path")),
    PlainType("re.Pattern", key=lambda v: ("pattern", (v.pattern, v.flags))),
    *(
        # Keys of those in `networks` come from the base below.
        PlainType(f"pydantic{module}.{name}", number, True, split, _calls_loaded(f"pydantic{module}:{name}", kind), key)
        for module, name, number, split, kind, key in (
            ("_core._pydantic_core", "TzInfo", 26, lambda v: (int(v.utcoffset(None).total_seconds()),), int, None),
            ("_core._pydantic_core", "Url", 70, _split_url, str, _url),
            (".networks", "AnyUrl", 71, _split_url, str, None),
            (".networks", "AnyHttpUrl", 72, _split_url, str, None),
            (".networks", "HttpUrl", 73, _split_url, str, None),
        )
    ),
    PlainType("pydantic_core._pydantic_core.MultiHostUrl", key=_url),
    *(PlainType(f"pydantic.networks.{name}", key=_url) for name in ("_BaseUrl", "_BaseMultiHostUrl")),
    PlainType("pydantic.types._SecretBase", None, False, key=lambda v: ("secret", v.get_secret_value())),
]  # fmt: skip

for _row in _BUILTINS.values():
    BY_NUMBER[_row.number or 0] = _row
    if _row.key is not None:
        BY_NAME[_row.name] = _row
for _row in _ROWS:
    # Python 3.13 moved the paths, and their public name stayed.
    add(_row, _row.name.replace("pathlib.", "pathlib._local."))
