# this_file: src/opero/caching/keys/canonical.py
"""Turn values into canonical bytes, and these into digests.

Every node is a one-byte tag, a length or count, and its payload, so that no two values share an
encoding and none is a prefix of another. What is no plain builtin is first described by `content`.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from types import EllipsisType, NoneType, NotImplementedType
from typing import TYPE_CHECKING, Any, Final

from opero.caching.keys.content import Shape, Unkeyable, describe, type_name

if TYPE_CHECKING:
    from hashlib import blake2b


FAST_TYPES: Final[frozenset[type]] = frozenset({str, int, bytes, bool, NoneType})
"""Exact types whose values are their own content: `(type(value), value)` is safe within a key."""

MAX_DEPTH: Final = 100
"""Containers inside containers. Deeper values, and those that contain themselves, have no key."""

_PACK_FROM = 16
_DIGEST_SIZE = 20
_STREAM_FROM = 1 << 16

_Put = Callable[[bytes | memoryview], object]
_head = struct.Struct("<cQ").pack
_word = struct.Struct("<cq").pack
_double = struct.Struct("<cd").pack
_NAN = _double(b"f", math.nan)


def parts_of(value: object) -> list[bytes | memoryview]:
    """Return the canonical bytes of a value in pieces.

    Args:
        value: Anything with content.

    Returns:
        Pieces to be joined, or hashed one by one; large buffers are the value's own memory.

    Raises:
        Unkeyable: When some part has no content, or lies too deep.

    Example:
        >>> parts_of([None, True])[1:]
        [b'n', b'1']
    """
    parts: list[bytes | memoryview] = []
    try:
        _put_value(value, parts.append, 0)
    except (Unkeyable, MemoryError):
        raise
    except Exception as error:
        # A metaclass that breaks hashing, a dict that changes meanwhile, a stack nearly full.
        raise _unreadable(value, error) from error
    return parts


def _unreadable(value: object, error: Exception) -> Unkeyable:
    return Unkeyable(type_name(type(value)), f"could not be read ({type(error).__name__})")


def _put_value(value: object, put: _Put, depth: int) -> None:
    _WRITERS.get(type(value), _put_described)(value, put, depth)


def _joined(value: object, depth: int) -> bytes:
    parts: list[bytes | memoryview] = []
    _put_value(value, parts.append, depth)
    return b"".join(parts)


def _below(value: object, depth: int) -> int:
    """Return how deep the parts of a value lie."""
    if depth == MAX_DEPTH:
        reason = f"is nested deeper than {MAX_DEPTH} levels, or contains itself"
        raise Unkeyable(type_name(type(value)), reason)
    return depth + 1


def _put_text(value: str, put: _Put, depth: int = 0) -> None:
    try:
        data = value.encode()
    except UnicodeEncodeError:  # lone surrogates, as in file names that could not be decoded
        data = value.encode("utf-8", "surrogatepass")
    put(_head(b"s", len(data)) + data)


def _put_integer(value: int, put: _Put, depth: int) -> None:
    try:
        put(_word(b"i", value))
    except struct.error:
        size = value.bit_length() // 8 + 1
        put(_head(b"I", size) + value.to_bytes(size, "little", signed=True))


def _put_float(value: float, put: _Put, depth: int) -> None:
    put(_double(b"f", value) if value == value else _NAN)


def _put_complex(value: complex, put: _Put, depth: int) -> None:
    put(b"c")
    _put_float(value.real, put, depth)
    _put_float(value.imag, put, depth)


def _put_buffer(value: bytes | memoryview, put: _Put, depth: int) -> None:
    if type(value) is memoryview and (
        value.format != "B" or value.ndim != 1 or not value.c_contiguous
    ):
        _put_described(value, put, depth)
        return
    put(_head(b"b" if type(value) is bytes else b"m", len(value)))
    put(value)


def _put_items(values: Collection[Any], put: _Put, depth: int, tag: bytes = b"") -> None:
    depth = _below(values, depth)
    size = len(values)
    put(_head(tag or (b"l" if type(values) is list else b"t"), size))
    packed = _packed(values) if size >= _PACK_FROM else None
    if packed is not None:
        put(packed)
        return
    for index, item in enumerate(values):
        try:
            _WRITERS.get(type(item), _put_described)(item, put, depth)
        except Unkeyable as signal:
            signal.inside(index)
            raise


def _packed(values: Collection[Any]) -> bytes | None:
    """Encode many items of one plain type at C speed; None when they are not that."""
    kinds = set(map(type, values))
    if kinds == {int}:
        try:
            return b"\x01" + struct.pack(f"<{len(values)}q", *values)
        except struct.error:
            return None
    if kinds == {float} and not any(map(math.isnan, values)):
        return b"\x02" + struct.pack(f"<{len(values)}d", *values)
    if kinds == {str}:
        lengths = struct.pack(f"<{len(values)}Q", *map(len, values))
        return b"\x03" + lengths + _joined("".join(values), 0)
    return None


def _put_set(value: set[Any] | frozenset[Any], put: _Put, depth: int) -> None:
    tag = b"S" if type(value) is set else b"F"
    kinds = set(map(type, value))
    if kinds in ({str}, {int}):
        _put_items(sorted(value), put, depth, tag)
        return
    depth = _below(value, depth)
    put(_head(tag, len(value)))
    try:
        encoded = sorted(_joined(item, depth) for item in value)
    except Unkeyable as signal:
        signal.inside("<element>")
        raise
    put(b"".join(encoded))


def _put_dict(value: dict[Any, object], put: _Put, depth: int) -> None:
    put(_head(b"d", len(value)))
    depth = _below(value, depth)
    if {str}.issuperset(map(type, value)):
        _put_entries(value, put, depth)
        return
    pairs = []
    for key, item in value.items():
        try:
            pairs.append((_joined(key, depth), _joined(item, depth)))
        except Unkeyable as signal:
            signal.inside(f"<{type(key).__name__} key>")
            raise
    # Several keys may share one encoding (two NaNs), so values take part in the order.
    for pair in sorted(pairs):
        put(b"".join(pair))


def _put_entries(entries: Mapping[str, object], put: _Put, depth: int) -> None:
    for key in sorted(entries):
        _put_text(key, put)
        item = entries[key]
        try:
            _WRITERS.get(type(item), _put_described)(item, put, depth)
        except Unkeyable as signal:
            # Other keys than names are data (an e-mail address, a token): errors must not show them.
            signal.inside(key if key.isidentifier() else "<str key>")
            raise


def _put_described(value: object, put: _Put, depth: int) -> None:
    depth = _below(value, depth)
    try:
        shape = value if type(value) is Shape else describe(value)
    except (Unkeyable, MemoryError):
        raise
    except Exception as error:
        raise _unreadable(value, error) from error
    put(_head(b"@", len(shape.parts)))
    _put_text(shape.tag, put)
    _put_value(shape.whole, put, depth)
    _put_entries(shape.parts, put, depth)


_WRITERS: Final[dict[type, Callable[[Any, _Put, int], object]]] = {
    str: _put_text,
    int: _put_integer,
    float: _put_float,
    complex: _put_complex,
    bool: lambda value, put, depth: put(b"1" if value else b"0"),
    NoneType: lambda value, put, depth: put(b"n"),
    EllipsisType: lambda value, put, depth: put(b"e"),
    NotImplementedType: lambda value, put, depth: put(b"N"),
    bytes: _put_buffer,
    memoryview: _put_buffer,
    list: _put_items,
    tuple: _put_items,
    set: _put_set,
    frozenset: _put_set,
    dict: _put_dict,
}


# --- what others call ------------------------------------------------------------------------------


def encode(value: object) -> bytes:
    """Return the canonical bytes of a value.

    Args:
        value: Anything with content: builtins, collections, dataclasses, enums, paths, dates,
            pydantic and attrs models, arrays and frames, importable functions and
            classes, nested as you like.

    Returns:
        The same bytes for the same content and types, in every process.

    Raises:
        Unkeyable: When some part has no content of its own (a lock, a client, a lambda), contains
            itself, or is nested deeper than `MAX_DEPTH`.

    Example:
        >>> encode({"a": 1, "b": 2}) == encode({"b": 2, "a": 1})
        True
        >>> encode([1]) == encode([True])
        False
    """
    return b"".join(parts_of(value))


def digest(value: object) -> bytes:
    """Return the BLAKE2b hash (20 bytes) of a value's canonical bytes.

    Args:
        value: As for `encode`. Large buffers are hashed in place.

    Returns:
        20 bytes; `.hex()` gives the text form for stores that want one.

    Raises:
        Unkeyable: As for `encode`.

    Example:
        >>> digest(("page", 3)) == digest(("page", 3))
        True
        >>> len(digest(None))
        20
    """
    return _hashed(parts_of(value))


def pair_head(name: str) -> bytes:
    """Return what the canonical bytes of a tuple `(name, value)` begin with."""
    return _head(b"t", 2) + _joined(name, 0)


def pairs_digest(heads: Sequence[bytes], values: Sequence[object]) -> bytes:
    """Return the digest of a tuple of pairs, `((name, value), ...)`.

    Args:
        heads: The `pair_head` of each name.
        values: The values, as for `encode`.

    Raises:
        Unkeyable: As for `encode`; the path begins with the number of the value.

    Example:
        >>> pairs_digest([pair_head("x")], [1]) == digest((("x", 1),))
        True
    """
    parts: list[bytes | memoryview] = [_head(b"t", len(heads))]
    put, index = parts.append, 0
    try:
        for index, head in enumerate(heads):
            put(head)
            value = values[index]
            _WRITERS.get(type(value), _put_described)(value, put, 2)
    except Unkeyable as signal:
        signal.inside(index)
        raise
    except MemoryError:
        raise
    except Exception as error:
        unreadable = _unreadable(values[index], error)
        unreadable.inside(index)
        raise unreadable from error
    return _hashed(parts)


def _hashed(parts: list[bytes | memoryview]) -> bytes:
    hasher = load_blake2b()
    if sum(map(len, parts)) < _STREAM_FROM:
        return hasher(b"".join(parts), digest_size=_DIGEST_SIZE).digest()
    state = hasher(digest_size=_DIGEST_SIZE)
    for part in parts:
        state.update(part)
    return state.digest()


def fast_part(value: object) -> tuple[type, object] | bytes:
    """Return a small hashable that stands for a value in an in-memory key.

    Args:
        value: As for `encode`.

    Returns:
        `(type(value), value)` for the types in `FAST_TYPES`, else the digest. The two never
        compare equal.

    Raises:
        Unkeyable: As for `encode`.

    Example:
        >>> fast_part(1), fast_part(True)
        ((<class 'int'>, 1), (<class 'bool'>, True))
    """
    kind = type(value)
    # Identity, not membership: a metaclass may make its classes unhashable.
    if kind is str or kind is int or kind is bytes or kind is bool or value is None:
        return kind, value
    return digest(value)


@functools.cache
def load_blake2b() -> type[blake2b]:
    """Return the hash function, without OpenSSL: `import opero` has to stay cheap, and most keys need no hash."""
    try:
        from _blake2 import blake2b
    except ImportError:  # of another Python than CPython
        from hashlib import blake2b
    return blake2b
