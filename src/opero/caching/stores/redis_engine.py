# this_file: src/opero/caching/stores/redis_engine.py
"""twat-cache's Redis engine, repaired: bytes by text, failures as failures, nothing unpickled.

The engine as it comes connects when it is made and waits for seconds when the server is down, takes
a failure for a miss, cuts lifetimes to whole seconds, makes keys with `hash()`, unpickles what it
finds, and clears other namespaces than its own. Here its configuration and upkeep are used; what
goes to the server is opero's.
"""

from __future__ import annotations

from typing import Any

from opero.caching.stores import redis_commands as say
from opero.caching.stores.guest import unnoticed
from opero.caching.stores.redis_client import connector
from opero.caching.stores.redis_wires import Wires

with unnoticed():
    from twat_cache.config import CacheConfig
    from twat_cache.engines.base import BaseCacheEngine
    from twat_cache.engines.redis import RedisCacheEngine

__all__ = ["RedisEngine"]


class RedisEngine(RedisCacheEngine[Any, Any]):
    """The engine of one server.

    Args:
        client: A client of the library `redis`, with one attempt per command and short timeouts.

    Attributes:
        ask: `ask(*command)` sends a command and returns its answer.
        ask_many: `ask_many(commands)` does so for several in one round trip.
    """

    def __init__(self, client: Any) -> None:
        # Past the parent's own `__init__`: it would make a client that waits, and ping the server.
        BaseCacheEngine.__init__(self, CacheConfig())
        self._redis = client
        self._namespace = "opero"
        self._compress = False
        self._wires = wires = Wires(connector(client))
        self.ask = wires.ask
        self.ask_many = wires.ask_many

    def _get_cached_value(self, key: Any) -> Any:
        return self.ask(*say.get(key))

    def _set_cached_value(self, key: Any, value: Any) -> None:
        self.ask(*say.put(key, value, self._config.ttl))

    def cleanup(self) -> None:
        """Close the connections."""
        self._wires.close()
        super().cleanup()

    def clear(self) -> None:
        """Remove all entries of opero's, and nothing of anybody else's."""
        cursor = 0
        while True:
            cursor, names = say.scanned(self.ask(*say.scan(cursor, "")))
            if names:
                self.ask(*say.remove(names))
            if not cursor:
                return
