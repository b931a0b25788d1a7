# this_file: src/opero/caching/instances.py
"""A number for each live instance with cached methods, so that a key names it without owning it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import count
from threading import RLock

__all__ = ["Instances"]


class _Reference(weakref.ref[object]):
    """A weak reference that remembers what it stood for."""

    __slots__ = ("number", "token")
    number: int
    token: int


class Instances:
    """Tokens of live objects, by identity: an object's own `__eq__` and `__hash__` are never asked.

    An id is used again only after its object is gone, and the token goes with the object, so the
    two never disagree.

    Args:
        forget: Called with the token of an object that has died.

    Attributes:
        tokens: Token by `id(object)`. Never replaced, so that its `get` can be kept.

    Example:
        >>> class Client: ...
        >>> client, numbers = Client(), Instances(forget=print)
        >>> numbers.token(client) == numbers.token(client)
        True
        >>> del client
        1
    """

    def __init__(self, forget: Callable[[int], object]) -> None:
        self.tokens: dict[int, int] = {}
        self._references: dict[int, _Reference] = {}
        self._numbers = count(1)
        self._forget = forget
        self._lock = RLock()
        # The references would otherwise keep this object in a cycle.
        myself = weakref.ref(self)

        def gone(reference: _Reference) -> None:
            me = myself()
            if me is not None:
                me._gone(reference)  # noqa: SLF001 - its own method, reached weakly

        self._callback = gone

    def token(self, instance: object) -> int:
        """Return the number of an object, a new one when it is first seen.

        Raises:
            TypeError: The object cannot be weakly referenced.
        """
        number = id(instance)
        known = self.tokens.get(number)
        if known is not None:
            return known
        reference = _Reference(instance, self._callback)
        reference.number = number
        with self._lock:
            token = self.tokens.get(number)
            if token is None:
                token = next(self._numbers)
                reference.token = token
                self._references[number] = reference
                self.tokens[number] = token
        return token

    def renew_lock(self) -> None:
        """After a fork: forget that a thread which does not exist here may hold the lock."""
        self._lock = RLock()

    def _gone(self, reference: _Reference) -> None:
        with self._lock:
            if self._references.get(reference.number) is not reference:
                return  # one that lost the race in `token`
            del self._references[reference.number]
            del self.tokens[reference.number]
        self._forget(reference.token)
