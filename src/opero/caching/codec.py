# this_file: src/opero/caching/codec.py
"""Turn results into bytes for disk and Redis, and back, with nothing executed on the way.

    kind  check  length of the message  message, buffers      plain data, in MessagePack
    kind  signature                     pickle                everything else
    kind  check  bytes                                        a user's own codec

The check (CRC-32) and the signature cover the context, so that an entry which lies under another
key than it was written for is none.

What MessagePack does not know is an array whose head is an empty extension, the mark of a form:

    (1, "a")  →  [mark 1, 1, "a"]

Forms are those of `plain_types`, and numpy's. Exact types are kept: a subclass of a plain type is
not plain. Large buffers stand behind the message, so that they are copied once on their way in and
once on their way out. Reading takes no more memory and time than the size of an entry times a small
factor, whatever its bytes are.
"""

from __future__ import annotations

import math
import re
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from types import NoneType
from typing import Any, Final, Protocol
from zlib import crc32

import msgpack

from opero.caching.plain_types import (
    BY_NUMBER,
    MOST_ALIKE,
    Buffer,
    NotPlain,
    Undecodable,
    Unencodable,
    of_type,
    refuse_alike,
)


class Codec(Protocol):
    """What an object needs to be a `cache_codec`.

    Whatever they raise is a result that is not stored, or an entry that is not there.
    """

    def encode(self, value: Any, /) -> Buffer:
        """Return the bytes for a value."""
        ...

    def decode(self, data: bytes, /) -> Any:
        """Return the value for bytes that `encode` made."""
        ...


class Coder:
    """Encodes and decodes the entries of one store.

    Args:
        codec: The option: "auto", "plain" or a user's codec.
        shared: Whether other hosts use the store, so that a signature needs `OPERO_CACHE_SECRET`.

    Example:
        >>> coder = Coder("plain")
        >>> data = b"".join(coder.encode((1, True), b"key"))
        >>> coder.decode(data, b"key")
        (1, True)
        >>> coder.decode(data, b"another key")
        Traceback (most recent call last):
        ...
        opero.caching.plain_types.Undecodable: it was written for another key, or changed
    """

    def __init__(self, codec: str | Codec = "auto", *, shared: bool = False) -> None:
        self._codec = None if isinstance(codec, str) else codec
        self._pickles = codec == "auto"
        self._shared = shared

    def encode(self, value: Any, context: bytes) -> list[Buffer]:
        """Return the pieces of the bytes for a value, to be joined or written one by one.

        Args:
            value: The value. Pieces may be its own memory: use them before it changes.
            context: What the entry belongs to: its key, and whatever else must not change.

        Raises:
            Unencodable: It cannot be encoded; the message says why.
        """
        kind = type(value).__qualname__
        if self._codec is not None:
            try:
                data = memoryview(self._codec.encode(value)).cast("B")
            except Exception as error:
                why = f"cache_codec raised {type(error).__name__}"
                raise Unencodable(f"its result ({kind}): {why}") from error
            return _checked(_USERS, context, data)
        try:
            message, buffers = write_plain(value)
        except NotPlain:
            if self._pickles:
                from opero.caching.signing import write_signed

                return [_SIGNED, *write_signed(value, context, shared=self._shared)]
            raise Unencodable(
                f'its result ({kind}) is no plain data: cache_codec="plain"'
            ) from None
        length = _LENGTH.pack(len(message))
        return _checked(_PLAIN, context, length, message, *buffers)

    def decode(self, data: Buffer, context: bytes) -> Any:
        """Return the value of an entry.

        Args:
            data: Its bytes.
            context: As for `encode`.

        Raises:
            Undecodable: It is no entry, or not the one that was written for this context.
        """
        try:
            view = memoryview(data)
        except TypeError:
            raise Undecodable("it is no bytes") from None
        kind, check = _HEAD.unpack_from(view) if len(view) >= _HEAD.size else (b"", 0)
        if kind == _SIGNED and self._pickles:
            from opero.caching.signing import read_signed

            return read_signed(view[1:], context, shared=self._shared)
        if kind != (_PLAIN if self._codec is None else _USERS):
            raise Undecodable("it is of another codec")
        content = view[_HEAD.size :]
        if crc32(content, crc32(context)) != check:
            raise Undecodable("it was written for another key, or changed")
        try:
            if self._codec is not None:
                return self._codec.decode(bytes(content))
            end = _MESSAGE_START + _LENGTH.unpack_from(content)[0]
            return read_plain(view[_MESSAGE_START:end], view[end:])
        except Undecodable:
            raise
        except Exception as error:
            # An attacker's, or of a later opero: the check says that nothing was cut off.
            name = type(error).__name__
            plain = self._codec is None
            why = f"it is no plain data ({name})" if plain else f"cache_codec raised {name}"
            raise Undecodable(why) from error


_PLAIN: Final = b"p"
_SIGNED: Final = b"s"
_USERS: Final = b"u"
_HEAD: Final = struct.Struct("<cI")
_LENGTH: Final = struct.Struct("<Q")
_MESSAGE_START: Final = _HEAD.size + _LENGTH.size


def _checked(kind: bytes, context: bytes, *pieces: Buffer) -> list[Buffer]:
    """Return an entry of a kind: its head with the check, and the pieces."""
    check = crc32(context)
    for piece in pieces:
        check = crc32(piece, check)
    return [_HEAD.pack(kind, check), *pieces]


# --- plain data ------------------------------------------------------------------------------------------------------

_ATOMS: Final = frozenset({NoneType, bool, int, float, str})
"""What MessagePack writes as it is, whatever its size."""

_APART: Final = 0
"""Number of the form of a buffer that stands behind the message."""

_INTEGER: Final = 4
"""Number of the form of integers beyond 64 bits; their bytes follow it directly."""

_LARGE: Final = 1 << 14
_BUFFER_SIZE: Final = 1 << 12
_SCANNED_FROM: Final = 1 << 10
"""Bytes from which on a message is looked through before it is read."""

_EXTENSION: Final = re.compile(rb"[\xc7-\xc9\xd4-\xd8]")
"""How the extensions of MessagePack begin, and with them forms and large numbers."""


def write_plain(value: Any) -> tuple[bytes, list[Buffer]]:
    """Return the message for a value, and the buffers that stand behind it.

    Raises:
        NotPlain: It holds something else than plain data, itself, or too much of it.

    Example:
        >>> message, buffers = write_plain({"id": 1, "place": (2.5, None)})
        >>> read_plain(message, b"".join(buffers))
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


def read_plain(message: Buffer, buffers: Buffer) -> Any:
    """Return the value of a message.

    Args:
        message: The message.
        buffers: What stands after it, joined.

    Raises:
        Exception: Of whatever kind, if it is not what `write_plain` makes.
    """
    if len(message) > _SCANNED_FROM:
        _scan(message)
    if _EXTENSION.search(message) is None:  # no form can be in it
        return msgpack.unpackb(message, strict_map_key=False, unicode_errors="surrogatepass")
    reader = _Reader(memoryview(buffers))
    # Forged keys of one hash take many forms: only then is each dict looked at before it is made.
    heads = islice(_EXTENSION.finditer(message), MOST_ALIKE + 1)
    many = len(message) > MOST_ALIKE * 3 and sum(1 for _ in heads) > MOST_ALIKE
    value = msgpack.unpackb(
        message,
        ext_hook=reader.extension,
        list_hook=reader.array,
        object_pairs_hook=_join_dict if many else None,
        strict_map_key=False,
        unicode_errors="surrogatepass",
        timestamp=1,  # nothing here writes timestamps; were one there, it would be a number
    )
    if reader.marks:
        raise ValueError("a mark that is not the head of an array")
    return value


def read_raw(message: Buffer) -> Any:
    """Return the value of a message that another program made; its texts are bytes.

    Raises:
        ValueError: It is none.
    """
    return msgpack.unpackb(message, raw=True)


def _scan(message: Buffer) -> None:
    """Raise unless all items that a message announces are there: room is made for them before they are read."""
    scanner = msgpack.Unpacker(max_buffer_size=len(message))
    scanner.feed(message)
    scanner.skip()
    if scanner.tell() != len(message):
        raise ValueError("something stands behind the message")


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
        row = of_type(type(value))
        if row is None:
            self._put_marked(*_split_numpy(value, self._place))
        elif row.number is None or row.split is None:
            raise NotPlain
        else:
            self._put_marked(row.number, row.split(value))

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
    return msgpack.ExtType(_INTEGER, value.to_bytes(size, "little", signed=True))


class _Reader:
    __slots__ = ("_buffers", "_unused", "marks")

    def __init__(self, buffers: memoryview) -> None:
        self._buffers = buffers
        self._unused = len(buffers)
        self.marks = 0

    def extension(self, number: int, data: bytes) -> Any:
        if number == _INTEGER:
            return int.from_bytes(data, "little", signed=True)
        if data:
            raise ValueError("a mark holds nothing")
        self.marks += 1
        return _FormHead(number)

    def array(self, items: list[Any]) -> Any:
        if not items or type(items[0]) is not _FormHead:
            return items
        self.marks -= 1
        number = items[0].number
        parts = items[1:]
        if number == _APART:
            return bytes(self._buffer(*parts))
        if number == _ARRAY:
            *head, start, size = parts
            return _join_array([*head, self._buffer(start, size)])
        join = BY_NUMBER[number].join
        if join is None:
            raise ValueError("a form that is not encoded")
        return join(parts)

    def _buffer(self, start: int, size: int) -> memoryview:
        if type(start) is not int or type(size) is not int or not start >= 0:
            raise TypeError("a buffer stands at a number")
        # Each buffer belongs to one value: what is read twice would be copied twice.
        self._unused -= size
        data = self._buffers[start : start + size]
        if len(data) != size or self._unused < 0:
            raise ValueError("a buffer is not there")
        return data


def _join_dict(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    refuse_alike([key for key, _ in pairs])
    return dict(pairs)


class _FormHead:
    """The head of a form."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


# --- numpy -----------------------------------------------------------------------------------------------------------

_ARRAY: Final = 50
"""Number of the form of arrays, and of numpy's scalars as arrays without a side: the text of their dtype, their shape
and their bytes, never a pickle. Arrays of objects or records, of extended precision, or of a subclass are not plain."""

_DTYPE: Final = r"[<>|][biufcmMSU]\d+(\[\d*(generic|[YMWDhmsunpfa]s?)\])?"

_SIDES: Final = 64
_LONGEST_DTYPE: Final = 40


def _split_numpy(
    value: Any, place: Callable[[Buffer], tuple[int, int]]
) -> tuple[int, Sequence[Any]]:
    """Take a numpy value apart.

    Args:
        value: The value.
        place: Puts bytes that may be many behind the message, and returns where they stand.

    Returns:
        The number of its form, and its plain parts.

    Raises:
        NotPlain: It is no numpy value, or not a plain one.
    """
    kind = type(value)
    if kind.__module__ != "numpy":
        raise NotPlain
    np: Any = sys.modules["numpy"]
    scalar = issubclass(kind, np.generic)
    if kind is not np.ndarray and not scalar:
        raise NotPlain
    array = np.asarray(value)
    dtype = array.dtype
    if not _is_plain_dtype(dtype):
        raise NotPlain
    # One of several types of the same size (`longlong`) would come back as another, and text loses zeros at its end.
    if scalar and (np.dtype(dtype.str).type is not kind or (dtype.kind in "SU" and array != value)):
        raise NotPlain
    # Arrays that lie in memory column by column stay so.
    columns = array.flags.f_contiguous and not array.flags.c_contiguous
    flat = array.ravel(order="F" if columns else "C")
    # Dates have no buffer of their own, and an empty array none that can be cast.
    data = memoryview(flat.view(np.uint8)) if flat.nbytes else b""
    return _ARRAY, (dtype.str, array.shape, None if scalar else columns, *place(data))


def _is_plain_dtype(dtype: Any) -> bool:
    return (
        dtype.kind in "biufcmMSU"
        and dtype.char not in "gG"
        and dtype.metadata is None
        and dtype.itemsize > 0
        and re.fullmatch(_DTYPE, dtype.str) is not None
    )


def _join_array(parts: Sequence[Any]) -> Any:
    """Put an array together that owns its memory and can be written to."""
    text, shape, columns, data = parts
    np: Any = sys.modules.get("numpy")
    if np is None:  # an entry is no reason to load it
        raise Undecodable("it needs numpy, which is not loaded")
    # numpy reads much more than what it writes for plain types.
    if type(text) is not str or len(text) > _LONGEST_DTYPE or re.fullmatch(_DTYPE, text) is None:
        raise ValueError("no plain dtype")
    dtype = np.dtype(text)
    # Beyond a size no number is multiplied: that could take for ever.
    sizes = all(type(side) is int and 0 <= side <= sys.maxsize for side in shape)
    if not sizes or len(shape) > _SIDES:
        raise ValueError("no shape")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError("an array of another size")
    made = np.empty(shape, dtype, order="F" if columns else "C")
    if data:
        flat = made.reshape(-1, order="F" if columns else "C").view(np.uint8)
        flat[:] = np.frombuffer(data, np.uint8)
    return made[()] if columns is None else made
