# this_file: tests/caching/test_context.py
"""Caches without a function, used by hand."""

from __future__ import annotations

import gc
import os
import threading

import pytest

from opero import clear_cache, opero
from opero.core import get_cache_context
from opero.errors import OperoUsageError, UnkeyableError


class PrefixStore:
    """A store that can forget the keys of one user."""

    def __init__(self):
        self.data = {}

    def get(self, key):
        return self.data.get(key)

    def set(self, key, value, ttl):
        self.data[key] = value

    def delete(self, key):
        return self.data.pop(key, None) is not None

    def clear(self, prefix=""):
        gone = [key for key in self.data if key.startswith(prefix)]
        for key in gone:
            del self.data[key]
        return len(gone)

    def __len__(self):
        return len(self.data)


def test_a_context_sets_gets_and_deletes(clock):
    with get_cache_context(cache_namespace="context", cache_ttl="1m") as cache:
        cache.set(("a", [1]), value := {"n": [1]})
        value["n"].append(2)
        assert cache.get(("a", [1])) == {"n": [1]}
        assert ("a", [1]) in cache
        assert cache.get(1, "default") == "default"
        cache.set(1, None, ttl=None)
        assert cache.get(True, "default") == "default"
        clock.advance(61)
        assert cache.get(("a", [1])) is None
        assert cache.get(1, "default") is None
        assert cache.delete(1)
        assert not cache.delete(1)


def test_contexts_of_one_namespace_see_the_same_values():
    get_cache_context(cache_namespace="same").set("a", 1)
    assert get_cache_context("memory", "same").get("a") == 1
    assert get_cache_context("memory", "different").get("a") is None
    assert "1 entries" in repr(get_cache_context("memory", "same"))
    assert clear_cache("same", "memory") == 1
    assert get_cache_context("memory", "same").clear() == 0


def test_a_context_in_a_users_store():
    store = PrefixStore()
    cache = get_cache_context(store, "mine")
    cache.set("a", [1])
    assert cache.get("a") == [1]
    assert next(iter(store.data)).startswith("mine::")
    assert cache.clear() == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [({"cache_tll": 1}, "no option 'cache_tll'"), ({"retries": 1}, "no option 'retries'")],
)
def test_a_context_refuses_what_it_does_not_know(options, text):
    with pytest.raises(OperoUsageError, match=text):
        get_cache_context(**options)


def test_a_context_refuses_what_cannot_be_cached():
    cache = get_cache_context(cache_namespace="refusals")
    with pytest.raises(UnkeyableError, match="must have content"):
        cache.get(object())
    with pytest.raises(OperoUsageError, match="cannot be cached"):
        cache.set("a", threading.Lock())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_a_lock_of_its_parent():
    cache = get_cache_context(cache_namespace="forked")
    with cache._store._lock:
        child = os.fork()
        if child == 0:
            # Another thread than the one that holds the lock.
            work = threading.Thread(target=cache.set, args=("a", 1), daemon=True)
            work.start()
            work.join(20)
            os._exit(work.is_alive())
    assert os.waitpid(child, 0)[1] == 0


def test_a_function_that_is_not_cached_has_no_keys():
    with pytest.raises(OperoUsageError, match="not cached"):
        opero(cache=False)(lambda x: x).cache.key(1)


def test_what_is_set_by_hand_is_not_replaced_by_what_was_being_computed():
    begun, go = threading.Event(), threading.Event()

    @opero(cache_namespace="by hand")
    def f(x):
        begun.set()
        go.wait(10)
        return "computed"

    with get_cache_context(cache_namespace="by hand") as cache:
        thread = threading.Thread(target=f, args=(1,))
        thread.start()
        begun.wait(10)
        cache.set(f.cache.key(1), "by hand")
        go.set()
        thread.join()
        assert f(1) == "by hand"


def test_what_is_set_for_a_method_dies_with_its_instance():
    class Client:
        @opero(cache_namespace="by hand")
        def ask(self, x):
            return x

    client = Client()
    with get_cache_context(cache_namespace="by hand") as cache:
        cache.set(client.ask.cache.key(1), "set")
    assert client.ask(1) == "set"
    del client
    gc.collect()
    assert Client.ask.cache.info().size == 0
