# this_file: src/opero/caching/keys/content.py
"""What an object's content is: every keyable value that is no plain builtin, described by
simpler ones, or by its name.

No library is imported for this: types are recognised by the name of their module, fields by the
markers that dataclasses, attrs and pydantic leave on their classes. Tags are our own where the
library moves its classes about (`pathlib` did between Python 3.11 and 3.13). A name is believed
only when it leads to the very object.
"""

from __future__ import annotations

import contextlib
import enum
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from opero.caching.plain_types import (
    BY_NAME,
    class_name,
    field_names,
    module_name,
    own_dict,
    state_of,
)
from opero.utils.lazy import NamedTuple

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
            return Shape("method", f"{class_name(base)}.{name}", {"__self__": holder})
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


# --- describing values -----------------------------------------------------------------------------


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
        return Shape(class_name(kind), _within(kind, _member(value)))
    base, core = _core(value, kind)
    if base is kind and type(core) is Shape:
        return core
    declared = _declared(value, kind)
    if declared is None and core is None:
        return importable(value)
    state = _state(value, kind, base) if declared is None else declared
    return Shape(class_name(kind), _within(kind, core), state)


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
        shape = _array_shape(value, base)
        if shape is not None:
            return base, shape
    return object, None


def _state(value: Any, kind: type, base: type) -> dict[str, object]:
    """What a subclass adds to its base: the instance's dict and slots."""
    return state_of(value, kind.__mro__[: kind.__mro__.index(base)])


def _within(kind: type, core: object) -> object:
    """Add what the enclosing function gave to a class defined inside it.

    Two calls of a factory make two classes of one name; the immutable values that their methods close
    over, and their immutable class attributes, distinguish them. Lists and dicts do not: what grows with
    each call would be another class each time.
    """
    given: dict[str, object] = {}
    for owner in kind.__mro__:
        if "<locals>" in owner.__qualname__:
            for name, item in vars(owner).items():
                if not name.startswith("__") and not callable(item) and _is_constant(item):
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
            if _is_constant(held):
                yield name, held


def _is_constant(value: Any) -> bool:
    """Whether a value is immutable and has content: a number, a tuple of dates, a function that can be imported."""
    kind = type(value)
    if kind in _SCALARS:
        return True
    if kind in (tuple, frozenset):
        return all(map(_is_constant, value))
    if kind in (types.FunctionType, types.BuiltinFunctionType):
        with contextlib.suppress(Unkeyable):
            return importable(value) is not None
        return False
    row = BY_NAME.get(type_name(kind))
    return row is not None and row.immutable and row.key is not None


# --- classes that declare their content


def _declared(value: Any, kind: type) -> dict[str, object] | None:
    declaring = ((base, field_names(base)) for base in kind.__mro__)
    owner, fields = next(
        ((base, fields) for base, fields in declaring if fields is not None), (kind, None)
    )
    if fields is None:
        return None
    held, content = own_dict(value), dict[str, object]()
    for name, field in fields.items():
        # What takes no part in the equality of dataclasses and attrs classes does not count.
        if getattr(field, "compare", getattr(field, "eq", True)):
            with contextlib.suppress(AttributeError):  # it may not have been set
                content[name] = held[name] if name in held else getattr(value, name)
    if owner is not kind:
        # A subclass that declares none itself keeps what it adds outside the fields.
        content |= {name: item for name, item in held.items() if name not in fields}
    for extra in ("__pydantic_extra__", "__pydantic_private__"):
        # Both take part in pydantic's own equality.
        if added := getattr(value, extra, None):
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


# --- numpy and pandas ------------------------------------------------------------------------------


def _array_shape(value: Any, base: type) -> Shape | None:
    """Describe a value of a numpy or pandas type.

    Neither library is imported: such a value proves that its library is loaded. Arrays are taken in C order,
    whatever their strides; their bytes are hashed in place when they already lie that way.

    Args:
        value: The value.
        base: Its type, or one of its bases.

    Returns:
        Its shape, or None when the type is of neither library, or holds no data (a ufunc, say).

    Raises:
        Unkeyable: When its data has no stable bytes (`longdouble`, for its padding).

    Example:
        >>> import numpy as np
        >>> _array_shape(np.arange(2, dtype="i1"), np.ndarray).whole[:2]
        ('|i1', (2,))
    """
    library = base.__module__.partition(".")[0]
    describe_array = {"numpy": _numpy, "pandas": _pandas}.get(library)
    module = sys.modules.get(library)
    return describe_array(module, value, base) if describe_array and module else None


def _numpy(np: Any, value: Any, base: type) -> Shape | None:
    if issubclass(base, np.generic):
        return Shape("numpy.scalar", _array(np, np.asarray(value)))
    if issubclass(base, np.ndarray):
        plain = _array(np, np.asarray(value))
        if not issubclass(base, np.ma.MaskedArray):
            return Shape(f"numpy.{base.__name__}", plain)
        # The constant `np.ma.masked` refuses to say how it is filled.
        parts = {"fill_value": getattr(value, "fill_value", None)}
        return Shape("numpy.masked", plain, parts | {"mask": np.ma.getmaskarray(value)})
    if issubclass(base, np.dtype):
        return Shape("numpy.dtype", _dtype(value))
    return None


def _dtype(dtype: Any) -> object:
    if dtype.metadata:
        return (_bare_dtype(dtype), dict(dtype.metadata))
    return _bare_dtype(dtype)


def _bare_dtype(dtype: Any) -> object:
    if dtype.names is not None:
        fields = [dtype.fields[name] for name in dtype.names]
        parts = [(n, _dtype(f[0]), *f[2:]) for n, f in zip(dtype.names, fields, strict=True)]
        if dtype.itemsize == sum(field[0].itemsize for field in fields):
            return parts
        return parts, dtype.itemsize, [field[1] for field in fields]
    if dtype.subdtype is not None:
        item, shape = dtype.subdtype
        return (_dtype(item), shape)
    if dtype.kind in _PLAIN_KINDS:
        # With its byte order: a function can distinguish two arrays by their bytes.
        return dtype.str
    # A dtype from elsewhere (bfloat16) differs from raw bytes by its name only.
    return (dtype.str, dtype.name)


def _array(np: Any, array: Any) -> tuple[object, ...]:
    dtype = array.dtype
    return (_dtype(dtype), array.shape, _data(np, array))


def _data(np: Any, array: Any) -> object:
    dtype = array.dtype
    if dtype.names is not None:
        # Field by field: the gaps between aligned fields hold arbitrary bytes.
        return [_array(np, array[name]) for name in dtype.names]
    if dtype.kind in "OT":
        return array.ravel().tolist()
    if dtype.char in "gG" and dtype.itemsize > (8 if dtype.kind == "f" else 16):
        raise Unkeyable(type_name(dtype.type), "pads its items with arbitrary bytes")
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.nbytes == 0:
        return b""
    if dtype.kind in "fc":
        flat = _one_nan(np, flat)
    return memoryview(flat.view(np.uint8))


def _one_nan(np: Any, flat: Any) -> Any:
    reals = flat.view(flat.real.dtype)
    missing = np.isnan(reals)
    if missing.any():
        reals = reals.copy()
        reals[missing] = np.nan
    return reals


_PLAIN_KINDS: Final = "biufcmMSUO"


def _pandas(pd: Any, value: Any, base: type) -> Shape | None:
    if value is pd.NA or value is pd.NaT:
        return Shape("pandas.missing", "NA" if value is pd.NA else "NaT")
    if issubclass(base, pd.DataFrame):
        columns = [_column(pd, column.array) for _, column in value.items()]
        parts = {"columns": value.columns, "index": value.index, "attrs": value.attrs}
        return Shape("pandas.dataframe", columns, parts)
    if issubclass(base, pd.Series):
        parts = {"name": value.name, "index": value.index, "attrs": value.attrs}
        return Shape("pandas.series", _column(pd, value.array), parts)
    if issubclass(base, pd.Index):
        return _index(pd, value)
    if issubclass(base, pd.api.extensions.ExtensionArray):
        return Shape("pandas.array", _column(pd, value))
    return _pandas_scalar(pd, value, base)


def _index(pd: Any, index: Any) -> Shape:
    names = list(index.names)
    if isinstance(index, pd.RangeIndex):
        return Shape("pandas.rangeindex", (index.start, index.stop, index.step), {"names": names})
    if isinstance(index, pd.MultiIndex):
        # By values: levels may list entries that no row uses.
        levels = [_column(pd, index.get_level_values(n).array) for n in range(index.nlevels)]
        return Shape("pandas.multiindex", levels, {"names": names})
    parts = {"names": names, "freq": getattr(index, "freqstr", None)}
    return Shape("pandas.index", _column(pd, index.array), parts)


def _column(pd: Any, array: Any) -> object:
    dtype = array.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        return ("category", dtype.ordered, dtype.categories, array.codes)
    if isinstance(dtype, pd.DatetimeTZDtype):
        return (str(dtype), array.tz_convert(None).to_numpy())
    plain = getattr(pd.arrays, "NumpyExtensionArray", None)
    if type(array) is plain or not isinstance(dtype, pd.api.extensions.ExtensionDtype):
        return array.to_numpy()
    return (str(dtype), array.to_numpy(dtype=object).tolist())


def _pandas_scalar(pd: Any, value: Any, base: type) -> Shape | None:
    if issubclass(base, pd.Timestamp):
        zone = value.tz
        names = None if zone is None else (type_name(type(zone)), str(zone), value.tzname())
        parts = {"zone": names, "offset": value.utcoffset(), "fold": value.fold}
        return Shape("pandas.timestamp", value.asm8, parts)
    if issubclass(base, pd.Timedelta):
        return Shape("pandas.timedelta", value.asm8)
    if issubclass(base, pd.Period):
        return Shape("pandas.period", (value.ordinal, value.freqstr))
    if issubclass(base, pd.Interval):
        return Shape("pandas.interval", (value.left, value.right, value.closed))
    return None
