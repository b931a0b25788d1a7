# this_file: src/opero/caching/function_cache.py
"""Hold what the caches of one function share: the store, the making of keys, the flights."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opero import events
from opero.caching.keys.function_keys import (
    FunctionKeys,
    InstanceTokens,
    function_id,
    namespace_prefix,
)
from opero.caching.memory import EntryStore, MemoryStore, Store
from opero.caching.single_flight import SingleFlight
from opero.errors import StoreError

if TYPE_CHECKING:
    from opero.caching.codec import Codec
    from opero.caching.keys.function_keys import FunctionDescription
    from opero.events.bus import Emitter

__all__ = ["FunctionCache", "SourceChange", "make_function_cache", "shared_store", "source_digest"]


@dataclass(frozen=True, slots=True, eq=False)
class FunctionCache:
    """The entries of one function and what belongs to them.

    Attributes:
        store: Where they are.
        keys: From a call to a key.
        single_flight: What is being computed.
        instances: Numbers of instances, for a method in memory; None otherwise.
        source_change: Notices that the function was edited; None in memory and in users' stores.
    """

    store: EntryStore
    keys: FunctionKeys
    single_flight: SingleFlight
    instances: InstanceTokens | None = None
    source_change: SourceChange | None = None

    def after_fork(self) -> None:
        """Forget the flights and lock owners of threads that do not exist in a forked child."""
        self.single_flight.after_fork()
        if isinstance(self.store, MemoryStore):
            self.store.after_fork()
        if self.instances is not None:
            self.instances.after_fork()


def make_function_cache(
    function: FunctionDescription,
    *,
    backend: str | Store,
    namespace: str,
    version: str | int | None,
    ignore: Iterable[str],
    user_key: Callable[..., object] | None,
    maxsize: int,
    max_bytes: int,
    codec: str | Codec,
) -> FunctionCache:
    """Return the cache of a function; the arguments are its `cache_...` options.

    Raises:
        OperoUsageError: `ignore` names no parameter, or the store does not fit.
    """
    if backend != "memory":
        # Made at the first call, because closures are complete only then.
        prefix = functools.cache(
            lambda: f"{namespace_prefix(namespace)}{function_id(function, version)}:"
        )
        keys = FunctionKeys(function, ignore=ignore, user_key=user_key, prefix=prefix)
        store = shared_store(backend, prefix, max_bytes, codec)
        change = SourceChange(function.fn, store, prefix) if store.lends else None
        return FunctionCache(store, keys, SingleFlight(), source_change=change)
    memory = MemoryStore(maxsize, max_bytes)
    instances = InstanceTokens(forget=memory.drop_group) if function.in_class else None
    keys = FunctionKeys(function, ignore=ignore, user_key=user_key, instances=instances)
    return FunctionCache(memory, keys, SingleFlight(), instances)


def shared_store(
    backend: str | Store, prefix: Callable[[], str], max_bytes: int, codec: str | Codec
) -> EntryStore:
    """Return entries in a store that functions share.

    Args:
        backend: Its text, which is not "memory", or a user's object.
        prefix: Returns what the keys begin with.
        max_bytes: Most bytes of one entry; what the place as a whole may take is at least as much.
        codec: The option `cache_codec`; a user's object gets the values themselves.

    Raises:
        OperoUsageError: The text names no backend, or the object does not fit.
    """
    from opero.caching.stores.base import open_entries

    return open_entries(backend, prefix, max_bytes, codec)


# --- functions that were edited since their results were stored -----------------------------------


def source_digest(fn: Any) -> bytes | None:
    """Return a digest of a function's source, None if there is none to be had.

    What stands before its `def` does not count: changing the options of a decorator is no edit.
    """
    while isinstance(fn, functools.partial):
        fn = fn.func
    if not (inspect.isroutine(fn) or inspect.isclass(fn)):
        fn = type(fn).__call__
    code = getattr(fn, "__code__", None)
    if code is not None and code.co_filename == "<string>":
        # Python 3.13 may take the program of `python -c` for it, from wherever the function came.
        return None
    try:
        lines, _ = inspect.getsourcelines(fn)
    except (OSError, TypeError):
        return None
    for number, line in enumerate(lines):
        if line.lstrip().startswith(("def ", "async def ")):
            lines = lines[number:]
            break
    from hashlib import blake2b
    from textwrap import dedent

    text = dedent("".join(lines)).rstrip()
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest().encode()


class SourceChange:
    """Notices, once in a process, that a function was edited since its entries were stored.

    The entries are kept, because a batch that is resumed after a small change must not pay twice;
    listeners are notified once. A digest of the source lies beside the entries.

    Args:
        fn: The function.
        store: The `CodedStore` where the entries are.
        prefix: Returns what their keys begin with.
    """

    def __init__(self, fn: Any, store: Any, prefix: Callable[[], str]) -> None:
        self.looked: bool = False
        self._fn = fn
        self._store = store
        self._prefix = prefix

    def look(self, emitter: Emitter) -> None:
        """Compare with what the last process has left; the lookup reports a store that fails."""
        self.looked = True
        now = source_digest(self._fn)
        if now is None:
            return
        key = f"~source:{self._prefix()}"
        try:
            backend = self._store.backend
            then = backend.get(key)
            if then == now:
                return
            backend.set(key, now, None)
        except StoreError:
            return
        if then is not None and emitter.active:
            emitter.emit(events.FunctionEdited(function=emitter.function))
