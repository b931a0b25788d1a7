# this_file: src/opero/caching/stores/user.py
"""Keep entries in a user's own store object, behind the interface that the cache stage knows."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from opero.caching.copying import isolated
from opero.caching.memory import AgingEntry, Entry, Life, Store
from opero.errors import OperoUsageError
from opero.utils import ambient

__all__ = ["UserStore", "open_user_store"]


def open_user_store(backend: Any, prefix: Callable[[], str]) -> UserStore:
    """Return the entries of a function in a user's object, or in an engine of twat-cache.

    Args:
        backend: An object with get, set, delete and clear, an engine, or its text "twat:...".
        prefix: As for `UserStore`.

    Raises:
        OperoUsageError: The object does not fit, or the engine cannot work.
    """
    if isinstance(backend, str):
        from opero.caching.stores.base import open_store, settle

        opened: Any = open_store(settle(backend))
        return UserStore(opened, prefix, backend)
    if any(kind.__module__.startswith("twat_cache.") for kind in type(backend).__mro__):
        from opero.caching.stores.twat import EngineStore

        engine = backend
        backend = EngineStore(lambda: (engine, None), type(engine).__name__)
    return UserStore(backend, prefix)


class UserStore:
    """Entries of one function in a store that has get, set, delete and clear.

    What is stored is `(value, expiry)`, or `(value, expiry, birth)` where the age of an entry
    matters: times of the wall clock, because the store may be shared by processes. Values are
    isolated on their way in and out, whether the store copies them or not. Anything else found
    under a key counts as a miss.

    Args:
        store: The user's object.
        prefix: Gives what the keys of the function begin with.
        name: Its name in `info()` and `explain()`; the name of its class by default.

    Raises:
        OperoUsageError: The store's methods are coroutines.
    """

    lends = False

    def __init__(self, store: Store, prefix: Callable[[], str], name: str | None = None) -> None:
        for verb in ("get", "set", "delete", "clear"):
            if inspect.iscoroutinefunction(getattr(store, verb)):
                raise OperoUsageError(
                    f"cache_backend={store!r}: {verb}() is a coroutine. "
                    "Give a store with plain methods."
                )
        self.name: str = name or type(store).__name__
        self.blocking: bool = bool(getattr(store, "blocking", False))
        self._store = store
        self._prefix = prefix

    def find(self, key: Any) -> Entry | None:
        """Return the entry of `key`, even if it has expired."""
        held = self._store.get(key)
        if not (isinstance(held, tuple | list) and len(held) in (2, 3)):
            return None
        value, until, *birth = held
        if until is None:
            return Entry(value, copier=isolated)
        if not all(isinstance(at, int | float) for at in (until, *birth)):
            return None
        offset = ambient.wall_offset()
        entry = Entry(value, expires=until - offset, copier=isolated)
        if not birth:
            return entry
        return AgingEntry(entry, Life(birth[0] - offset, entry.expires, entry.expires))

    def put(self, key: Any, entry: Entry) -> bool:
        """Store an entry in place of any other."""
        if entry.expiry == math.inf:
            self._store.set(key, (entry.open(), None), None)
            return True
        now = ambient.clock().monotonic()
        offset = ambient.wall_offset()
        birth = () if entry.life is None else (entry.life.born + offset,)
        held = (entry.open(), entry.expiry + offset, *birth)
        self._store.set(key, held, max(0.0, entry.keep - now))
        return True

    def discard(self, key: Any, entry: Entry) -> None:
        """Remove nothing: an expired entry is the store's business, and it may be newer by now."""

    def delete(self, key: Any) -> bool:
        """Remove `key` and return whether it was there."""
        return bool(self._store.delete(key))

    def clear(self) -> int:
        """Remove the function's entries, or all of the store if it takes no prefixes."""
        clear: Any = self._store.clear
        removed = clear(prefix=self._prefix()) if _takes_prefix(clear) else clear()
        return removed if isinstance(removed, int) else 0

    def measure(self) -> tuple[int | None, int | None]:
        """Return the number of entries in the whole store if it has a length, and no bytes."""
        size: Any = getattr(self._store, "__len__", None)
        count: Any = size() if callable(size) else None
        return count, None


def _takes_prefix(clear: Any) -> bool:
    try:
        return "prefix" in inspect.signature(clear).parameters
    except (TypeError, ValueError):
        return False
