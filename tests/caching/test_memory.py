# this_file: tests/caching/test_memory.py
"""The memory store: bounds, second chance, expiry, groups."""

from __future__ import annotations

import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opero.caching.memory import Entry, MemoryStore
from opero.utils import ambient

pytestmark = pytest.mark.internal


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    async def asleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock():
    made = Clock()
    old = ambient.install_clock(made)
    yield made
    ambient.install_clock(old)


def fill(store: MemoryStore, keys, **entry) -> None:
    for key in keys:
        store.put(key, Entry(key, **entry))


def test_the_oldest_entry_leaves_when_there_are_too_many():
    store = MemoryStore(maxsize=2)
    fill(store, "abc")
    assert list(store.entries) == ["b", "c"]


def test_an_entry_that_was_hit_gets_a_second_chance():
    store = MemoryStore(maxsize=2)
    fill(store, "ab")
    store.entries["a"].visited = True
    fill(store, "c")
    assert sorted(store.entries) == ["a", "c"]


def test_a_second_chance_is_given_once():
    store = MemoryStore(maxsize=2)
    fill(store, "ab")
    store.entries["a"].visited = True
    fill(store, "cd")
    assert sorted(store.entries) == ["c", "d"] or sorted(store.entries) == ["a", "d"]
    fill(store, "ef")
    assert sorted(store.entries) == ["e", "f"]


def test_a_new_entry_is_kept_though_all_others_were_hit():
    store = MemoryStore(maxsize=3)
    fill(store, "abc")
    for entry in store.entries.values():
        entry.visited = True
    fill(store, "d")
    assert "d" in store.entries


def test_the_heaviest_load_is_bounded():
    store = MemoryStore(max_bytes=100)
    fill(store, range(5), weight=30)
    assert list(store.entries) == [2, 3, 4]
    assert store.measure() == (3, 90)


def test_an_entry_heavier_than_the_store_is_refused_and_takes_the_old_one_with_it():
    store = MemoryStore(max_bytes=100)
    fill(store, "ab", weight=10)
    assert not store.put("a", Entry("new", weight=101))
    assert list(store.entries) == ["b"]


def test_replacing_an_entry_replaces_its_weight():
    store = MemoryStore()
    fill(store, "aaa", weight=10)
    assert store.measure() == (1, 10)


def test_expired_entries_go_before_older_live_ones(clock):
    store = MemoryStore(maxsize=3)
    fill(store, "a")
    fill(store, "b", expires=clock.now + 1)
    fill(store, "c")
    store.entries["b"].visited = True
    clock.now += 2
    fill(store, "d")
    assert list(store.entries) == ["a", "c", "d"]


def test_an_expired_entry_that_had_a_second_chance_goes_before_live_ones(clock):
    store = MemoryStore(maxsize=3)
    fill(store, "a", expires=clock.now + 5)
    fill(store, "bc", expires=clock.now + 50)
    store.entries["a"].visited = True
    fill(store, "d", expires=clock.now + 60)
    assert list(store.entries) == ["c", "a", "d"]
    clock.now += 6
    fill(store, "e", expires=clock.now + 60)
    assert list(store.entries) == ["c", "d", "e"]


def test_an_expired_entry_gets_no_second_chance(clock):
    store = MemoryStore(maxsize=2)
    fill(store, "a", expires=clock.now + 5)
    fill(store, "b", expires=clock.now + 50)
    store.entries["a"].visited = True
    clock.now += 6
    fill(store, "c", expires=clock.now + 50)
    assert list(store.entries) == ["b", "c"]


def test_an_expiry_that_was_replaced_removes_nothing(clock):
    store = MemoryStore(maxsize=3)
    fill(store, "z", expires=clock.now + 200)
    fill(store, "a", expires=clock.now + 1)
    fill(store, "a", expires=clock.now + 100)
    fill(store, "b", expires=clock.now + 200)
    clock.now += 2
    fill(store, "c", expires=clock.now + 200)
    assert list(store.entries) == ["a", "b", "c"]


def test_keys_of_different_types_may_expire_at_the_same_moment(clock):
    store = MemoryStore(maxsize=4)
    fill(store, "z", expires=clock.now + 100)
    fill(store, ["a", 1, (int, 1), b"x"], expires=clock.now + 1)
    clock.now += 2
    fill(store, "wxyz")
    assert list(store.entries) == list("wxyz")


def test_a_group_is_removed_together():
    store = MemoryStore()
    fill(store, "ab", group=7, weight=1)
    fill(store, "c", group=8, weight=1)
    assert store.drop_group(7) == 2
    assert store.drop_group(7) == 0
    assert store.measure() == (1, 1)


def test_an_evicted_entry_leaves_its_group():
    store = MemoryStore(maxsize=1)
    fill(store, "a", group=7)
    fill(store, "b", group=8)
    assert set(store._groups) == {8}


def test_discard_spares_a_newer_entry():
    store = MemoryStore()
    old, new = Entry(1), Entry(2)
    store.put("k", old)
    store.put("k", new)
    store.discard("k", old)
    assert store.find("k") is new
    store.discard("k", new)
    assert store.find("k") is None


def test_clear_counts_and_keeps_the_mapping_object():
    store = MemoryStore()
    get = store.entries.get
    fill(store, "ab", weight=5, group=1, expires=9e9)
    assert store.clear() == 2
    assert store.measure() == (0, 0)
    fill(store, "c")
    assert get("c") is store.find("c")


def test_a_destructor_may_use_the_store_while_it_is_evicted():
    store = MemoryStore(maxsize=1)

    class Last:
        def __del__(self) -> None:
            store.put("from the grave", Entry(1))

    store.put("a", Entry(Last()))
    store.put("b", Entry(2))
    assert list(store.entries) == ["from the grave"]


def test_destructors_run_without_the_lock():
    store = MemoryStore(maxsize=1)
    free: list[bool] = []

    class Last:
        def __del__(self) -> None:
            def look() -> None:
                free.append(store._lock.acquire(blocking=False))
                if free[-1]:
                    store._lock.release()

            thread = threading.Thread(target=look)
            thread.start()
            thread.join()

    for end in (lambda: store.put("b", Entry(2)), lambda: store.delete("a"), store.clear):
        store.put("a", Entry(Last()))
        end()
        store.clear()
    assert free == [True, True, True]


def test_eight_threads_keep_the_books_right():
    store = MemoryStore(maxsize=50, max_bytes=400)

    def work(seed: int) -> None:
        for number in range(500):
            key = (seed * 7 + number) % 90
            store.put(key, Entry(key, weight=10, group=key % 3, expires=1e12 + number))
            entry = store.find(key)
            if entry is not None:
                entry.visited = True
            if number % 5 == 0:
                store.delete(key)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.weight == sum(e.weight for e in store.entries.values()) <= 400
    assert set().union(*store._groups.values()) == set(store.entries)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "delete", "hit", "wait"]),
        st.integers(0, 8),
        st.integers(1, 60),
        st.sampled_from([1.0, 5.0, math.inf]),
    ),
    max_size=60,
)


@given(STEPS)
def test_whatever_happens_the_bounds_hold_and_a_live_entry_yields_only_to_no_expired_one(steps):
    clock = Clock()
    old = ambient.install_clock(clock)
    try:
        store = MemoryStore(maxsize=4, max_bytes=100)
        for step, key, weight, life in steps:
            if step == "put":
                live = {k for k, e in store.entries.items() if e.expires > clock.now and k != key}
                store.put(key, Entry(key, weight=weight, expires=clock.now + life))
                expired = {k for k, e in store.entries.items() if e.expires <= clock.now}
                assert live <= set(store.entries) or not expired
            elif step == "delete":
                store.delete(key)
            elif step == "hit" and key in store.entries:
                store.entries[key].visited = True
            else:
                clock.now += 1
            assert len(store) <= 4
            assert store.weight == sum(e.weight for e in store.entries.values()) <= 100
    finally:
        ambient.install_clock(old)
