# this_file: src/opero/caching/codec/plain.py
"""Plain data to bytes and back, in MessagePack; what reads it can execute nothing.

What MessagePack does not know is an array whose head is an empty extension, the mark of a form:

    (1, "a")  →  [mark 1, 1, "a"]

Exact types are kept: a subclass of a plain type is not plain. Large buffers stand behind the
message, so that they are copied once on their way in and once on their way out.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import NoneType
from typing import Any, Final

import msgpack

from opero.caching.codec import arrays
from opero.caching.codec.forms import BY_NUMBER, INTEGER, Form, form_of
from opero.caching.codec.signals import Buffer, NotPlain

__all__ = ["read", "write"]

_ATOMS: Final = frozenset({NoneType, bool, int, float, str})
"""What MessagePack writes as it is, whatever its size."""

_APART: Final = 0
"""Number of the form of a buffer that stands behind the message."""

_LARGE: Final = 1 << 14
_BUFFER_SIZE: Final = 1 << 12


def write(value: Any) -> tuple[bytes, list[Buffer]]:
    """Return the message for a value, and the buffers that stand behind it.

    Raises:
        NotPlain: It holds something else than plain data, itself, or too much of it.

    Example:
        >>> message, buffers = write({"id": 1, "place": (2.5, None)})
        >>> read(message, b"".join(buffers))
        {'id': 1, 'place': (2.5, None)}
    """
    writer = _Writer()
    try:
        writer.put(value)
        return writer.packer.bytes(), writer.buffers
    except NotPlain:
        raise
    except Exception as error:
        # A stack nearly full, buffers beyond 4 GB, a list that changes meanwhile.
        raise NotPlain from error


def read(message: Buffer, behind: Buffer) -> Any:
    """Return the value of a message.

    Args:
        message: The message.
        behind: The buffers, joined.

    Raises:
        Exception: Of whatever kind, if it is not what `write` makes.
    """
    reader = _Reader(memoryview(behind))
    value = msgpack.unpackb(
        message,
        ext_hook=reader.extension,
        list_hook=reader.array,
        strict_map_key=False,
        unicode_errors="surrogatepass",
        timestamp=1,  # nothing here writes timestamps; were one there, it would be a number
    )
    if reader.marks:
        raise ValueError("a mark that is not the head of an array")
    return value


class _Writer:
    __slots__ = ("buffers", "length", "packer")

    def __init__(self) -> None:
        self.packer: Any = msgpack.Packer(
            autoreset=False,
            buf_size=_BUFFER_SIZE,
            default=_beyond_64_bits,
            strict_types=True,
            unicode_errors="surrogatepass",
        )
        self.buffers: list[Buffer] = []
        self.length = 0

    def put(self, value: Any) -> None:
        kind = type(value)
        if kind in _ATOMS:
            self.packer.pack(value)
        elif kind is list:
            self._put_list(value)
        elif kind is dict:
            self._put_dict(value)
        elif kind is bytes:
            self._put_bytes(value)
        else:
            self._put_form(value)

    def _put_list(self, items: list[Any]) -> None:
        if _ATOMS.issuperset(map(type, items)):
            self.packer.pack(items)
            return
        self.packer.pack_array_header(len(items))
        for item in items:
            self.put(item)

    def _put_dict(self, value: dict[Any, Any]) -> None:
        if _ATOMS.issuperset(map(type, value)) and _ATOMS.issuperset(map(type, value.values())):
            self.packer.pack(value)
            return
        self.packer.pack_map_header(len(value))
        for key, item in value.items():
            self.put(key)
            self.put(item)

    def _put_bytes(self, data: bytes) -> None:
        if len(data) < _LARGE:
            self.packer.pack(data)
        else:
            self._put_marked(_APART, self._place(data))

    def _put_form(self, value: Any) -> None:
        form = form_of(type(value))
        if form is not None:
            self._put_marked(form.number, form.split(value))
            return
        found = arrays.split(value)
        if found is None:
            raise NotPlain
        number, parts, data = found
        self._put_marked(number, parts if data is None else (*parts, *self._place(data)))

    def _put_marked(self, number: int, parts: Iterable[Any]) -> None:
        items = list(parts)
        self.packer.pack_array_header(len(items) + 1)
        self.packer.pack_ext_type(number, b"")
        for item in items:
            self.put(item)

    def _place(self, data: Buffer) -> tuple[int, int]:
        """Put a buffer behind the message and return where it will stand."""
        start, size = self.length, memoryview(data).nbytes
        self.buffers.append(data)
        self.length += size
        return start, size


def _beyond_64_bits(value: Any) -> msgpack.ExtType:
    if type(value) is not int:
        raise NotPlain
    size = value.bit_length() // 8 + 1
    return msgpack.ExtType(INTEGER, value.to_bytes(size, "little", signed=True))


class _Reader:
    __slots__ = ("_behind", "marks")

    def __init__(self, behind: memoryview) -> None:
        self._behind = behind
        self.marks = 0

    def extension(self, number: int, data: bytes) -> Any:
        if number == INTEGER:
            return int.from_bytes(data, "little", signed=True)
        if data:
            raise ValueError("a mark holds nothing")
        self.marks += 1
        return _FORMS[number]

    def array(self, items: list[Any]) -> Any:
        if not items or type(items[0]) is not Form:
            return items
        self.marks -= 1
        form, *parts = items
        if form.number == _APART:
            return bytes(self._buffer(*parts))
        if form.number == arrays.ARRAY:
            *head, start, size = parts
            return arrays.join_array([*head, self._buffer(start, size)])
        return form.join(parts)

    def _buffer(self, start: int, size: int) -> memoryview:
        data = self._behind[start : start + size]
        if len(data) != size:
            raise ValueError("a buffer is not there")
        return data


def _no_split(value: Any) -> Iterable[Any]:
    raise NotPlain


_FORMS: Final[dict[int, Form]] = {
    **BY_NUMBER,
    _APART: Form(_APART, _no_split, list),
    arrays.ARRAY: Form(arrays.ARRAY, _no_split, arrays.join_array),
    arrays.SCALAR: Form(arrays.SCALAR, _no_split, arrays.join_scalar),
    arrays.TEXT: Form(arrays.TEXT, _no_split, arrays.join_text),
}
