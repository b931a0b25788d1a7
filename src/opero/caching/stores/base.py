# this_file: src/opero/caching/stores/base.py
"""Keep the entries of one function in a store that functions share, and open each such store once.

A `ByteStore` (disk, redis) keeps bytes by key and grants leases. It knows nothing of values, of expiry in
opero's sense, of functions or of listeners. It keeps three outcomes apart: bytes, None for "not there",
and a `StoreError` for "the backend failed". `CodedStore`, in front of it, encodes each entry in an envelope:

    mark  version  stored  expires  value as the codec wrote it

So None is a value like any other, and what the store should have dropped is not served. Times are
seconds since the epoch, because processes and machines share them. The codec's check or signature
covers all of it and the key, so that nothing can be cut off, changed or put under another key.

Keys are text, `namespace:function:digest`. What begins with `~` is kept beside the entries, and is no entry. A
text such as "disk:~/answers" becomes an open store here: one for each place and process, whatever function uses it,
closed when the last one is gone. `UserStore` stands in front of a user's own object.
"""

from __future__ import annotations

import atexit
import functools
import math
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Protocol
from weakref import WeakValueDictionary

from opero.caching.copying import ATOMS, Uncopyable, freeze, isolated
from opero.caching.memory import Entry, Life, Store
from opero.caching.plain_types import Undecodable, Unencodable
from opero.errors import OperoUsageError, StoreError
from opero.utils import ambient
from opero.utils.ambient import switch
from opero.utils.checks import BACKENDS, backend_of
from opero.utils.fork import run_after_fork
from opero.utils.lazy import NamedTuple

if TYPE_CHECKING:
    from opero.caching.codec import Codec, Coder


class StoredItem(NamedTuple):
    """What a store knows of one entry without reading it.

    Attributes:
        key: Its whole key.
        size: Bytes of what is stored; 0 if that would be costly to know.
        expires: Seconds since the epoch at which the store itself drops it, None for never or unknown.
    """

    key: str
    size: int
    expires: float | None = None


KeyOwner = tuple[str, str]
"""The key of a lease, and its owner."""

Row = tuple[str, bytes, float | None]
"""The arguments of `ByteStore.set`."""


class ByteStore(Protocol):
    """Bytes by key, shared by threads and processes.

    Every verb may be called from any thread, and raises `StoreError` if the backend fails. It
    fails fast: a caller waits for a second at most, not for a minute of retries. One object serves
    a place in a process for as long as it runs, so that a backend which comes back is used again.

    A store that event loops need no thread for has coroutines too: `aget`, `aset_many` and `aacquire`.
    """

    @property
    def name(self) -> str:
        """Its name in `info()` and `explain()`: "disk"."""
        ...

    @property
    def blocking(self) -> bool:
        """Whether an event loop must not call it, but in a thread, or through its asynchronous verbs."""
        ...

    def allow(self, max_bytes: int) -> None:
        """Allow entries of so many bytes, and a place as large; both may be larger already."""
        ...

    def get(self, key: str) -> bytes | None:
        """Return what was stored last, None if there is nothing."""
        ...

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Do what `get` does for many keys, in as few trips as the backend can."""
        ...

    def set(self, key: str, blob: bytes, ttl: float | None) -> None:
        """Store bytes in place of any others, as a whole or not at all.

        Args:
            key: Where.
            blob: What, at least one byte, up to hundreds of megabytes.
            ttl: Seconds, more than 0, after which the store should drop it; None keeps it.
        """
        ...

    def set_many(self, rows: Sequence[Row]) -> None:
        """Do what `set` does for many keys, in as few trips as the backend can.

        Some may be stored, and others not, where it fails.
        """
        ...

    def delete(self, key: str) -> bool:
        """Remove one key and return whether it was there."""
        ...

    def clear(self, prefix: str) -> int:
        """Remove the keys that begin with exactly this text and return how many there were.

        No character of the prefix is a wildcard. The empty prefix removes everything of opero's,
        and nothing else.
        """
        ...

    def scan(self, prefix: str) -> Iterator[StoredItem]:
        """Iterate over the keys that begin with a text; what changes meanwhile may be missed."""
        ...

    def measure(self, prefix: str) -> tuple[int | None, int | None]:
        """Return number and bytes of those keys, None where it would be too costly to know."""
        ...

    def acquire(self, owners: Sequence[KeyOwner], seconds: float) -> list[bool]:
        """Take or extend the leases of keys, each on its own, in as few trips as the backend can.

        Leases lie beside the entries: they are neither found by `get` nor removed by `clear`.

        Args:
            owners: What is to be computed, and for each the owner: text that is unique across machines.
            seconds: After so long the leases end by themselves.

        Returns:
            For each, True if the owner has the lease now, False if another one does. Of several that ask for
            it at the same time exactly one gets it. A lease that would last longer than `LONGEST_LEASE`
            counts as free: opero grants none like that.
        """
        ...

    def release(self, owners: Sequence[KeyOwner]) -> None:
        """Give leases back; nothing happens where the owner does not hold one (any more)."""
        ...

    def close(self) -> None:
        """Close the connections; a later verb opens them again."""
        ...


LONGEST_LEASE: Final = 10.0
"""Seconds beyond which no lease of opero's lasts unless it is extended."""

_TOGETHER: Final = 1 << 18


def portions(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Cut what is to be stored so that no other writer waits for the store for long.

    Example:
        >>> [len(portion) for portion in portions([("key", bytes(100_000), None)] * 7)]
        [2, 2, 2, 1]
    """
    start = size = 0
    for end, (_, blob, _) in enumerate(rows):
        size += len(blob)
        if size > _TOGETHER and end > start:
            yield rows[start:end]
            start, size = end, len(blob)
    if start < len(rows):
        yield rows[start:]


# --- servers that do not answer ---------------------------------------------------------------------------------------

_LONGEST_PAUSE: Final = 15.0


class Backoff:
    """Refuse callers for a while after a server did not answer, so that a dead one costs next to nothing.

    While a pause lasts, callers are refused at once. When it is over, one of them tries; the others
    are refused until that has an outcome, or as long as the pause would be. No lock: two that try
    at the same moment do no harm.

    Attributes:
        failures: Failures in a row, 0 for a server that answers.

    Example:
        >>> backoff = Backoff()
        >>> backoff.failed("it is down")
        >>> backoff.failures
        1
        >>> backoff.over()
        >>> backoff.check()
    """

    def __init__(self) -> None:
        self.failures: int = 0
        self._until = 0.0
        self._why = ""

    @property
    def pause(self) -> float:
        """Seconds for which the server is not used after so many failures in a row."""
        return min(2.0 ** min(self.failures - 1, 10), _LONGEST_PAUSE)

    def check(self) -> None:
        """Raise while a pause lasts.

        Raises:
            StoreError: The pause lasts; the message says what the last failure was.
        """
        if not self.failures:
            return
        now = ambient.clock().monotonic()
        if now < self._until:
            raise StoreError(self._why)
        self._until = now + self.pause

    def failed(self, why: str) -> None:
        """Note a failure and begin a pause."""
        self.failures += 1
        self._why = why
        self._until = ambient.clock().monotonic() + self.pause

    def over(self) -> None:
        """End the pauses: the server has answered."""
        self.failures = 0


# --- open stores ------------------------------------------------------------------------------------------------------

_lock = threading.RLock()
_opened: Final[WeakValueDictionary[tuple[str, str], ByteStore]] = WeakValueDictionary()
"""The stores that this process has open and that are in use."""


def settle(text: str) -> str:
    """Return the text of a backend as it has to be remembered.

    Args:
        text: As given for `cache_backend`, but not "memory".

    Raises:
        OperoUsageError: It names no backend, or one that is not available.

    Example:
        >>> settle("disk:/var/cache/answers")
        'disk:/var/cache/answers'
    """
    settled: str = _module(text).settle(text)
    return settled


def open_store(text: str) -> ByteStore:
    """Return this process's store for a place.

    Nothing is created, connected or imported before the store's first verb.

    Args:
        text: As it came from `settle`. What it leaves open, like the folder of "disk", is looked up
            in the environment now.
    """
    module = _module(text)
    place = module.locate(text)
    with _lock:
        key = module.__name__, place
        store = _opened.get(key)
        if store is None:
            store = _opened[key] = module.open_at(place)
        return store


def open_stores() -> list[ByteStore]:
    """Return the stores that this process has open and in use."""
    with _lock:
        return list(_opened.values())


def _module(text: str) -> Any:
    backend_of("cache_backend", text)
    return import_module(BACKENDS[text.partition(":")[0]])


@atexit.register
def _close_all() -> None:
    for store in open_stores():
        store.close()


@run_after_fork
def _after_fork() -> None:
    global _lock  # noqa: PLW0603 - a lock that a vanished thread holds can only be replaced
    _lock = threading.RLock()


# --- the entries of one function --------------------------------------------------------------------------------------


def open_entries(
    backend: str | Store, prefix: Callable[[], str], max_bytes: int, codec: str | Codec
) -> CodedStore | UserStore:
    """Return the entries of a function in a store that functions share.

    Args:
        backend: Its text, which is not "memory", or a user's object.
        prefix: Returns what the keys of the function begin with.
        max_bytes: Most bytes of one entry; what the place as a whole may take is at least as much.
        codec: The option `cache_codec`; a user's object gets the values themselves.

    Raises:
        OperoUsageError: The text names no backend, or the object does not fit.
    """
    if isinstance(backend, str):
        text = settle(backend)
        if text.startswith("twat:"):
            engine: Any = open_store(text)
            return UserStore(engine, prefix, text)
        from opero.caching.codec import Coder

        coder = Coder(codec, shared=_module(text).ACROSS_HOSTS)
        return CodedStore(text, prefix=prefix, coder=coder, max_bytes=max_bytes)
    if any(kind.__module__.startswith("twat_cache.") for kind in type(backend).__mro__):
        return UserStore(import_module(BACKENDS["twat"]).open_engine(backend), prefix)
    return UserStore(backend, prefix)


_HEADER: Final = struct.Struct(">2sBdd")
_MARK: Final = b"op"
_VERSION: Final = 1
_HEADER_SIZE: Final = _HEADER.size


class CodedStore:
    """Entries by key in a `ByteStore`, encoded in envelopes.

    Args:
        text: The backend, as `settle` returned it. It is opened at the first lookup, because places may be named
            by the environment.
        prefix: Returns what the keys of the function begin with.
        coder: How values become bytes.
        max_bytes: Most bytes of one entry, and how large the place may become.

    Attributes:
        name: Name of the backend, "disk".
        text: As above.
    """

    blocking = True
    lends = True

    def __init__(
        self, text: str, *, prefix: Callable[[], str], coder: Coder, max_bytes: int
    ) -> None:
        self.name: str = backend_of("cache_backend", text)
        self.text = text
        self._prefix = prefix
        self._coder = coder
        self._max_bytes = max_bytes
        self._backend: ByteStore | None = None

    @property
    def backend(self) -> ByteStore:
        """The store behind."""
        store = self._backend
        if store is None:
            store = self._backend = open_store(self.text)
            store.allow(self._max_bytes)
        return store

    @property
    def native(self) -> bool:
        """Whether the store has verbs of its own for event loops."""
        return hasattr(self._backend or self.backend, "aget")

    # --- as the stage's store ---------------------------------------------------------------------

    def find(self, key: str) -> Entry | None:
        """Return the entry of `key`, even if it has expired."""
        blob = (self._backend or self.backend).get(key)
        return None if blob is None else self._entry(key, blob)

    def find_many(
        self, keys: Sequence[str], failed: Callable[[Exception], object]
    ) -> list[Entry | None]:
        """Find the entries of many keys in as few trips as the store can; `failed` gets what cannot be read."""
        entries: list[Entry | None] = []
        for key, blob in zip(keys, self.backend.get_many(keys), strict=True):
            try:
                entries.append(None if blob is None else self._entry(key, blob))
            except StoreError as error:
                failed(error)
                entries.append(None)
        return entries

    async def afind(self, key: str) -> Entry | None:
        """Do what `find` does with a store that is `native`."""
        store: Any = self._backend or self.backend
        blob = await store.aget(key)
        return None if blob is None else self._entry(key, blob)

    def put(self, key: str, entry: Entry) -> bool:
        """Store an entry that `entry` has made; False if it is too heavy."""
        row = self._row(key, entry)
        if row is not None:
            self.backend.set(*row)
        return entry.weight <= self._max_bytes

    def put_many(self, entries: Sequence[tuple[str, Entry]]) -> list[bool]:
        """Store entries that `entry` has made in as few trips as the store can; False for each that is too heavy."""
        rows = [self._row(key, entry) for key, entry in entries]
        self.backend.set_many([row for row in rows if row is not None])
        return [entry.weight <= self._max_bytes for _, entry in entries]

    async def aput_many(self, entries: Sequence[tuple[str, Entry]]) -> list[bool]:
        """Do the same with a store that is `native`."""
        store: Any = self.backend
        rows = [self._row(key, entry) for key, entry in entries]
        await store.aset_many([row for row in rows if row is not None])
        return [entry.weight <= self._max_bytes for _, entry in entries]

    def acquire(self, owners: Sequence[KeyOwner], seconds: float) -> list[bool]:
        """Take or extend leases, in as few trips as the store can."""
        return self.backend.acquire(owners, seconds)

    async def aacquire(self, owners: Sequence[KeyOwner], seconds: float) -> list[bool]:
        """Do the same without holding up the event loop."""
        store: Any = self.backend
        if self.native:
            granted: list[bool] = await store.aacquire(owners, seconds)
            return granted
        from asyncio import to_thread

        return await to_thread(self.acquire, owners, seconds)

    def entry(self, key: str, value: Any, ttl: float | None) -> Entry:
        """Return a result in the form in which it is stored: bytes, from which each caller gets a copy.

        Args:
            key: Its key.
            value: The result.
            ttl: Its lifetime in seconds, None for ever.

        Raises:
            Uncopyable: It can be used only once, or cannot be encoded.
        """
        if type(value) not in ATOMS:
            freeze(value, copy=False)  # refuses what can be used only once
        offset = time.time() - time.monotonic()  # as `ambient.wall_offset`
        now = ambient.clock().monotonic() if switch.on else time.monotonic()
        expires = math.inf if ttl is None else now + ttl
        header = _HEADER.pack(_MARK, _VERSION, now + offset, expires + offset)
        try:
            pieces = self._coder.encode(value, header + key.encode("utf-8", "surrogatepass"))
        except Unencodable as signal:
            raise Uncopyable(str(signal)) from None
        blob = b"".join((header, *pieces))
        return _CodedEntry(blob, expires, functools.partial(self._decoded, key))

    def discard(self, key: str, entry: Entry) -> None:
        """Remove nothing: what has expired is the store's business, and may be newer by now."""

    def delete(self, key: str) -> bool:
        """Remove `key` and return whether it was there."""
        return self.backend.delete(key)

    def clear(self) -> int:
        """Remove the function's entries and return how many there were."""
        return self.backend.clear(self._prefix())

    def measure(self) -> tuple[int | None, int | None]:
        """Return the number of the function's entries and their bytes."""
        return self.backend.measure(self._prefix())

    def __repr__(self) -> str:
        return f"<CodedStore {self.name}>"

    # --- bytes and entries ------------------------------------------------------------------------

    def _row(self, key: str, entry: Entry) -> Row | None:
        """Return what is stored of an entry; None if it is too heavy, or has expired."""
        keep = entry.expires if entry.life is None else entry.life.keep
        now = ambient.clock().monotonic() if switch.on else time.monotonic()
        ttl = None if keep == math.inf else keep - now
        stored = entry.weight <= self._max_bytes and (ttl is None or ttl > 0)
        return (key, entry.value, ttl) if stored else None

    def _entry(self, key: str, blob: bytes) -> Entry:
        """Return the entry in an envelope.

        Raises:
            StoreError: It is none, or not the one that was stored under this key.
        """
        if len(blob) < _HEADER_SIZE:
            raise StoreError("an entry cannot be read: it is cut short")
        mark, version, stored, expires = _HEADER.unpack_from(blob)
        if mark != _MARK or version != _VERSION or math.isnan(expires):
            raise StoreError("an entry cannot be read: it is not of this version of opero")
        try:
            value = self._decoded(key, blob)
        except Undecodable as signal:
            raise StoreError(f"an entry cannot be read: {signal}") from None
        offset = time.time() - time.monotonic()
        expiry = expires - offset
        life = Life(stored - offset, expiry, expiry)
        return _CodedEntry(blob, expiry, functools.partial(self._decoded, key), life, value)

    def _decoded(self, key: str, blob: bytes) -> Any:
        context = blob[:_HEADER_SIZE] + key.encode("utf-8", "surrogatepass")
        return self._coder.decode(memoryview(blob)[_HEADER_SIZE:], context)


class _CodedEntry(Entry):
    """An entry in bytes. If it was read, the first caller gets the value that was decoded, others their own."""

    __slots__ = ("_decoded",)

    def __init__(
        self,
        blob: bytes,
        expiry: float,
        copier: Callable[[Any], Any],
        life: Life | None = None,
        *decoded: Any,
    ) -> None:
        # All that `Entry` sets, without another call: one for each hit and each miss.
        self.value = blob
        self.expires = expiry
        self.copier = copier
        self.weight = len(blob)
        self.group = None
        self.visited = False
        self.life = life
        self._decoded = list(decoded)

    def open(self) -> Any:
        """Return the result; of several callers at once, one gets the value that is there already."""
        try:
            return self._decoded.pop()
        except IndexError:
            return super().open()


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
        import inspect

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
        self._by_prefix = False
        with suppress(TypeError, ValueError):  # written in C
            self._by_prefix = "prefix" in inspect.signature(store.clear).parameters

    def find(self, key: Any) -> Entry | None:
        """Return the entry of `key`, even if it has expired."""
        held = self._store.get(key)
        if not (isinstance(held, tuple | list) and len(held) in (2, 3)):
            return None
        value, until, *born = held
        if until is None:
            return Entry(value, copier=isolated)
        if not all(isinstance(at, int | float) for at in (until, *born)):
            return None
        offset = ambient.wall_offset()
        expiry = until - offset
        life = Life(born[0] - offset, expiry, expiry) if born else None
        return Entry(value, expiry, isolated, life=life)

    def put(self, key: Any, entry: Entry) -> bool:
        """Store an entry in place of any other."""
        if entry.expiry == math.inf:
            self._store.set(key, (entry.open(), None), None)
            return True
        now = ambient.clock().monotonic()
        offset = ambient.wall_offset()
        born = () if entry.life is None else (entry.life.born + offset,)
        held = (entry.open(), entry.expiry + offset, *born)
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
        removed = clear(prefix=self._prefix()) if self._by_prefix else clear()
        return removed if isinstance(removed, int) else 0

    def measure(self) -> tuple[int | None, int | None]:
        """Return the number of entries in the whole store if it has a length, and no bytes."""
        size: Any = getattr(self._store, "__len__", None)
        count: Any = size() if callable(size) else None
        return count, None
