# this_file: src/opero/caching/stores/twat.py
"""Keep entries with an engine of twat-cache: `cache_backend="twat:redis"`, `"twat:joblib"`, or an engine object.

Importing twat-cache takes half a second, and removes every sink of the program's loguru logger: it
is imported when a function names one of its engines, and the sinks stay. Most of its engines cannot
be constructed or store nothing; those are refused by name. What its engines store are pickles: use
them with places that no other user can write to.
"""

from __future__ import annotations

import functools
import math
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from opero.errors import OperoUsageError

ACROSS_HOSTS: Final = True

_ENGINES: Final = {"redis": "RedisCacheEngine", "joblib": "JoblibEngine"}
_pending: Final = threading.local()


def settle(text: str) -> str:
    """Return the text as it is, if the engine that it names can work.

    Raises:
        OperoUsageError: It cannot; the message says why.
    """
    _engine_class(text.partition(":")[2])
    return text


def locate(text: str) -> str:
    """Return the name of the engine."""
    return text.partition(":")[2]


def open_at(place: str) -> EngineStore:
    """Return the store of an engine, which is made when it is first used."""
    return EngineStore(functools.partial(_make_engine, place), f"twat:{place}")


def open_engine(engine: Any) -> EngineStore:
    """Return the store of a user's engine object."""
    return EngineStore(lambda: (engine, None), type(engine).__name__)


class EngineStore:
    """A store like a user's own, on an engine, which has no lifetimes per entry and no `delete`.

    Args:
        make: Returns the engine and its configuration, None for one that is left as it is.
        name: Its name in `info()` and `explain()`.
    """

    blocking = True

    def __init__(self, make: Any, name: str) -> None:
        self.name = name
        self._make = make
        self._made: tuple[Any, Any] | None = None
        self._lock = threading.RLock()

    def get(self, key: str) -> Any:
        """Return what is stored, None if there is nothing."""
        engine, _ = self._engine()
        if not hasattr(engine, "_memory"):
            return engine.get(key)
        entry = engine.cache(_entry)  # joblib's engine keeps results of calls, not values
        return entry(key) if entry.check_call_in_cache(key) else None

    def set(self, key: str, value: Any, ttl: float | None) -> None:
        """Store a value."""
        engine, config = self._engine()
        with self._lock:
            if hasattr(engine, "_memory"):
                self.delete(key)
                _pending.value = value
                engine.cache(_entry)(key)
                del _pending.value
                return
            if config is not None:  # whole seconds; the exact time stands in the value
                config.ttl = None if ttl is None else max(1, math.ceil(ttl))
            engine.set(key, value)

    def delete(self, key: str) -> bool:
        """Remove a key and return whether it was there."""
        engine, _ = self._engine()
        there = self.get(key) is not None
        if not hasattr(engine, "_memory"):
            engine.set(key, None)
        elif there:
            engine.cache(_entry).call_and_shelve(key).clear()
        return there

    def clear(self, prefix: str = "") -> int:
        """Remove everything that the engine holds, whatever the prefix: it knows none, and no numbers."""
        self._engine()[0].clear()
        return 0

    def close(self) -> None:
        """Close what the engine has open."""
        with self._lock:
            made, self._made = self._made, None
        if made is not None and made[1] is not None:
            made[0].cleanup()

    def _engine(self) -> tuple[Any, Any]:
        with self._lock:
            made = self._made = self._made or self._make()
            return made


def _entry(key: str) -> Any:
    """Return what is to be stored: joblib keeps the outcome of this call."""
    return _pending.value


def _engine_class(name: str) -> Any:
    if name not in _ENGINES:
        works = " and ".join(f'"twat:{engine}"' for engine in _ENGINES)
        raise OperoUsageError(
            f"cache_backend='twat:{name}': twat-cache's engine {name!r} is unknown, or cannot work (it cannot be "
            f"constructed, or stores nothing). {works} can."
        )
    try:
        with _unnoticed():
            found = getattr(import_module(f"twat_cache.engines.{name}"), _ENGINES[name])
            available = found.is_available()
    except ImportError as error:
        raise OperoUsageError(f"cache_backend='twat:{name}' needs twat-cache: {error}.") from error
    if not available:
        raise OperoUsageError(
            f"cache_backend='twat:{name}' needs the library {name}: pip install {name}"
        )
    return found


def _make_engine(name: str) -> tuple[Any, Any]:
    found = _engine_class(name)
    config = import_module("twat_cache.config").CacheConfig()
    if name == "joblib":
        from opero.caching.stores.disk import default_folder

        # Absolute: another one is also made in the current directory.
        config.folder_name = str(Path(default_folder()).with_name("twat-joblib"))
    elif url := os.environ.get("OPERO_REDIS_URL"):
        parts = urlsplit(url)
        config.redis_host, config.redis_port = parts.hostname or "localhost", parts.port or 6379
        config.redis_db = int(parts.path.strip("/") or 0)
        config.redis_password = None if parts.password is None else unquote(parts.password)
    return found(config), config


@contextmanager
def _unnoticed() -> Iterator[None]:
    """Return a block in which twat-cache can be imported without a trace in loguru or among warnings."""
    from loguru import logger

    logger.disable("twat_cache")  # it logs its configuration, with the password of the server
    importer, facade = threading.get_ident(), vars(logger)
    for name in ("add", "remove"):
        method = getattr(logger, name)
        # Only for this thread: what other threads do meanwhile counts.
        facade[name] = lambda *given, _method=method, **more: (
            None if threading.get_ident() == importer else _method(*given, **more)
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name in ("add", "remove"):
            facade.pop(name, None)
