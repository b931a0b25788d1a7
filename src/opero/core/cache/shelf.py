# this_file: src/opero/core/cache/shelf.py
"""What the caches of one function share: the store, the making of keys, the flights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from opero.core.cache.flight import Flights
from opero.core.cache.instances import Instances
from opero.core.cache.keying import Keying, function_id
from opero.core.cache.memory import EntryStore, MemoryStore
from opero.core.units import parse_size

if TYPE_CHECKING:
    from opero.core.function import FunctionInfo
    from opero.core.options import Options

__all__ = ["Shelf", "make_shelf"]


@dataclass(frozen=True, slots=True, eq=False)
class Shelf:
    """The entries of one function.

    Attributes:
        store: Where they are.
        keying: From a call to a key.
        flights: What is being computed.
        instances: Numbers of instances, for a method in memory; None otherwise.
    """

    store: EntryStore
    keying: Keying
    flights: Flights
    instances: Instances | None

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
    if not isinstance(options.cache_backend, str):
        from opero.core.cache.user_store import UserStore

        prefix = _Prefix(info, options)
        keying = Keying(
            info, ignore=options.cache_ignore, user_key=options.cache_key, prefix=prefix
        )
        return Shelf(UserStore(options.cache_backend, prefix), keying, Flights(), None)
    size = parse_size(options.cache_max_bytes, "cache_max_bytes")
    memory = MemoryStore(options.cache_maxsize, size)
    instances = Instances(forget=memory.drop_group) if info.in_class else None
    keying = Keying(
        info, ignore=options.cache_ignore, user_key=options.cache_key, instances=instances
    )
    return Shelf(memory, keying, Flights(), instances)


class _Prefix:
    """What the keys of a function begin with in a store that functions share.

    It is made at the first call, because closures are complete only then.
    """

    def __init__(self, info: FunctionInfo, options: Options) -> None:
        self._info = info
        self._options = options
        self._made: str | None = None

    def __call__(self) -> str:
        if self._made is None:
            function = function_id(self._info, self._options.cache_version)
            self._made = f"{self._options.cache_namespace}:{function}:"
        return self._made
