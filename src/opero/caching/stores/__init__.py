# this_file: src/opero/caching/stores/__init__.py
"""Stores that outlive a process: bytes by key, on disk or on a server.

    protocol    `ByteStore`: what a store has to be able to do
    envelope    what lies around a stored value: when it was stored, when it expires, a checksum
    coded       `CodedStore`: entries of one function in such a store
    disk        `"disk"`: SQLite and files in a folder; `folder` says which, `database` is how
    redis       `"redis"`: a server, to which `redis_engine` talks; `redis_wires` and `redis_lines` are
                its connections, of threads and of event loops
    rest        leaving alone what does not answer
    guest       how twat-cache is imported without the host program noticing

Here is the one place where a text such as "disk:~/answers" becomes an open store: one for each
place and process, whatever function asks for it.
"""

from __future__ import annotations

import atexit
import os
import threading
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from opero.utils.backends import BACKENDS, backend_of

if TYPE_CHECKING:
    from opero.caching.stores.protocol import ByteStore

__all__ = ["across_hosts", "open_store", "open_stores", "settle"]


class _Opened:
    """The stores that this process has open."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.stores: dict[tuple[str, str], ByteStore] = {}


_opened: Final = _Opened()


def settle(text: str) -> str:
    """Return the text of a backend as it has to be remembered.

    Args:
        text: As given for `cache_backend`, but not "memory".

    Raises:
        OperoUsageError: It names no backend, or one that cannot be had.

    Example:
        >>> settle("disk:/var/cache/answers")
        'disk:/var/cache/answers'
    """
    settled: str = _module(text).settle(text)
    return settled


def across_hosts(text: str) -> bool:
    """Whether other hosts may read and write what a text names."""
    return bool(_module(text).ACROSS_HOSTS)


def open_store(text: str) -> ByteStore:
    """Return this process's store for a place, which may be asked at once.

    Nothing is created, connected or imported before the store's first verb.

    Args:
        text: As it came from `settle`. What it leaves open, like the folder of "disk", is looked up
            in the environment now.
    """
    module = _module(text)
    place = module.locate(text)
    with _opened.lock:
        key = module.__name__, place
        store = _opened.stores.get(key)
        if store is None:
            store = _opened.stores[key] = module.open_at(place)
        return store


def open_stores() -> list[ByteStore]:
    """Return the stores that this process has opened so far."""
    with _opened.lock:
        return list(_opened.stores.values())


def _module(text: str) -> Any:
    backend_of("cache_backend", text)
    return import_module(BACKENDS[text.partition(":")[0]])


def _close_all() -> None:
    for store in open_stores():
        store.close()


def _after_fork() -> None:
    _opened.lock = threading.RLock()
    for store in _opened.stores.values():
        store.renew()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
