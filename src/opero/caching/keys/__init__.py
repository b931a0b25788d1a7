# this_file: src/opero/caching/keys/__init__.py
"""Build cache keys: argument values turned into canonical bytes, by content and type.

Equal content of the same types gives the same bytes in every process, under every hash seed and
on every supported Python; different content or types give different bytes.

    function_keys   from the arguments of a call to the key of its result; names of functions
    canonical       builtins to bytes, and their digest
    content         describes every other object by builtins, or by its name; numpy and pandas values too
"""

from __future__ import annotations

from opero.caching.keys.canonical import FAST_TYPES, MAX_DEPTH, digest, encode, fast_part
from opero.caching.keys.content import Unkeyable

__all__ = ["FAST_TYPES", "MAX_DEPTH", "Unkeyable", "digest", "encode", "fast_part"]
