# this_file: src/opero/caching/codec/coder.py
"""Values to bytes and back, in the form that `cache_codec` asks for.

    kind  check  length of the message  message, buffers      plain data
    kind  signature                     pickle                everything else
    kind  check  bytes                                        a user's own codec

The check (CRC-32) and the signature cover the context, so that an entry which lies under another
key than it was written for is none.
"""

from __future__ import annotations

import struct
from typing import Any, Final, Protocol
from zlib import crc32

from opero.caching.codec import plain
from opero.caching.codec.signals import Buffer, NotPlain, Undecodable, Unencodable

__all__ = ["Codec", "Coder"]


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
        opero.caching.codec.signals.Undecodable: it was written for another key, or changed
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
            Unencodable: It cannot be encoded; the message tells why.
        """
        if self._codec is not None:
            return self._encode_by_user(self._codec, value, context)
        try:
            message, buffers = plain.write(value)
        except NotPlain:
            if self._pickles:
                return self._encode_signed(value, context)
            kind = type(value).__qualname__
            raise Unencodable(
                f'its result ({kind}) is no plain data: cache_codec="plain"'
            ) from None
        length = _LENGTH.pack(len(message))
        check = _check(context, length, message, *buffers)
        return [_PLAIN + check, length, message, *buffers]

    def decode(self, data: Buffer, context: bytes) -> Any:
        """Return the value of an entry.

        Args:
            data: Its bytes.
            context: As for `encode`.

        Raises:
            Undecodable: It is no entry, or not the one that was written for this context.
        """
        view = memoryview(data)
        kind = bytes(view[:1])
        if self._codec is not None:
            if kind != _USERS:
                raise Undecodable("it is of another codec")
            return self._decode_by_user(self._codec, _checked(view, context))
        if kind == _PLAIN:
            return _decode_plain(_checked(view, context))
        if kind == _SIGNED and self._pickles:
            return self._decode_signed(view, context)
        raise Undecodable("it is of another codec")

    def _encode_signed(self, value: Any, context: bytes) -> list[Buffer]:
        from opero.caching.codec import signed

        signature, data = signed.write(value, context, shared=self._shared)
        return [_SIGNED, signature, data]

    def _decode_signed(self, view: memoryview, context: bytes) -> Any:
        from opero.caching.codec import signed

        start = 1 + signed.SIGNATURE_SIZE
        return signed.read(view[1:start], view[start:], context, shared=self._shared)

    def _encode_by_user(self, codec: Codec, value: Any, context: bytes) -> list[Buffer]:
        try:
            data = memoryview(codec.encode(value)).cast("B")
        except Exception as error:
            why = f"cache_codec raised {type(error).__name__}"
            raise Unencodable(f"its result ({type(value).__qualname__}): {why}") from error
        return [_USERS + _check(context, data), data]

    def _decode_by_user(self, codec: Codec, data: memoryview) -> Any:
        try:
            return codec.decode(bytes(data))
        except Exception as error:
            raise Undecodable(f"cache_codec raised {type(error).__name__}") from error


_PLAIN: Final = b"p"
_SIGNED: Final = b"s"
_USERS: Final = b"u"
_CHECK_SIZE: Final = 4
_LENGTH: Final = struct.Struct("<Q")


def _check(context: bytes, *pieces: Buffer) -> bytes:
    check = crc32(context)
    for piece in pieces:
        check = crc32(piece, check)
    return check.to_bytes(_CHECK_SIZE, "little")


def _checked(view: memoryview, context: bytes) -> memoryview:
    """Return what stands behind the check, if that fits."""
    data = view[1 + _CHECK_SIZE :]
    if _check(context, data) != view[1 : 1 + _CHECK_SIZE]:
        raise Undecodable("it was written for another key, or changed")
    return data


def _decode_plain(data: memoryview) -> Any:
    try:
        (length,) = _LENGTH.unpack_from(data)
        message = data[_LENGTH.size :]
        return plain.read(message[:length], message[length:])
    except Exception as error:
        # An attacker's, or of a later opero: the check says that nothing was cut off.
        raise Undecodable(f"it is no plain data ({type(error).__name__})") from error
