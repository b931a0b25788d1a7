# this_file: src/opero/caching/keys/arrays.py
"""Describe numpy and pandas values, for keys.

Neither library is imported: a value of theirs proves that its library is loaded. Arrays are taken
in C order, whatever their strides; their bytes are hashed in place when they already lie that way.
"""

from __future__ import annotations

import sys
from typing import Any, Final

from opero.caching.keys.content import Shape, Unkeyable, type_name

__all__ = ["describe_array"]


def describe_array(value: Any, base: type) -> Shape | None:
    """Describe a value of a numpy or pandas type.

    Args:
        value: The value.
        base: Its type, or the nearest base that belongs to one of the two libraries.

    Returns:
        Its shape, or None when the type holds no data (a ufunc, say).

    Raises:
        Unkeyable: When its data has no stable bytes (`longdouble`, for its padding).

    Example:
        >>> import numpy as np
        >>> describe_array(np.arange(2, dtype="i1"), np.ndarray).whole[:2]
        ('|i1', (2,))
    """
    library = base.__module__.partition(".")[0]
    module = sys.modules.get(library)
    if module is None:
        return None
    return _numpy(module, value, base) if library == "numpy" else _pandas(module, value, base)


# --- numpy


def _numpy(np: Any, value: Any, base: type) -> Shape | None:
    if issubclass(base, np.generic):
        return Shape("numpy.scalar", _array(np, np.asarray(value)))
    if issubclass(base, np.ndarray):
        plain = _array(np, np.asarray(value))
        if base.__name__ not in ("MaskedArray", "MaskedConstant"):
            return Shape(f"numpy.{base.__name__}", plain)
        mask = np.ma.getmaskarray(value)
        return Shape("numpy.masked", plain, {"mask": mask, "fill_value": value.fill_value})
    if issubclass(base, np.dtype):
        return Shape("numpy.dtype", _dtype(value))
    return None


def _dtype(dtype: Any) -> object:
    if dtype.names is not None:
        return [(name, _dtype(dtype.fields[name][0])) for name in dtype.names]
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


# --- pandas


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
    if not isinstance(dtype, pd.api.extensions.ExtensionDtype):
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
