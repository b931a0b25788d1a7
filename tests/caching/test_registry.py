# this_file: tests/caching/test_registry.py
"""All caches together."""

from __future__ import annotations

import gc
import weakref

import pytest

from opero import clear_cache
from opero.core.cache import CacheStage
from opero.core.call import Call
from opero.core.function import FunctionInfo, Stats
from opero.core.options import Options
from opero.events.bus import Emitter

pytestmark = pytest.mark.internal


def cached(namespace, *, entries, origin=None):
    """A cache of that namespace with that many entries."""
    cache = CacheStage(
        FunctionInfo(lambda x: x),
        Options.of("opero", cache_namespace=namespace),
        stats=Stats(),
        emitter=Emitter("f"),
        origin=origin,
    )
    run = cache.wrap_sync(lambda call: call.args[0])
    for n in range(entries):
        run(Call((n,), {}))
    return cache


def test_clear_cache_empties_a_namespace():
    one, two = cached("clear_cache_one", entries=2), cached("clear_cache_two", entries=1)
    assert clear_cache("clear_cache_one", "disk") == 0
    assert clear_cache("clear_cache_one", "memory") == 2
    assert (one.info().size, two.info().size) == (0, 1)
    assert clear_cache() >= 1
    assert two.info().size == 0


def test_clear_cache_counts_a_shared_store_once():
    first = cached("shared once", entries=1)
    second = cached("shared once", entries=0, origin=first)
    assert clear_cache("shared once") == 1
    assert second.info().size == 0


def test_a_cache_without_references_is_forgotten():
    gone = weakref.ref(cached("forgotten", entries=1))
    gc.collect()
    assert gone() is None
    assert clear_cache("forgotten") == 0
