# this_file: src/opero/caching/stores/disk.py
"""`cache_backend="disk"`: a folder that survives restarts and is shared by processes."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from opero.caching.stores.folder import default_folder, prepare_folder
from opero.caching.stores.protocol import Item, StoreError, portions
from opero.caching.stores.rest import Rest
from opero.errors import OperoWarning
from opero.utils.stack import users_stacklevel

if TYPE_CHECKING:
    from opero.caching.stores.database import DiskEngine
    from opero.caching.stores.protocol import Claim, Row

__all__ = ["DiskStore", "locate", "open_at", "settle"]

ACROSS_HOSTS: Final = False

_PATIENCE: Final = 1.0
"""Seconds that a writer waits for others. Readers never wait."""

_MAX_BYTES: Final = 256_000_000


def settle(text: str) -> str:
    """Return "disk", or "disk:" and an absolute path."""
    path = text.partition(":")[2]
    return f"disk:{Path(path).expanduser().absolute()}" if path else "disk"


def locate(text: str) -> str:
    """Return the path of the folder."""
    return text.partition(":")[2] or str(default_folder())


def open_at(place: str) -> DiskStore:
    """Return the store of a folder."""
    return DiskStore(Path(place))


class DiskStore:
    """Bytes in a folder, in SQLite and, if they are large, in files.

    The folder is made when it is first needed. It holds at most `max_bytes`, the largest number that
    any function using it has asked for; then what was stored first goes first.

    Args:
        folder: Absolute path.

    Example:
        >>> import tempfile
        >>> store = DiskStore(Path(tempfile.mkdtemp()) / "cache")
        >>> store.set("key", b"value", ttl=60)
        >>> store.get("key"), store.get("other"), store.clear("k"), store.get("key")
        (b'value', None, 1, None)
        >>> store.close()
    """

    name = "disk"
    blocking = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.max_bytes: int | None = None
        self._engine: DiskEngine | None = None
        self._lock = threading.RLock()
        self._rest = Rest()
        self._warned = False

    def allow(self, max_bytes: int) -> None:
        """Let the folder hold so many bytes; it may hold more already."""
        with self._lock:
            self.max_bytes = max(max_bytes, self.max_bytes or 0)
            if self._engine is not None:
                self._do(self._engine.allow, self.max_bytes)

    def get(self, key: str) -> bytes | None:
        """Return what was stored last, None if there is nothing."""
        engine = self._engine or self._open()
        try:
            return engine.fetch(key)
        except Exception as error:
            raise _told(error) from error

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Do what `get` does for many keys."""
        engine = self._engine or self._open()
        try:
            return [engine.fetch(key) for key in keys]
        except Exception as error:
            raise _told(error) from error

    def set(self, key: str, blob: bytes, ttl: float | None) -> None:
        """Store bytes in place of any others."""
        self._write((self._engine or self._open()).store, key, blob, ttl)

    def set_many(self, rows: Sequence[Row]) -> None:
        """Store bytes under many keys."""
        for portion in portions(rows):
            self._write(self._opened.store_many, portion)

    def delete(self, key: str) -> bool:
        """Remove one key and tell whether it was there."""
        return bool(self._do(self._opened.delete, key))

    def clear(self, prefix: str) -> int:
        """Remove the keys that begin with a text and return how many there were."""
        return int(self._do(self._opened.clear_prefix, prefix))

    def scan(self, prefix: str) -> Iterator[Item]:
        """Iterate over the keys that begin with a text."""
        try:
            yield from self._opened.scan(prefix)
        except Exception as error:
            raise _told(error) from error

    def measure(self, prefix: str) -> tuple[int | None, int | None]:
        """Return number and bytes of those keys."""
        count, size = self._do(self._opened.measure, prefix)
        return count, size

    def claim(self, key: str, owner: str, seconds: float) -> bool:
        """Take or extend the lease of a key."""
        return bool(self._write(self._opened.claim_many, [(key, owner)], seconds)[0])

    def claim_many(self, claims: Sequence[Claim], seconds: float) -> list[bool]:
        """Take or extend many leases."""
        return list(self._write(self._opened.claim_many, claims, seconds))

    def release(self, key: str, owner: str) -> None:
        """Give a lease back."""
        self._write(self._opened.release_many, [(key, owner)])

    def release_many(self, claims: Sequence[Claim]) -> None:
        """Give many leases back."""
        self._write(self._opened.release_many, claims)

    def renew(self) -> None:
        """After a fork: let go of locks and connections that belong to the parent."""
        self._lock = threading.RLock()
        if self._engine is not None:
            self._engine.forsake()

    def close(self) -> None:
        """Close the connections of all threads; a later verb opens the folder again."""
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.cleanup()

    def __repr__(self) -> str:
        return f"<DiskStore {self.folder}>"

    @property
    def _opened(self) -> DiskEngine:
        return self._engine or self._open()

    def _open(self) -> DiskEngine:
        with self._lock:
            if self._engine is None:
                self._prepare()
                from opero.caching.stores.database import DiskEngine

                try:
                    engine = DiskEngine(self.folder, self.max_bytes or _MAX_BYTES, _PATIENCE)
                    engine.allow(self.max_bytes or 0)
                except Exception as error:
                    raise _told(error) from error
                self._engine = engine
            return self._engine

    def _prepare(self) -> None:
        try:
            prepare_folder(self.folder)
        except StoreError as error:
            # Whoever asked for a disk cache shall not pay for each call without knowing why.
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"There is no disk cache: {error}.", OperoWarning, stacklevel=users_stacklevel()
                )
            raise

    def _write(self, verb: Any, *arguments: object) -> Any:
        """Do what each call does, without waiting for a lock for as long each time."""
        # A writer that was stopped while it wrote must not cost every call as much as the first.
        if self._rest.failures:
            self._rest.check()
        try:
            answer = verb(*arguments)
        except Exception as error:
            told = _told(error)
            if told.args == (_BUSY,):
                self._rest.failed(_BUSY)
            raise told from error
        if self._rest.failures:
            self._rest.over()
        return answer

    def _do(self, verb: Any, *arguments: object) -> Any:
        try:
            return verb(*arguments)
        except Exception as error:
            raise _told(error) from error


_BUSY: Final = "other processes keep its folder locked"


def _told(error: Exception) -> StoreError:
    """Return a failure in the words of the protocol."""
    if isinstance(error, StoreError):
        return error
    from sqlite3 import OperationalError

    from opero.caching.stores.database import Timeout

    text = str(error)
    if isinstance(error, Timeout) or (isinstance(error, OperationalError) and "locked" in text):
        return StoreError(_BUSY)
    # What SQLite says of itself holds no data: "database disk image is malformed".
    known = type(error).__module__ == "sqlite3"
    return StoreError(f"{text or type(error).__name__}" if known else type(error).__name__)
