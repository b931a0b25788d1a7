# this_file: src/opero/caching/shelf.py
"""What the caches of one function share: the store, the making of keys, the flights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opero.caching.edits import Edits
from opero.caching.flight import Flights
from opero.caching.instances import Instances
from opero.caching.keying import Keying, function_id, namespace_prefix
from opero.caching.memory import EntryStore, MemoryStore, Store
from opero.utils.units import parse_size

if TYPE_CHECKING:
    from opero.caching.codec import Codec
    from opero.core.function import FunctionInfo
    from opero.core.options import Options

__all__ = ["Prefix", "Shelf", "make_shelf", "shared_store"]


@dataclass(frozen=True, slots=True, eq=False)
class Shelf:
    """The entries of one function.

    Attributes:
        store: Where they are.
        keying: From a call to a key.
        flights: What is being computed.
        instances: Numbers of instances, for a method in memory; None otherwise.
        edits: Tells of a function that was edited; None in memory and in users' stores.
    """

    store: EntryStore
    keying: Keying
    flights: Flights
    instances: Instances | None
    edits: Edits | None

    def renew(self) -> None:
        """After a fork: forget the flights and lock owners of threads that do not exist here."""
        self.flights.reset()
        if isinstance(self.store, MemoryStore):
            self.store.renew_lock()
        if self.instances is not None:
            self.instances.renew_lock()


def make_shelf(info: FunctionInfo, options: Options) -> Shelf:
    """Return a shelf for a function.

    Raises:
        OperoUsageError: `cache_ignore` names no parameter, or the store does not fit.
    """
    size = parse_size(options.cache_max_bytes, "cache_max_bytes")
    if options.cache_backend != "memory":
        prefix = Prefix(info, options)
        keying = Keying(
            info, ignore=options.cache_ignore, user_key=options.cache_key, prefix=prefix
        )
        store = shared_store(options.cache_backend, prefix, size, options.cache_codec)
        owned = store.lends
        edits = Edits(info.fn, store, prefix) if owned else None
        return Shelf(store, keying, Flights(), None, edits)
    memory = MemoryStore(options.cache_maxsize, size)
    instances = Instances(forget=memory.drop_group) if info.in_class else None
    keying = Keying(
        info, ignore=options.cache_ignore, user_key=options.cache_key, instances=instances
    )
    return Shelf(memory, keying, Flights(), instances, None)


def shared_store(
    backend: str | Store, prefix: Callable[[], str], max_bytes: int, codec: str | Codec
) -> EntryStore:
    """Return entries in a store that functions share.

    Args:
        backend: Its text, which is not "memory", or a user's object.
        prefix: Gives what the keys begin with.
        max_bytes: Most bytes of one entry; what the place as a whole may take is at least as much.
        codec: The option `cache_codec`; a user's object gets the values themselves.

    Raises:
        OperoUsageError: The text names no backend, or the object does not fit.
    """
    if not isinstance(backend, str) or backend.startswith("twat:"):
        from opero.caching.stores.user import open_user_store

        return open_user_store(backend, prefix)
    from opero.caching.codec import Coder
    from opero.caching.stores.base import across_hosts, open_store, settle
    from opero.caching.stores.coded import CodedStore

    settled = settle(backend)
    return CodedStore(
        settled,
        lambda: open_store(settled),
        prefix=prefix,
        coder=Coder(codec, shared=across_hosts(settled)),
        max_bytes=max_bytes,
    )


class Prefix:
    """What the keys of a function begin with in a store that functions share.

    It is made at the first call, because closures are complete only then.
    """

    def __init__(self, info: FunctionInfo, options: Options) -> None:
        self._info = info
        self._options = options
        self._made: str | None = None

    def __call__(self) -> str:
        """Return it.

        Raises:
            UnkeyableError: The function closes over something without content.
        """
        if self._made is None:
            function = function_id(self._info, self._options.cache_version)
            self._made = f"{namespace_prefix(self._options.cache_namespace)}{function}:"
        return self._made
