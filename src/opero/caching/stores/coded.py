# this_file: src/opero/caching/stores/coded.py
"""Keep the entries of one function in a store of bytes: each encoded, in an envelope.

    mark  version  stored  expires  value as the codec wrote it

So None is a value like any other, and what the store should have dropped is not served. Times are
seconds since the epoch, because processes and machines share them. The codec's check or signature
covers all of it and the key, so that nothing can be cut off, changed or put under another key.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from opero.caching.copying import Uncopyable, freeze
from opero.caching.memory import Entry, Life
from opero.caching.plain_types import Undecodable, Unencodable
from opero.caching.stores.base import AsyncByteStore, StoreError, awaitable
from opero.utils import ambient
from opero.utils.checks import backend_of

if TYPE_CHECKING:
    from opero.caching.codec import Coder
    from opero.caching.stores.base import ByteStore

__all__ = ["CodedStore"]

_HEADER: Final = struct.Struct(">2sBdd")
_MARK: Final = b"op"
_VERSION: Final = 1
_HEADER_SIZE: Final = _HEADER.size


class CodedStore:
    """Entries by key in a `ByteStore`, encoded in envelopes.

    Args:
        text: The backend, as `settle` returned it.
        open_store: Returns the store; called at the first lookup, because places may be named by the
            environment.
        prefix: Gives what the keys of the function begin with.
        coder: How values become bytes.
        max_bytes: Most bytes of one entry, and how large the place may become.

    Attributes:
        name: Name of the backend, "disk".
        text: As above.
    """

    blocking = True
    lends = True

    def __init__(
        self,
        text: str,
        open_store: Callable[[], ByteStore],
        *,
        prefix: Callable[[], str],
        coder: Coder,
        max_bytes: int,
    ) -> None:
        self.name: str = backend_of("cache_backend", text)
        self.text = text
        self._open_store = open_store
        self._prefix = prefix
        self._coder = coder
        self._max_bytes = max_bytes
        self._backend: ByteStore | None = None
        self._abackend: AsyncByteStore | None = None
        self._native: bool | None = None

    @property
    def backend(self) -> ByteStore:
        """The store behind."""
        store = self._backend
        if store is None:
            store = self._open_store()
            allow = getattr(store, "allow", None)
            if allow is not None:
                allow(self._max_bytes)
            self._backend = store
        return store

    @property
    def abackend(self) -> AsyncByteStore:
        """The store behind, for event loops."""
        store = self._abackend
        if store is None:
            store = self._abackend = awaitable(self.backend)
        return store

    @property
    def native(self) -> bool:
        """Whether the store has verbs of its own for event loops."""
        found = self._native
        if found is None:
            found = self._native = isinstance(self.backend, AsyncByteStore)
        return found

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
        """Do the same for an event loop."""
        blob = await self.abackend.aget(key)
        return None if blob is None else self._entry(key, blob)

    def put(self, key: str, entry: Entry) -> bool:
        """Store an entry that `entry` has made; False if it is too heavy."""
        blob, ttl = _stored(entry)
        if len(blob) > self._max_bytes:
            return False
        if ttl is None or ttl > 0:
            self.backend.set(key, blob, ttl)
        return True

    def put_many(self, entries: Sequence[tuple[str, Entry]]) -> list[bool]:
        """Store entries that `entry` has made in as few trips as the store can; False for each that is too heavy."""
        fits: list[bool] = []
        rows: list[tuple[str, bytes, float | None]] = []
        for key, entry in entries:
            blob, ttl = _stored(entry)
            fits.append(len(blob) <= self._max_bytes)
            if fits[-1] and (ttl is None or ttl > 0):
                rows.append((key, blob, ttl))
        if rows:
            self.backend.set_many(rows)
        return fits

    async def aput(self, key: str, entry: Entry) -> bool:
        """Do the same for an event loop."""
        blob, ttl = _stored(entry)
        if len(blob) > self._max_bytes:
            return False
        if ttl is None or ttl > 0:
            await self.abackend.aset(key, blob, ttl)
        return True

    def entry(self, key: str, value: Any, expires: float) -> Entry:
        """Return a result in the form in which it is stored: bytes, from which each caller gets a copy.

        Args:
            key: Its key.
            value: The result.
            expires: Clock reading at which it expires, `math.inf` for never.

        Raises:
            Uncopyable: It can be used only once, or cannot be encoded.
        """
        freeze(value, copy=False)  # refuses what can be used only once
        offset = ambient.wall_offset()
        stored = ambient.clock().monotonic() + offset
        header = _HEADER.pack(_MARK, _VERSION, stored, expires + offset)
        try:
            pieces = self._coder.encode(value, header + key.encode("utf-8", "surrogatepass"))
        except Unencodable as signal:
            raise Uncopyable(str(signal)) from None
        blob = b"".join((header, *pieces))
        return Entry(blob, expires, functools.partial(self._decoded, key), len(blob))

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

    def _entry(self, key: str, blob: bytes) -> Entry:
        """Return the entry in an envelope.

        Raises:
            StoreError: It is none, or not the one that was stored under this key.
        """
        header = blob[:_HEADER_SIZE]
        if len(header) < _HEADER_SIZE:
            raise StoreError("an entry cannot be read: it is cut short")
        mark, version, stored, expires = _HEADER.unpack(header)
        if mark != _MARK or version != _VERSION or math.isnan(expires):
            raise StoreError("an entry cannot be read: it is not of this version of opero")
        try:
            value = self._decoded(key, blob)
        except Undecodable as signal:
            raise StoreError(f"an entry cannot be read: {signal}") from None
        offset = ambient.wall_offset()
        return _ReadEntry(
            value, stored - offset, expires - offset, functools.partial(self._decoded, key), blob
        )

    def _decoded(self, key: str, blob: bytes) -> Any:
        context = blob[:_HEADER_SIZE] + key.encode("utf-8", "surrogatepass")
        return self._coder.decode(memoryview(blob)[_HEADER_SIZE:], context)


def _stored(entry: Entry) -> tuple[bytes, float | None]:
    """Return what is stored of an entry, and for how long."""
    never = entry.keep == math.inf
    return entry.value, None if never else entry.keep - ambient.clock().monotonic()


class _ReadEntry(Entry):
    """An entry that was read: the first caller gets the value that was decoded, others their own."""

    __slots__ = ("_decoded", "life")

    def __init__(
        self, value: Any, stored: float, expiry: float, copier: Callable[[Any], Any], blob: bytes
    ) -> None:
        # All that `Entry` sets, without another call: one for each hit.
        self.value = blob
        self.expires = expiry
        self.copier = copier
        self.weight = len(blob)
        self.group = None
        self.visited = False
        self.life: Life | None = Life(stored, expiry, expiry)
        self._decoded = [value]

    def open(self) -> Any:
        """Return the result; of several callers at once, one gets the value that is there already."""
        try:
            return self._decoded.pop()
        except IndexError:
            return super().open()
