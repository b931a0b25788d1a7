# this_file: src/opero/caching/keeper.py
"""Storing results: whether, for how long, and in what form."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from sys import getsizeof
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from opero.caching import awaiting
from opero.caching.handle import format_bytes
from opero.caching.isolate import ATOMS, Uncopyable, freeze
from opero.caching.memory import Entry
from opero.caching.weight import weigh
from opero.core.call import Receipt
from opero.errors import OperoWarning, StoreError
from opero.utils import ambient
from opero.utils.ambient import switch
from opero.utils.stack import users_stacklevel
from opero.utils.units import parse_seconds

if TYPE_CHECKING:
    from opero.caching.aging import Aging
    from opero.caching.flight import Flight
    from opero.caching.shelf import Shelf
    from opero.caching.skips import Skips
    from opero.core.call import Call
    from opero.core.options import Options

__all__ = ["Keeper", "Stored", "allowed_ttl"]

_ENTRY_BYTES: Final = 250
"""What an entry costs beside its value and the arguments in its key."""


def allowed_ttl(answer: object, ttl: float | None) -> float | None:
    """Translate the answer of `cache_if` into the lifetime of an entry.

    Args:
        answer: False, None or 0 refuse; a number or a duration shortens the lifetime; anything else
            true stores.
        ttl: The lifetime without it, None for ever.

    Returns:
        Seconds, 0 for "do not store", None for ever. Never more than `ttl`.

    Raises:
        OperoUsageError: The answer looks like a duration and is none.

    Example:
        >>> [allowed_ttl(answer, 3600) for answer in ("1m", 7200, True, None)]
        [60.0, 3600, 3600, 0]
    """
    if not answer:
        return 0
    if isinstance(answer, bool) or not isinstance(answer, int | float | str | timedelta):
        return ttl
    wanted = parse_seconds(answer, "cache_if")
    return wanted if ttl is None else min(wanted, ttl)


class Stored(NamedTuple):
    """What came of storing a result.

    Attributes:
        entry: It as it would be stored; None if it is not to be, or cannot be.
        error: Why it was not stored, if it failed.
        fits: Whether it is light enough.
    """

    entry: Entry | None
    error: Exception | None = None
    fits: bool = True


class Keeper:
    """Stores the results of one function.

    Args:
        shelf: Where to.
        options: Lifetime, condition, isolation.
        skips: Who hears of what is not stored.
        aging: The ages of the entries; None if nothing depends on them.

    Attributes:
        ttl: Lifetime of an entry in seconds, None for ever.
        condition: The option `cache_if`.
    """

    def __init__(
        self, shelf: Shelf, options: Options, skips: Skips, aging: Aging | None = None
    ) -> None:
        self._store = shelf.store
        self._of_instance = shelf.keying.of_instance
        self._copy = options.cache_copy
        self._skips = skips
        self._aging = aging
        make = getattr(shelf.store, "entry", None)
        self._make: Callable[[Any, Any, float | None], Entry] = (
            self.entry if make is None else lambda key, value, ttl: make(key, value, _expiry(ttl))
        )
        self.ttl: Final = (
            None if options.cache_ttl is None else parse_seconds(options.cache_ttl, "cache_ttl")
        )
        self.condition: Final[Callable[[Any, Receipt[Any]], object] | None] = options.cache_if

    def keep(self, call: Call, flight: Flight, value: Any, began: float) -> Entry | None:
        """Store a result if it may be stored; whatever happens here, the caller gets it."""
        if call.rejected:
            flight.barren = True
            return None
        entry = None
        try:
            ttl = self._lifetime(call, value, began)
            if ttl == 0:
                flight.barren = True
                return None
            entry = self.made(flight.key, value, ttl)
            if not (flight.void or self._store.put(flight.key, entry)):
                self._too_heavy(flight, entry)
        except Exception as error:  # noqa: BLE001 - the caller gets the result, come what may
            self._failed(flight, error)
        return entry

    async def akeep(self, call: Call, flight: Flight, value: Any, began: float) -> Entry | None:
        """Do the same without holding up the event loop."""
        if call.rejected:
            flight.barren = True
            return None
        try:
            ttl = self._lifetime(call, value, began)
            if ttl == 0:
                flight.barren = True
                return None
            entry, well = await awaiting.keep(
                self._store,
                flight.key,
                lambda: self.made(flight.key, value, ttl),
                unless=lambda: flight.void,
            )
            if not well:
                self._too_heavy(flight, entry)
            return entry
        except Exception as error:  # noqa: BLE001 - as above
            self._failed(flight, error)
        return None

    # --- for maps: many at once -------------------------------------------------------------------

    @property
    def many(self) -> bool:
        """Whether the store takes many results at once."""
        return hasattr(self._store, "put_many")

    def terms(self, call: Call, flight: Flight, value: Any, began: float) -> float | None:
        """Return for how long a result may be stored: 0 for not at all, None for ever."""
        ttl: float | None = 0
        try:
            if not call.rejected:
                ttl = self._lifetime(call, value, began)
        except Exception as error:  # noqa: BLE001 - as above
            self._failed(flight, error)
        if ttl == 0:
            flight.barren = True
        return ttl

    def store_many(self, wanted: Sequence[tuple[Flight, Any, float | None]]) -> list[Stored]:
        """Store results on their terms, in whatever thread; `heed` is told of each."""
        stored: list[Stored] = []
        entries: list[tuple[Any, Entry]] = []
        places: list[int] = []
        for place, (flight, value, ttl) in enumerate(wanted):
            entry = trouble = None
            try:
                if ttl != 0:
                    entry = self.made(flight.key, value, ttl)
                    if not flight.void:
                        entries.append((flight.key, entry))
                        places.append(place)
            except Exception as error:  # noqa: BLE001 - as above
                trouble = error
            stored.append(Stored(entry, trouble))
        store: Any = self._store
        try:
            fits: list[bool] = store.put_many(entries) if entries else []
        except Exception as error:  # noqa: BLE001 - as above
            for place in places:
                stored[place] = Stored(stored[place].entry, error)
        else:
            for place, well in zip(places, fits, strict=True):
                if not well:
                    stored[place] = Stored(stored[place].entry, fits=False)
        return stored

    def heed(self, flight: Flight, stored: Stored) -> Entry | None:
        """Tell of a result that was not stored, and return the entry."""
        if stored.error is not None:
            self._failed(flight, stored.error)
        elif not stored.fits and stored.entry is not None:
            self._too_heavy(flight, stored.entry)
        return stored.entry

    # ----------------------------------------------------------------------------------------------

    def made(self, key: Any, value: Any, ttl: float | None) -> Entry:
        """Return a result in the form in which the store takes it.

        Raises:
            Uncopyable: It cannot be isolated, or cannot be encoded.
        """
        entry = self._make(key, value, ttl)
        if self._aging is None or ttl is None:
            return entry
        return self._aging.aged(entry, entry.expires - ttl)

    def _lifetime(self, call: Call, value: Any, began: float) -> float | None:
        """Return for how long to store a result: 0 for not at all, None for ever."""
        if self.condition is None:
            return self.ttl
        seconds = ambient.clock().monotonic() - began
        return self._allowed(self.condition, value, Receipt.of(call, value, seconds))

    def _too_heavy(self, flight: Flight, entry: Entry) -> None:
        flight.barren = True
        size = format_bytes(entry.weight)
        self._skips.tell(f"a result of {size} is heavier than cache_max_bytes")

    def _failed(self, flight: Flight, error: Exception) -> None:
        flight.barren = True
        if isinstance(error, Uncopyable):
            self._skips.tell(str(error), once=True)
            return
        why = f": {error}" if isinstance(error, StoreError) else f" ({type(error).__name__})"
        self._skips.tell(f"its result could not be stored{why}")

    def _allowed(
        self, condition: Callable[[Any, Receipt[Any]], object], value: Any, receipt: Receipt[Any]
    ) -> float | None:
        """Ask `cache_if`; one that raises warns and refuses, and never costs the caller the result."""
        try:
            return allowed_ttl(condition(value, receipt), self.ttl)
        except Exception as error:  # noqa: BLE001 - whatever it raises, the result goes first
            reason = f"cache_if raised {type(error).__name__} and was taken as False"
            warnings.warn(reason, OperoWarning, stacklevel=users_stacklevel())
            self._skips.tell(reason)
            return 0

    def entry(self, key: Any, value: Any, ttl: float | None) -> Entry:
        """Return a result in a form from which several callers can be served.

        Args:
            key: Its key.
            value: The result.
            ttl: Its lifetime in seconds, None for ever.

        Raises:
            Uncopyable: It cannot be isolated.
        """
        expires = _expiry(ttl)
        weight, group = _ENTRY_BYTES, None
        if type(key) is tuple:
            for part in key:
                if type(part) is str or type(part) is bytes:
                    weight += len(part)
                elif type(part) is tuple:  # types and values of a short list
                    for item in part[1]:
                        weight += len(item) if type(item) is str or type(item) is bytes else 16
            if self._of_instance and key and type(key[0]) is int:
                group = key[0]
        if type(value) in ATOMS:
            return Entry(value, expires, None, weight + getsizeof(value), group)
        stored, thaw = freeze(value, copy=self._copy)
        return Entry(stored, expires, thaw, weight + weigh(stored), group)


def _expiry(ttl: float | None) -> float:
    # An installed clock holds the switch; otherwise the machine's is read without a detour.
    if ttl is None:
        return math.inf
    return (ambient.clock().monotonic() if switch.on else monotonic()) + ttl
