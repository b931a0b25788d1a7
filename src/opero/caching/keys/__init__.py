# this_file: src/opero/caching/keys/__init__.py
"""Cache keys: argument values turned into canonical bytes, by content and type.

Equal content of the same types gives the same bytes in every process, under every hash seed and
on every supported Python; different content or types give different bytes.

    canonical   builtins to bytes
    content     what the content of every other object is, in terms of builtins
      standard    of the standard library's types
      names       of functions, classes, methods and type hints, which go by name
      arrays      of numpy and pandas values
    shape       what these speak in: `Shape`, and `Unkeyable` where there is no content
"""

from __future__ import annotations

import functools
from types import NoneType
from typing import TYPE_CHECKING, Final

from opero.caching.keys.canonical import MAX_DEPTH, parts_of
from opero.caching.keys.shape import Unkeyable

if TYPE_CHECKING:
    from hashlib import blake2b

__all__ = ["FAST_TYPES", "MAX_DEPTH", "Unkeyable", "digest", "encode", "fast_part"]

FAST_TYPES: Final[frozenset[type]] = frozenset({str, int, bytes, bool, NoneType})
"""Exact types whose values are their own content: `(type(value), value)` is safe within a key."""

_DIGEST_SIZE = 20
_STREAM_FROM = 1 << 16


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
    parts = parts_of(value)
    hasher = _blake2b()
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
def _blake2b() -> type[blake2b]:
    # `import opero` has to stay cheap, and most keys never need a hash.
    from hashlib import blake2b

    return blake2b
