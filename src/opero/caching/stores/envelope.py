# this_file: src/opero/caching/stores/envelope.py
"""What lies around a stored value: a mark, when it was stored and when it expires.

    mark  version  stored  expires  value as the codec wrote it

So None is a value like any other, and what the store should have dropped is not served. Times are
seconds since the epoch, because processes and machines share them. The codec's check or signature
covers all of it and the key, so that nothing can be cut off, changed or put under another key.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from opero.caching.codec.signals import Undecodable

if TYPE_CHECKING:
    from opero.caching.codec import Coder

__all__ = ["Opened", "open_envelope", "seal"]

_HEADER: Final = struct.Struct(">2sBdd")
_MARK: Final = b"op"
_VERSION: Final = 1


class Opened(NamedTuple):
    """What was in an envelope.

    Attributes:
        value: The value.
        stored: When it was stored, in seconds since the epoch.
        expires: When it expires, `math.inf` for never.
    """

    value: Any
    stored: float
    expires: float


def seal(coder: Coder, key: str, value: Any, *, stored: float, expires: float) -> bytes:
    """Return the bytes to be stored for a value.

    Args:
        coder: How values become bytes.
        key: Where they will be stored.
        value: The value.
        stored: Now, in seconds since the epoch.
        expires: When it expires, `math.inf` for never.

    Raises:
        Unencodable: The value cannot be encoded.
    """
    header = _HEADER.pack(_MARK, _VERSION, stored, expires)
    return b"".join((header, *coder.encode(value, _context(header, key))))


def open_envelope(coder: Coder, key: str, blob: bytes) -> Opened:
    """Return what is in an envelope.

    Raises:
        Undecodable: It is none, or not the one that was stored under this key.
    """
    header = blob[: _HEADER.size]
    if len(header) < _HEADER.size:
        raise Undecodable("it is cut short")
    mark, version, stored, expires = _HEADER.unpack(header)
    if mark != _MARK or version != _VERSION or math.isnan(expires):
        raise Undecodable("it is none of this version of opero")
    value = coder.decode(memoryview(blob)[_HEADER.size :], _context(header, key))
    return Opened(value, stored, expires)


def _context(header: bytes, key: str) -> bytes:
    return header + key.encode("utf-8", "surrogatepass")
