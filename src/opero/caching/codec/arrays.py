# this_file: src/opero/caching/codec/arrays.py
"""How numpy values travel: the text of their dtype, their shape and their bytes, never a pickle.

numpy is imported only to put an array together. Arrays of objects or records, of extended
precision, or of a subclass are not plain.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from opero.caching.codec.signals import Buffer

__all__ = ["ARRAY", "SCALAR", "TEXT", "join_array", "join_scalar", "join_text", "split"]

ARRAY: Final = 50
SCALAR: Final = 51
TEXT: Final = 52
"""Numbers of the forms of arrays, of numpy's numbers and times, and of its own text and bytes."""

_DTYPE: Final = re.compile(r"[<>|][biufcmMSU]\d+(\[\d*(generic|[YMWDhmsunpfa]s?)\])?")


def split(value: Any) -> tuple[int, Sequence[Any], Buffer | None] | None:
    """Take a numpy value apart.

    Returns:
        The number of its form, its plain parts, and its bytes where they may be many; None if it is
        no numpy value, or not a plain one.
    """
    kind = type(value)
    if kind.__module__ != "numpy":
        return None
    np: Any = sys.modules["numpy"]
    if kind is np.ndarray:
        dtype = value.dtype
        if not _plain(dtype):
            return None
        # Arrays that lie in memory column by column stay so.
        columns = value.flags.f_contiguous and not value.flags.c_contiguous
        flat = value.ravel(order="F" if columns else "C")
        return ARRAY, (dtype.str, value.shape, columns), _bytes_of(np, flat)
    if kind is np.str_ or kind is np.bytes_:
        return TEXT, (str(value) if kind is np.str_ else bytes(value),), None
    if issubclass(kind, np.generic) and _plain(value.dtype):
        # One of several types of the same size (`longlong`) would come back as another.
        dtype = value.dtype.newbyteorder("=")
        if np.dtype(dtype.str).type is kind:
            return SCALAR, (dtype.str, value.tobytes()), None
    return None


def _plain(dtype: Any) -> bool:
    return (
        dtype.kind in "biufcmMSU"
        and dtype.char not in "gG"
        and dtype.metadata is None
        and dtype.itemsize > 0
        and _DTYPE.fullmatch(dtype.str) is not None
    )


def _bytes_of(np: Any, flat: Any) -> Buffer:
    # Dates have no buffer of their own, and an empty array none that can be cast.
    return memoryview(flat.view(np.uint8)) if flat.nbytes else b""


def _dtype(np: Any, text: Any) -> Any:
    # numpy reads much more than what it writes for plain types.
    if _DTYPE.fullmatch(text) is None:
        raise ValueError(text)
    return np.dtype(text)


def join_array(parts: list[Any]) -> Any:
    """Put an array together that owns its memory and can be written to."""
    import numpy as np

    text, shape, columns, data = parts
    dtype = _dtype(np, text)
    made = np.empty(shape, dtype, order="F" if columns else "C")
    if made.nbytes != len(data):
        raise ValueError("an array of another size")
    if data:
        flat = made.reshape(-1, order="F" if columns else "C").view(np.uint8)
        flat[:] = np.frombuffer(data, np.uint8)
    return made


def join_scalar(parts: list[Any]) -> Any:
    """Put one of numpy's numbers or times together."""
    import numpy as np

    text, data = parts
    (made,) = np.frombuffer(data, _dtype(np, text))
    return made


def join_text(parts: list[Any]) -> Any:
    """Put numpy's text or bytes together."""
    import numpy as np

    (content,) = parts
    return np.str_(content) if type(content) is str else np.bytes_(content)
