# this_file: src/opero/caching/memory.py
"""Hold results: the protocol that users' own stores fit, the entry, the store in memory, and weights.

The memory store evicts by second chance (the CLOCK algorithm of Corbató, 1968): entries stand in a
queue, a hit only sets a bit, and an entry whose bit is set goes back to the end of the queue once
instead of being evicted. That is close to LRU, and a hit takes no lock and moves nothing. Expired
entries go first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from itertools import islice
from sys import getsizeof
from threading import RLock
from typing import Any, Final, Protocol

from opero.utils import ambient
from opero.utils.fork import reset_after_fork
from opero.utils.lazy import NamedTuple

_SHARE: Final = 128
"""This part of a store is evicted at once where it is full: it costs less than one by one."""

Copier = Callable[[Any], Any]
"""Makes an isolated copy of what is stored."""


class Store(Protocol):
    """What an object needs to be a `cache_backend`.

    Keys are text and carry namespace, function and arguments, so functions can share a store. What
    is stored is a tuple `(value, expiry)`, expiry in seconds since the epoch or None: a stored None
    differs from nothing stored, and an entry that the store should have dropped is not served. With
    `cache_stale_ttl` or `cache_refresh` it is `(value, expiry, birth)`, birth on the same clock. The
    methods are called where the function is called, so they must be thread-safe. An event loop calls
    them directly if they are quick, and in a thread if the object has an attribute `blocking` that is
    true.
    """

    def get(self, key: Any, /) -> Any:
        """Return what was stored under `key`, or None if there is nothing."""
        ...

    def set(self, key: Any, value: Any, ttl: float | None, /) -> Any:
        """Store `value` for `ttl` seconds (None: for good)."""
        ...

    def delete(self, key: Any, /) -> Any:
        """Remove one key; the answer is true if it was there."""
        ...

    def clear(self) -> Any:
        """Remove everything; with a parameter named `prefix`, only the keys that begin with it."""
        ...


class Life(NamedTuple):
    """The times of an entry that is renewed before it expires, or served afterwards.

    Attributes:
        born: Clock reading at which it was stored.
        expiry: Clock reading at which it expires.
        keep: Clock reading until which a store should keep it.
    """

    born: float
    expiry: float
    keep: float


class Entry:
    """One stored result.

    Attributes:
        value: The result, or what `copier` makes it from.
        expires: Clock reading from which the stage must judge it: that of its expiry, or earlier if
            it is to be renewed before. `math.inf` for never.
        life: Further times; None for an entry that has none but its expiry.
        copier: Gives each caller a copy of its own; None where the value is immutable and can be
            shared.
        weight: Estimated bytes.
        group: What the entry must not outlive: the token of the instance it belongs to.
        visited: Whether it was hit since eviction last looked at it. Set without a lock: a lost
            update costs one place in the queue.
    """

    __slots__ = ("copier", "expires", "group", "life", "value", "visited", "weight")

    def __init__(
        self,
        value: Any,
        expires: float = math.inf,
        copier: Copier | None = None,
        weight: int = 0,
        group: int | None = None,
        life: Life | None = None,
    ) -> None:
        self.value: Any = value
        self.expires: float = expires
        self.copier: Copier | None = copier
        self.weight: int = weight
        self.group: int | None = group
        self.life: Life | None = life
        self.visited: bool = False

    @property
    def expiry(self) -> float:
        """Clock reading at which it expires."""
        return self.expires if self.life is None else self.life.expiry

    @property
    def keep(self) -> float:
        """Clock reading until which a store should keep it: later than its expiry if it may be served stale."""
        return self.expires if self.life is None else self.life.keep

    def open(self) -> Any:
        """Return the result, isolated from what is stored."""
        return self.value if self.copier is None else self.copier(self.value)


class EntryStore(Protocol):
    """What the cache stage asks of a store: entries by key.

    Three outcomes are kept apart: an entry (perhaps expired: the stage judges), None for "not
    there", and an exception for "the store failed".
    """

    name: str
    """Its name in `info()` and `explain()`."""

    blocking: bool
    """Whether finding and putting may take so long that an event loop must not wait for it."""

    lends: bool
    """Whether it lends leases, so that of several processes one computes."""

    def find(self, key: Any, /) -> Entry | None:
        """Return the entry of `key`, even if it has expired."""
        ...

    def put(self, key: Any, entry: Entry) -> bool:
        """Store an entry in place of any other; False if it is too heavy."""
        ...

    def discard(self, key: Any, entry: Entry) -> None:
        """Remove `key` if it still holds this very entry."""
        ...

    def delete(self, key: Any) -> bool:
        """Remove `key` and return whether it was there."""
        ...

    def clear(self) -> int:
        """Remove everything of the function and return how much, as far as the store knows."""
        ...

    def measure(self) -> tuple[int | None, int | None]:
        """Return the number of entries and their bytes, None where the store does not know."""
        ...


class MemoryStore:
    """Entries in this process, bounded by number and by weight.

    Writes take a lock, `entries.get` does not. The lock is reentrant, because any allocation may
    run a destructor that uses the store again. Dropped values die after the lock is released: their
    destructors may want locks of their own.

    Args:
        maxsize: Most entries.
        max_bytes: Most bytes of all entries together.

    Example:
        >>> store = MemoryStore(maxsize=2)
        >>> for n in range(3):
        ...     _ = store.put(n, Entry(n * n))
        >>> [key for key in range(3) if store.find(key)]
        [1, 2]
    """

    name = "memory"
    blocking = False
    lends = False

    def __init__(self, maxsize: int = 10_000, max_bytes: int = 256_000_000) -> None:
        self.maxsize = maxsize
        self.max_bytes = max_bytes
        self.entries: dict[Hashable, Entry] = {}
        """Never replaced, so that its `get` can be kept."""
        self.weight: int = 0
        self.find: Callable[[Any], Entry | None] = self.entries.get
        self._groups: dict[int, set[Hashable]] = {}
        self._earliest = math.inf  # no entry expires before that
        self._lock = RLock()
        reset_after_fork(self)

    def put(self, key: Hashable, entry: Entry) -> bool:
        """Store an entry in place of any other under its key.

        Returns:
            False if it is heavier than the whole store may be; then the old entry is gone, too.
        """
        entries, weight, expires, lock = self.entries, entry.weight, entry.expires, self._lock
        dropped: list[Entry] = []
        # Half the cost of `with`, and every miss comes along here; within `try`, so that Ctrl-C cannot come in between.
        try:
            lock.acquire()
            if len(entries) >= self.maxsize or self.weight + weight > self.max_bytes:
                if key in entries:
                    self._drop(key, dropped)
                if weight > self.max_bytes:
                    return False
                self._make_room(weight, dropped)
            if entries.setdefault(key, entry) is not entry:  # one search for most keys
                self._drop(key, dropped)
                entries[key] = entry
            self.weight += weight
            if entry.group is not None:
                self._groups.setdefault(entry.group, set()).add(key)
            if expires < self._earliest:
                self._earliest = expires
        finally:
            try:  # `suppress` costs as much as the lock
                lock.release()
            except RuntimeError:
                pass  # Ctrl-C, while another thread had it
        return True

    def discard(self, key: Hashable, entry: Entry) -> None:
        """Remove `key` if it still holds this very entry."""
        dropped: list[Entry] = []
        with self._lock:
            if self.entries.get(key) is entry:
                self._drop(key, dropped)

    def delete(self, key: Hashable) -> bool:
        """Remove `key` and return whether it was there."""
        dropped: list[Entry] = []
        with self._lock:
            self._drop(key, dropped)
        return bool(dropped)

    def drop_group(self, group: int) -> int:
        """Remove the entries of one group and return how many there were."""
        dropped: list[Entry] = []
        with self._lock:
            for key in self._groups.pop(group, ()):
                self._drop(key, dropped)
        return len(dropped)

    def clear(self) -> int:
        """Remove everything and return how many entries there were."""
        with self._lock:
            dropped = list(self.entries.values())
            self.entries.clear()
            self._groups.clear()
            self._earliest = math.inf
            self.weight = 0
        return len(dropped)

    def measure(self) -> tuple[int, int]:
        """Return the number of entries and their estimated bytes."""
        return len(self.entries), self.weight

    def after_fork(self) -> None:
        """Replace the lock: the thread that held it may not exist in a forked child."""
        self._lock = RLock()

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        return f"<MemoryStore: {len(self)} of {self.maxsize} entries, {self.weight} bytes>"

    # --- under the lock ---------------------------------------------------------------------------

    def _drop(self, key: Hashable, dropped: list[Entry]) -> None:
        entry = self.entries.pop(key, None)
        if entry is not None:
            self._forget(key, entry, dropped)

    def _forget(self, key: Hashable, entry: Entry, dropped: list[Entry]) -> None:
        dropped.append(entry)
        self.weight -= entry.weight
        if entry.group is not None:
            members = self._groups.get(entry.group)
            if members is not None:
                members.discard(key)
                if not members:
                    del self._groups[entry.group]

    def _make_room(self, weight: int, dropped: list[Entry]) -> None:
        """Evict until one more entry fits, and some more: the expired ones, then the oldest without a hit.

        Some more, because the way to the oldest entry leads past the places of those that were evicted before.
        """
        entries, now = self.entries, ambient.clock().monotonic()
        most = self.maxsize - self.maxsize // _SHARE
        heaviest = self.max_bytes - self.max_bytes // _SHARE - weight
        expired: list[Hashable] = []
        if self._earliest <= now:
            expired = [key for key, e in reversed(entries.items()) if e.expires <= now]
            if not expired:  # those that would have been first have left
                self._earliest = min((e.expires for e in entries.values()), default=math.inf)
        oldest: Iterator[Hashable] = iter(())
        while entries and (len(entries) >= most or self.weight > heaviest):
            key = expired.pop() if expired else next(oldest, None)
            entry = entries.pop(key, None)
            if entry is None:
                oldest = iter(list(islice(entries, _SHARE)))
            elif entry.visited and entry.expires > now:
                entry.visited = False
                entries[key] = entry
            else:
                self._forget(key, entry, dropped)


# --- weights --------------------------------------------------------------------------------------

_BUDGET: Final = 1000
_SAMPLE: Final = 64
_DEPTH: Final = 20
_UNKNOWN: Final = 64


def weigh(value: Any) -> int:
    """Estimate the memory that a value takes, in bytes.

    At most a thousand objects are looked at: of a large container a sample stands for the rest.
    Arrays and data frames are asked for their own count. Objects that occur twice are counted
    twice.

    Args:
        value: Anything.

    Returns:
        Bytes, 1 or more.

    Example:
        >>> 1_000_000 < weigh([bytes(1000)] * 1000) < 1_100_000
        True
    """
    return max(1, int(_weigh(value, [_BUDGET], 0)))


def _weigh(value: Any, budget: list[int], depth: int) -> float:
    budget[0] -= 1
    kind = type(value)
    size = float(_asked(getsizeof, value, _UNKNOWN))
    if budget[0] < 0 or depth > _DEPTH or kind in (str, bytes, int, float, bool, type(None)):
        return size
    share = 1.0
    if isinstance(value, dict | list | tuple | set | frozenset):
        if isinstance(value, list | tuple):
            parts = list(value[:: len(value) // _SAMPLE + 1])
        else:
            parts = list(islice(value.items() if isinstance(value, dict) else value, _SAMPLE))
        share = len(value) / max(1, len(parts))
        if isinstance(value, dict):
            parts = [part for pair in parts for part in pair]
    elif kind.__module__ == "builtins":
        return size
    else:
        size, parts = max(size, _asked(_reported_size, value, 0)), _state(value)
    return size + sum(_weigh(part, budget, depth + 1) for part in parts) * share


def _asked(ask: Callable[[Any], int], value: Any, otherwise: int) -> int:
    try:
        return ask(value)
    except Exception:  # noqa: BLE001 - a class may compute its size wrongly
        return otherwise


def _reported_size(value: Any) -> int:
    """Return the size that arrays (`nbytes`) and data frames (`memory_usage`) report."""
    usage: Any = getattr(value, "memory_usage", None)
    if callable(usage):
        used: Any = usage(deep=True)
        return int(used.sum()) if hasattr(used, "sum") else int(used)
    size = getattr(value, "nbytes", 0)
    return size if isinstance(size, int) else 0


def _state(value: Any) -> list[Any]:
    """Return what an ordinary object holds in its dict and slots; arrays have reported it already."""
    kind = type(value)
    if hasattr(kind, "nbytes") or hasattr(kind, "memory_usage"):
        return []
    held = list(getattr(value, "__dict__", {}).values())
    slots = getattr(kind, "__slots__", ())
    names = (slots,) if isinstance(slots, str) else slots
    return held + [getattr(value, name) for name in names if hasattr(value, name)]
