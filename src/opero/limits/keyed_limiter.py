# this_file: src/opero/limits/keyed_limiter.py
"""A limiter with one bucket for each key: an API key, a host, a tenant."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, Final, NoReturn

from opero.caching.keys import Unkeyable, encode, fast_part
from opero.errors import OperoUsageError, OperoWarning
from opero.limits.limiter import RateLimiter
from opero.limits.pace import Quota
from opero.utils import ambient
from opero.utils.async_utils import is_async_function
from opero.utils.stack import users_stacklevel

if TYPE_CHECKING:
    from opero.limits.reservation import Reservation
    from opero.limits.waiting_room import Patience
    from opero.utils.units import Duration

__all__ = ["KeyedLimiter"]

_MOST: Final = 10_000
"""Buckets that are kept; as many keys within one period are no keys any more, but requests."""
_SWEEP_FROM: Final = 64


class KeyedLimiter(RateLimiter):
    """A `RateLimiter` with `key`: `RateLimiter(...)` makes one.

    A bucket in which nothing is remembered that still counts is dropped. Keys may be secrets:
    they are never shown, and only a keyed hash of them stands in the names of files.
    """

    direct = False
    measured = True

    def __init__(self, rate: Any = None, *, key: Any, **options: Any) -> None:
        if not callable(key) or is_async_function(key):
            raise OperoUsageError(f"key={key!r} must be a plain function of the call's arguments.")
        self._key = key
        name = options.pop("name", None)
        # What is wrong with a bucket shows now, and not in the first call.
        self._like = RateLimiter(rate, **options)
        self._options = options
        self.settles = self._like.settles
        self._buckets: OrderedDict[Hashable, RateLimiter] = OrderedDict()
        self._all: weakref.WeakValueDictionary[Hashable, RateLimiter] = (
            weakref.WeakValueDictionary()
        )
        self._sweep_at = _SWEEP_FROM
        self._lock = threading.RLock()
        shape = {"burst": self._like.burst, **options, "key": key}
        # Its own slot limits nothing: its file shows other processes where the buckets are.
        self._begin(self._like.windows, Quota(1, 1), name, (rate, shape))

    # --- buckets ----------------------------------------------------------------------------------

    def bucket_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RateLimiter:
        """Return the bucket that a call with these arguments belongs to.

        Raises:
            OperoUsageError: `key` raised, or returned what cannot be a key.
        """
        try:
            key = self._key(*args, **kwargs)
        except Exception as error:
            named = getattr(self._key, "__qualname__", type(self._key).__qualname__)
            raise OperoUsageError(
                f"key={named} raised {type(error).__name__}. It gets the call's arguments and "
                "returns what has a bucket of its own."
            ) from error
        return self.bucket(key)

    def bucket(self, key: object) -> RateLimiter:
        """Return the bucket of a key, to use, pause or ask it by hand.

        Args:
            key: Text, a number, or anything else with content.

        Raises:
            OperoUsageError: The key has no content.

        Example:
            >>> limiter = RateLimiter("1/hour", key=lambda host: host)
            >>> limiter.bucket("a.example").try_acquire()
            True
            >>> limiter.bucket("a.example").try_acquire()
            False
            >>> limiter.bucket("b.example").try_acquire()
            True
        """
        try:
            part = fast_part(key)
        except Unkeyable as signal:
            raise OperoUsageError(f"a value that cannot be a limiter's key: {signal}.") from None
        with self._lock:
            found = self._buckets.get(part)
            if found is not None:
                self._buckets.move_to_end(part)
                return found
            # One that was dropped may still be in somebody's hands.
            found = self._all.get(part)
            if found is None:
                found = RateLimiter(self._made_from[0], **self._options)
                if self._path is not None:
                    self._join_bucket(part, found)
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
            warnings.warn(
                f"a limiter has more than {_MOST:,} keys in use at once; the bucket that was not "
                "used for the longest time is forgotten",
                OperoWarning,
                stacklevel=users_stacklevel(),
            )
        self._sweep_at = min(_MOST, max(_SWEEP_FROM, 2 * len(self._buckets)))

    def __len__(self) -> int:
        return len(self._buckets)

    def __bool__(self) -> bool:
        return True

    # --- several processes ------------------------------------------------------------------------

    def _move(self, path: str | None, *, create: bool = False) -> None:
        with self._lock:
            super()._move(path, create=create)
            if self._path is not None:
                for part, bucket in list(self._all.items()):
                    self._join_bucket(part, bucket)

    def _join_bucket(self, part: Hashable, bucket: RateLimiter) -> None:
        from hashlib import blake2b

        # Keyed, so that who sees the name of a file cannot try out likely keys without the secret.
        secret = (self.name or self.uid).encode()[:64]
        code = blake2b(encode(part), key=secret, digest_size=16).hexdigest()
        where = f"{self._path}-{code}"
        bucket._join(where, create=True)  # noqa: SLF001 - a bucket is a part of this limiter

    def _after_fork(self) -> None:
        self._lock = threading.RLock()
        super()._after_fork()

    # --- verbs that need a bucket -----------------------------------------------------------------

    def _which(self) -> NoReturn:
        raise OperoUsageError(
            "this limiter has one bucket for each key: say which, as in limiter.bucket(key).acquire()."
        )

    def acquire(self, timeout: Duration | None = None, *, cost: float | None = None) -> float:
        """Refuse: it takes a bucket."""
        if not ambient.disabled():
            self._which()
        return 0.0

    async def wait(
        self,
        timeout: Duration | None = None,  # noqa: ASYNC109 - as in `acquire`
        *,
        cost: float | None = None,
    ) -> float:
        """Refuse: it takes a bucket."""
        return self.acquire()

    def try_acquire(self, *, cost: float | None = None) -> bool:
        """Refuse: it takes a bucket."""
        self.acquire()
        return True

    def reserve_within(self, patience: Patience, cost: float | None = None) -> Reservation:
        """Refuse: it takes a bucket."""
        self._which()

    async def reserve_async_within(
        self, patience: Patience, cost: float | None = None
    ) -> Reservation:
        """Refuse: it takes a bucket."""
        self._which()

    def pause(self, seconds: Duration) -> bool:
        """Refuse: it takes a bucket."""
        self._which()

    def resume(self) -> None:
        """Refuse: it takes a bucket."""
        self._which()

    # --- telling ----------------------------------------------------------------------------------

    @property
    def spent(self) -> float:
        """Cost that was counted under the caps of all buckets that are remembered."""
        with self._lock:
            return sum(bucket.spent for bucket in self._buckets.values())

    @property
    def left(self) -> float:
        """Refuse: it takes a bucket."""
        self._which()

    def reset_spent(self) -> None:
        """Begin the caps of all buckets anew."""
        with self._lock:
            for bucket in self._buckets.values():
                bucket.reset_spent()

    def describe(self) -> str:
        """Tell the limit of each bucket and who shares it."""
        limit = self._like.describe().rpartition(", shared by ")[0]
        return f"{limit}, for each key by itself, shared by {self._by()}"

    def __repr__(self) -> str:
        count = len(self._buckets)
        return f"<RateLimiter {self.describe()}; {count} bucket{'s' * (count != 1)}>"
