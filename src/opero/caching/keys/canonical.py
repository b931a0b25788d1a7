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
        leaf = _LEAVES.get(type(value))
        if leaf is None:
            _branch(value, parts.append, 0)
        else:
            parts.append(leaf(value))
    except (Unkeyable, MemoryError):
        raise
    except Exception as error:
        # A metaclass that breaks hashing, a dict that changes meanwhile, a stack nearly full.
        raise Unkeyable(type_name(type(value)), _unreadable(error)) from error
    return parts


def _put_value(value: object, put: _Put, depth: int) -> None:
    leaf = _LEAVES.get(type(value))
    if leaf is None:
        _branch(value, put, depth)
    else:
        put(leaf(value))


def _branch(value: object, put: _Put, depth: int) -> None:
    if depth == MAX_DEPTH:
        reason = f"is nested deeper than {MAX_DEPTH} levels, or contains itself"
        raise Unkeyable(type_name(type(value)), reason)
    _BRANCHES.get(type(value), _shape_of)(value, put, depth + 1)


def _text(value: str) -> bytes:
    try:
        data = value.encode()
    except UnicodeEncodeError:  # lone surrogates, as in file names that could not be decoded
        data = value.encode("utf-8", "surrogatepass")
    return _head(b"s", len(data)) + data


def _integer(value: int) -> bytes:
    try:
        return _word(b"i", value)
    except struct.error:
        size = value.bit_length() // 8 + 1
        return _head(b"I", size) + value.to_bytes(size, "little", signed=True)


def _float(value: float) -> bytes:
    return _double(b"f", value) if value == value else _NAN


def _complex(value: complex) -> bytes:
    return b"c" + _float(value.real) + _float(value.imag)


def _buffer(value: bytes | memoryview, put: _Put, depth: int) -> None:
    if type(value) is memoryview and (
        value.format != "B" or value.ndim != 1 or not value.c_contiguous
    ):
        _shape_of(value, put, depth)
        return
    put(_head(b"b" if type(value) is bytes else b"m", len(value)))
    put(value)


def _items(values: Collection[object], put: _Put, depth: int, tag: bytes = b"") -> None:
    size = len(values)
    put(_head(tag or (b"l" if type(values) is list else b"t"), size))
    if size >= _PACK_FROM:
        packed = _packed(values)
        if packed is not None:
            put(packed)
            return
    index = 0
    try:
        for index, item in enumerate(values):  # noqa: B007 - names the place of a bad item
            leaf = _LEAVES.get(type(item))
            if leaf is None:
                _branch(item, put, depth)
            else:
                put(leaf(item))
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
        return b"\x03" + lengths + _text("".join(values))
    return None


def _set(value: set[Any] | frozenset[Any], put: _Put, depth: int) -> None:
    tag = b"S" if type(value) is set else b"F"
    kinds = set(map(type, value))
    if kinds in ({str}, {int}):
        _items(sorted(value), put, depth, tag)
        return
    put(_head(tag, len(value)))
    try:
        encoded = [_joined(item, depth) for item in value]
    except Unkeyable as signal:
        signal.inside("<element>")
        raise
    for part in sorted(encoded):
        put(part)


def _dict(value: dict[Any, object], put: _Put, depth: int) -> None:
    put(_head(b"d", len(value)))
    for key in value:
        if type(key) is not str:
            break
    else:
        _entries(value, put, depth)
        return
    pairs = []
    for key, item in value.items():
        step = f"<{type(key).__name__} key>"
        try:
            pairs.append((_joined(key, depth), _joined(item, depth)))
        except Unkeyable as signal:
            signal.inside(step)
            raise
    # Several keys may share one encoding (two NaNs), so values take part in the order.
    for pair in sorted(pairs):
        put(b"".join(pair))


def _entries(entries: Mapping[str, object], put: _Put, depth: int) -> None:
    key = ""
    try:
        for key in sorted(entries):
            put(_text(key))
            item = entries[key]
            leaf = _LEAVES.get(type(item))
            if leaf is None:
                _branch(item, put, depth)
            else:
                put(leaf(item))
    except Unkeyable as signal:
        # Other keys than names are data (an e-mail address, a token): errors must not show them.
        signal.inside(key if key.isidentifier() else "<str key>")
        raise


def _joined(value: object, depth: int) -> bytes:
    parts: list[bytes | memoryview] = []
    _put_value(value, parts.append, depth)
    return b"".join(parts)


def _shape_of(value: object, put: _Put, depth: int) -> None:
    try:
        shape = describe(value)
    except (Unkeyable, MemoryError):
        raise
    except Exception as error:
        raise Unkeyable(type_name(type(value)), _unreadable(error)) from error
    _shape(shape, put, depth)


def _shape(shape: Shape, put: _Put, depth: int) -> None:
    put(_head(b"@", len(shape.parts)) + _text(shape.tag))
    _put_value(shape.whole, put, depth)
    _entries(shape.parts, put, depth)


def _unreadable(error: Exception) -> str:
    return f"could not be read ({type(error).__name__})"


_LEAVES: Final[dict[type, Callable[[Any], bytes]]] = {
    str: _text,
    int: _integer,
    float: _float,
    complex: _complex,
    bool: {False: b"0", True: b"1"}.__getitem__,
    NoneType: lambda _: b"n",
    EllipsisType: lambda _: b"e",
    NotImplementedType: lambda _: b"N",
}
_BRANCHES: Final[dict[type, Callable[[Any, _Put, int], None]]] = {
    bytes: _buffer,
    memoryview: _buffer,
    list: _items,
    tuple: _items,
    set: _set,
    frozenset: _set,
    dict: _dict,
    Shape: _shape,
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
    return _head(b"t", 2) + _text(name)


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
    index = 0
    try:
        for head in heads:
            parts.append(head)
            value = values[index]
            leaf = _LEAVES.get(type(value))
            if leaf is None:
                _branch(value, parts.append, 2)
            else:
                parts.append(leaf(value))
            index += 1
    except Unkeyable as signal:
        signal.inside(index)
        raise
    except MemoryError:
        raise
    except Exception as error:
        unreadable = Unkeyable(type_name(type(values[index])), _unreadable(error))
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
