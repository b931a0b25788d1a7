# this_file: tests/caching/stores/test_bytes_conformance.py
"""What every store of bytes does: the protocol, verb by verb."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from opero.caching.stores import base as stores
from opero.errors import StoreError

pytestmark = pytest.mark.internal


def keys(store: Any, prefix: str = "") -> list[str]:
    return sorted(item.key for item in store.scan(prefix))


def eventually_gone(store: Any, key: str) -> bool:
    end = time.monotonic() + 100
    while store.get(key) is not None:
        assert time.monotonic() < end
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("blob", [b"\0", b"x" * 40_000, os.urandom(300_000)], ids=len)
def test_what_was_set_is_got(store, blob):
    store.set("a:k", blob, None)
    assert store.get("a:k") == blob
    assert type(store.get("a:k")) is bytes


def test_what_is_not_there_is_none(store):
    assert store.get("a:k") is None
    assert store.delete("a:k") is False
    assert store.clear("a:") == 0
    assert store.measure("")[0] in (0, None)


@pytest.mark.parametrize("sizes", [(10, 20), (10, 50_000), (50_000, 10), (50_000, 60_000)])
def test_a_second_value_takes_the_place_of_the_first(store, sizes):
    first, second = (os.urandom(size) for size in sizes)
    store.set("a:k", first, None)
    store.set("a:k", second, None)
    assert store.get("a:k") == second
    assert keys(store) == ["a:k"]


def test_a_key_is_deleted_once(store):
    store.set("a:k", b"x", None)
    assert store.delete("a:k") is True
    assert store.delete("a:k") is False
    assert store.get("a:k") is None


def test_what_has_outlived_its_ttl_is_gone(store):
    store.set("a:short", b"x", 0.05)
    store.set("a:long", b"x", 60)
    assert eventually_gone(store, "a:short")
    assert store.get("a:long") == b"x"


def test_a_second_ttl_takes_the_place_of_the_first(store):
    store.set("a:k", b"x", 0.05)
    store.set("a:k", b"y", None)
    time.sleep(0.1)
    assert store.get("a:k") == b"y"


ODD = ["a:", "a:b:", "a*:", "a?:", "[a]:", "a_:", "a%:", "a\\:", "ä:", "🐍:", "a'b:", 'a"b:', "A:"]


@pytest.mark.parametrize("prefix", ODD)
def test_clear_removes_exactly_what_begins_with_the_prefix(store, prefix):
    for one in ODD:
        store.set(f"{one}1", b"x", None)
        store.set(f"{one}2", b"x" * 40_000, None)
    begin = [f"{one}{n}" for one in ODD for n in (1, 2) if f"{one}{n}".startswith(prefix)]
    assert keys(store, prefix) == sorted(begin)
    assert store.clear(prefix) == len(begin)
    assert keys(store) == sorted({f"{one}{n}" for one in ODD for n in (1, 2)} - set(begin))


def test_an_empty_prefix_means_everything(store):
    for n in range(250):
        store.set(f"a:{n}", b"x", None)
    assert len(keys(store)) == 250
    assert store.clear("") == 250
    assert keys(store) == []


def test_sizes_are_reported(store):
    store.set("a:1", b"x" * 100, None)
    store.set("a:2", b"x" * 100_000, None)
    store.set("b:1", b"x", None)
    count, size = store.measure("a:")
    assert count == 2
    assert size is None or 100_100 <= size < 110_000
    assert all(item.size in (0, 100, 100_000) for item in store.scan("a:"))


def test_one_of_many_that_claim_gets_the_lease(store):
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda n: all(store.acquire([("a:k", f"owner {n}")], 30)), range(64)))
    assert sum(got) == 1


def test_a_lease_is_kept_extended_and_given_back_by_its_owner_only(store):
    assert all(store.acquire([("a:k", "me")], 30))
    assert not all(store.acquire([("a:k", "you")], 30))
    store.release([("a:k", "you")])
    assert not all(store.acquire([("a:k", "you")], 30))
    assert all(store.acquire([("a:k", "me")], 30))
    store.release([("a:k", "me")])
    store.release([("a:k", "me")])
    assert all(store.acquire([("a:k", "you")], 30))


def test_a_lease_ends_by_itself(store):
    assert all(store.acquire([("a:k", "me")], 0.05))
    end = time.monotonic() + 100
    while not all(store.acquire([("a:k", "you")], 30)):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert not all(store.acquire([("a:k", "me")], 30))


def test_leases_are_no_entries(store):
    store.acquire([("a:k", "me")], 30)
    assert store.get("a:k") is None
    assert keys(store) == []
    store.clear("")
    assert not all(store.acquire([("a:k", "you")], 30))


SIZES = [1, 10, 40_000, 300_000, 20]


def test_many_are_stored_and_found_at_once(store):
    blobs = {f"a:{n}": os.urandom(size) for n, size in enumerate(SIZES)}
    store.set("a:0", b"old", None)
    store.set_many([(key, blob, None) for key, blob in blobs.items()])
    assert store.get_many(["a:none", *blobs]) == [None, *blobs.values()]
    assert store.get_many([]) == []
    store.set_many([("a:0", b"short", 0.02), ("a:1", b"long", 60)])
    end = time.monotonic() + 100
    while store.get_many(["a:0", "a:1"]) != [None, b"long"]:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_each_of_many_leases_is_claimed_on_its_own(store):
    assert all(store.acquire([("a:2", "you")], 30))
    owners = [(f"a:{n}", "me") for n in range(5)]
    assert store.acquire(owners, 30) == [True, True, False, True, True]
    assert store.acquire(owners[:2], 30) == [True, True]
    store.release([("a:0", "me"), ("a:2", "me"), ("a:3", "you")])
    reported = [all(store.acquire([(f"a:{n}", "she")], 30)) for n in range(5)]
    assert reported == [True, False, False, False, False]


def test_callers_that_acquire_many_in_any_order_share_them(store):
    keys = [f"a:{n}" for n in range(200)]

    def acquire(n: int) -> list[bool]:
        order = keys[::-1] if n % 2 else keys
        reported = dict(zip(order, store.acquire([(k, f"me {n}") for k in order], 30), strict=True))
        return [reported[key] for key in keys]

    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(acquire, range(8)))
    assert [sum(reported) for reported in zip(*got, strict=True)] == [1] * 200


def test_a_closed_store_opens_again(store):
    store.set("a:k", b"x", None)
    store.close()
    assert store.get("a:k") == b"x"
    store.close()
    store.close()


def test_closing_harms_no_thread_that_uses_it(store):
    """At worst one of its verbs fails; the interpreter has crashed here once."""
    ended = threading.Event()

    def use():
        while not ended.is_set():
            with contextlib.suppress(StoreError):
                store.set("a:k", b"x", None)
                store.get("a:k")

    with ThreadPoolExecutor(3) as pool:
        using = [pool.submit(use) for _ in range(3)]
        for _ in range(200):
            store.close()
            time.sleep(0.001)
        ended.set()
        for each in using:
            each.result()


def test_a_place_has_one_store_in_a_process(store, place):
    assert stores.open_store(stores.settle(place)) is store


def test_threads_share_a_store(store):
    def work(n: int) -> bool:
        key = f"a:{n % 10}"
        blob = bytes([n % 10]) * (40_000 if n % 3 else 10)
        store.set(key, blob, None)
        found = store.get(key)
        # Another thread may be replacing the file just now.
        return found is None or set(found) == {n % 10}

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))


def test_event_loops_have_the_same_verbs(store):
    if not hasattr(store, "aget"):
        pytest.skip("called in threads")

    async def main() -> None:
        await store.aset_many([("a:k", b"x", 60), ("a:l", b"y", None)])
        assert await store.aget("a:k") == b"x"
        assert await store.aget("a:j") is None
        assert await store.aacquire([("a:k", "me")], 30) == [True]
        assert await store.aacquire([("a:k", "you")], 30) == [False]

    for _ in range(3):  # in one loop after the other
        asyncio.run(main())
        store.release([("a:k", "me")])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_and_its_parent_go_on_with_the_same_entries(store):
    store.set("a:parent", b"x", None)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            store.set("a:child", b"y" * 50_000, None)
            code = 0 if store.get("a:parent") == b"x" else 2
        finally:
            os._exit(code)
    for n in range(50):
        store.set(f"a:{n}", b"z", None)
    assert os.waitpid(child, 0)[1] == 0
    assert store.get("a:child") == b"y" * 50_000
    assert len(keys(store)) == 52
