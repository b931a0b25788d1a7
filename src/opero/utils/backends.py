# this_file: src/opero/utils/backends.py
"""The names that `cache_backend` understands, and where the stores behind them are written.

A new store is one module and one line here. The module has three functions: `settle(text)`, which
refuses a text that cannot be meant and makes it independent of the working directory,
`locate(text)`, which says where that is just now, and `open_at(place)`, which returns the
`ByteStore`, and imports what it needs only when that is used. Its constant `ACROSS_HOSTS` says whether
other hosts may read and write there.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from opero.errors import OperoUsageError, did_you_mean
from opero.utils.secrets import mask_url

__all__ = ["BACKENDS", "backend_of"]

BACKENDS: Final = MappingProxyType(
    {
        "disk": "opero.caching.stores.disk",
        "redis": "opero.caching.stores.redis",
        "rediss": "opero.caching.stores.redis",
        "unix": "opero.caching.stores.redis",
        "twat": "opero.caching.stores.twat",
    }
)
"""Module by what a text begins with, up to a colon; the module's own name is that of the backend.

Memory has none: it belongs to one function.
"""


def backend_of(name: str, text: str) -> str:
    """Return the backend that a text names.

    Args:
        name: The option, for messages.
        text: "memory", "disk", "disk:PATH" ...

    Raises:
        OperoUsageError: There is no such backend.

    Example:
        >>> backend_of("cache_backend", "disk:~/answers")
        'disk'
    """
    scheme, colon, remainder = text.partition(":")
    if text == "memory":
        return text
    module = BACKENDS.get(scheme)
    if module is not None and (remainder or (not colon and scheme != "twat")):
        return module.rpartition(".")[2]
    known = ("memory", "disk", "disk:PATH", "redis", "redis://HOST:PORT/DB")
    raise OperoUsageError(
        f"{name}={mask_url(text)!r} is no cache backend.{did_you_mean(scheme, known)} "
        f"There are {', '.join(map(repr, known))}, and store objects with get, set, delete and clear."
    )
