# this_file: src/opero/limits/keyed.py
"""Keep one bucket for each key: an API key, a host, a tenant."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Final

from opero.errors import OperoUsageError, warn_user
from opero.limits.reservation import name_of
from opero.utils.async_utils import is_async_function

__all__ = ["Buckets"]

_MOST: Final = 10_000
"""Buckets that are kept; as many keys within one period are no keys any more, but requests."""
_SWEEP_FROM: Final = 64


class Buckets:
    """The limiters of single keys.

    A bucket in which nothing is remembered that still counts is dropped. Keys may be secrets: they are never shown,
    and only a keyed hash of them stands in the names of files.

    Args:
        key: Callable of the call's arguments that returns the key.
        make: Makes the bucket of a new key.

    Attributes:
        join: Lets a bucket use the file with the given ending; None as long as no process shares the buckets.
    """

    def __init__(self, key: Any, make: Callable[[], Any]) -> None:
        if not callable(key) or is_async_function(key):
            raise OperoUsageError(f"key={key!r} must be a plain function of the call's arguments.")
        self._key: Callable[..., Any] = key
        self._make = make
        self.join: Callable[[Any, str], None] | None = None
        self._secret = b""
        self._buckets: OrderedDict[Hashable, Any] = OrderedDict()
        self._all: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()
        self._sweep_at = _SWEEP_FROM
        self._lock = threading.RLock()

    def of_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the bucket that a call with these arguments belongs to.

        Raises:
            OperoUsageError: `key` raised, or returned what cannot be a key.
        """
        try:
            key = self._key(*args, **kwargs)
        except Exception as error:
            raise OperoUsageError(
                f"key={name_of(self._key)} raised {type(error).__name__}. It gets the call's "
                "arguments and returns what has a bucket of its own."
            ) from error
        return self.of_key(key)

    def of_key(self, key: object) -> Any:
        """Return the bucket of a key.

        Raises:
            OperoUsageError: The key has no content.
        """
        from opero.caching.keys import Unkeyable, fast_part

        try:
            part = fast_part(key)
        except Unkeyable as signal:
            raise OperoUsageError(f"a value that cannot be a limiter's key: {signal}.") from None
        with self._lock:
            found = self._buckets.get(part)
            if found is not None:
                self._buckets.move_to_end(part)
                return found
            # One that was dropped may still be in use.
            found = self._all.get(part)
            if found is None:
                found = self._make()
                self._join(part, found)
                self._all[part] = found
            self._drop_idle()
            self._buckets[part] = found
            return found

    def _drop_idle(self) -> None:
        if len(self._buckets) < self._sweep_at:
            return
        for part in [part for part, bucket in self._buckets.items() if bucket.idle]:
            del self._buckets[part]
        if len(self._buckets) >= _MOST:
            self._buckets.popitem(last=False)
            warn_user(
                f"a limiter has more than {_MOST:,} keys in use at once; the bucket that was not "
                "used for the longest time is forgotten"
            )
        self._sweep_at = min(_MOST, max(_SWEEP_FROM, 2 * len(self._buckets)))

    def all(self) -> list[Any]:
        """Return the buckets that are remembered."""
        with self._lock:
            return list(self._buckets.values())

    def share(self, secret: bytes, join: Callable[[Any, str], None]) -> None:
        """Share all buckets with other processes from now on.

        Args:
            secret: Keys the hashes in the names of files, so that likely keys cannot be tried out without it.
            join: See the attribute.
        """
        with self._lock:
            self._secret, self.join = secret[:64], join
            for part, bucket in list(self._all.items()):
                self._join(part, bucket)

    def _join(self, part: Hashable, bucket: Any) -> None:
        if self.join is None:
            return
        from hashlib import blake2b

        from opero.caching.keys import encode

        code = blake2b(encode(part), key=self._secret, digest_size=16).hexdigest()
        self.join(bucket, code)

    def after_fork(self) -> None:
        """Replace a lock that another thread of the parent may have held."""
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._buckets)
