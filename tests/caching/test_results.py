# this_file: tests/caching/test_results.py
"""What callers get from caches in memory and on disk, through documented names only."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import ipaddress
import pathlib
import threading
import time
import types
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from tests.tables import rows

from opero import clear_cache, opero
from opero.core import get_cache_context
from opero.errors import UnkeyableError
from opero.testing import capture_events, fake_clock

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Face


class Colour(enum.Enum):
    RED = 1


class Spot(NamedTuple):
    x: int


@dataclasses.dataclass
class Order:
    item: str
    tags: list[str] = dataclasses.field(default_factory=list)


class Plain:
    """Without content for a key or a plain codec, but it can be pickled."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plain) and self.size == other.size

    __hash__ = None  # type: ignore[assignment]


VALUES: list[Any] = [
    *(None, True, 0, -(2**70), 1.5, "text\ud800", b"bytes", b"x" * 100_000, 1j, ...),
    *([1, [2]], (1, (2,)), {1, 2}, frozenset({3}), {"a": {"b": [1]}, 2: None}, bytearray(b"x")),
    *(range(3), slice(1, 2), collections.deque([1], 3), collections.OrderedDict(a=1)),
    *(collections.Counter("aab"), dt.datetime(2026, 1, 2, tzinfo=dt.UTC), dt.date(2026, 1, 2)),
    *(dt.time(1, 2), dt.timedelta(days=1, seconds=2), decimal.Decimal("1.20"), uuid.UUID(int=7)),
    *(fractions.Fraction(1, 3), ipaddress.ip_address("::1"), pathlib.PurePosixPath("a/b")),
    *(Colour.RED, Spot(1), Order("a", ["b"]), [Order("c")], Plain(3)),
]


def returned(index: int) -> Any:
    return VALUES[index]


@rows("place", ["memory", "disk"])
@rows("index", range(len(VALUES)))
def test_a_hit_is_equal_and_of_the_same_type(place: str, index: int, tmp_path: Any) -> None:
    fetch = opero(cache_backend=place if place == "memory" else f"disk:{tmp_path}")(returned)
    fetch(index)
    receipt = fetch.call(index)
    assert receipt.source == "hit"
    assert type(receipt.value) is type(VALUES[index])
    assert receipt.value == VALUES[index]


@pytest.mark.parametrize(
    "value",
    [np.arange(6.0).reshape(2, 3), np.float32(1.5), np.datetime64("2026-01-02"), pd.Series([1, 2])],
    ids=["array", "number", "time", "series"],
)
def test_arrays_and_series_come_back_from_disk(value: Any, tmp_path: Any) -> None:
    ARRAY[:] = [value]
    fetch = opero(cache_backend=f"disk:{tmp_path}", retries=0)(array_of)
    fetch(0)
    again = fetch.call(0)
    assert again.source == "hit"
    assert type(again.value) is type(value)
    assert np.array_equal(again.value, value)


ARRAY: list[Any] = []


def array_of(x: int) -> Any:
    return ARRAY[x]


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_what_a_caller_does_to_a_result_reaches_no_other(place: str, tmp_path: Any) -> None:
    fetch = opero(cache_backend=place if place == "memory" else f"disk:{tmp_path}")(order)
    for _ in range(3):
        got = fetch("a")
        assert got == {"order": Order("a", ["new"]), "rows": [[1], [2]]}
        got["order"].tags.clear()
        got["rows"][0].append(9)


def order(item: str) -> dict[str, Any]:
    return {"order": Order(item, ["new"]), "rows": [[1], [2]]}


@pytest.mark.parametrize(
    "make",
    [
        lambda: iter([1]),
        lambda: (n for n in ()),
        threading.Lock,
        lambda: [pathlib.Path(__file__).open("rb")],  # noqa: SIM115 - the result
    ],
    ids=["iterator", "generator", "lock", "file in a list"],
)
def test_what_can_be_used_once_is_computed_each_time_and_reported(make: Callable[[], Any]) -> None:
    fetch = opero(retries=0)(lambda: make())  # noqa: PLW0108 - a lock is no function
    with capture_events() as events:
        for value in (fetch(), fetch()):
            for each in value if isinstance(value, list) else ():
                each.close()
    assert fetch.stats.calls == 2
    assert "CacheSkipped" in {type(event).__name__ for event in events}


def test_the_plain_codec_stores_no_pickles(tmp_path: Any) -> None:
    fetch = opero(cache_backend=f"disk:{tmp_path}", cache_codec="plain", retries=0)(returned)
    fetch(len(VALUES) - 1)
    assert fetch.call(len(VALUES) - 1).source == "fresh"


class Reversing:
    def encode(self, value: str) -> bytes:
        return value[::-1].encode()

    def decode(self, data: bytes) -> str:
        return data.decode()[::-1]


def word(x: int) -> str:
    return f"word {x}"


def test_a_codec_of_the_user_encodes_and_decodes(tmp_path: Any) -> None:
    fetch = opero(cache_backend=f"disk:{tmp_path}", cache_codec=Reversing(), retries=0)(word)
    assert [fetch(1), fetch(1)] == ["word 1", "word 1"]
    assert fetch.stats.hits == 1


def test_an_old_result_stands_in_while_the_function_fails() -> None:
    healthy = [True]

    def fetch(x: int) -> str:
        if not healthy[0]:
            raise ConnectionError("down")
        return "answer"

    cached = opero(cache_ttl=10, cache_stale_ttl=100, retries=0)(fetch)
    with fake_clock() as clock:
        cached(1)
        healthy.clear()
        healthy.append(False)
        clock.advance(20)
        assert cached.call(1).source == "stale"
        clock.advance(200)
        with pytest.raises(ConnectionError):
            cached(1)


def test_a_result_is_renewed_in_the_background_before_it_expires(face: Face) -> None:
    calls: list[int] = []

    def fetch(x: int) -> int:
        calls.append(x)
        return len(calls)

    cached = opero(cache_ttl=100, cache_refresh=0.5, retries=0)(face.of(fetch))

    async def of_tasks() -> list[int]:
        found = [await cached(1)]
        clock.advance(60)
        found.append(await cached(1))
        for _ in range(200):
            if len(calls) == 2:
                break
            await asyncio.sleep(0.01)
        return [*found, await cached(1)]

    def of_threads() -> list[int]:
        found = [cached(1)]
        clock.advance(60)
        found.append(cached(1))
        until = time.monotonic() + 100
        while cached.call(1).value == 1 and time.monotonic() < until:
            time.sleep(0.01)
        return [*found, cached(1)]

    with fake_clock() as clock:
        got = asyncio.run(of_tasks()) if face.asynchronous else of_threads()
    assert got == [1, 1, 2]


def test_the_least_used_results_leave_a_full_memory() -> None:
    fetch = opero(cache_maxsize=2, retries=0)(word)
    for x in (1, 2, 1, 3, 1, 2):
        fetch(x)
    assert fetch.stats.hits == 2  # 1 twice; 2 had gone
    assert fetch.cache.info().size == 2
    heavy = opero(cache_max_bytes=1000, retries=0)(lambda x: bytes(600))
    for x in (1, 2, 1):
        heavy(x)
    assert heavy.stats.hits == 0


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_cache_is_read_and_changed_by_hand(place: str, tmp_path: Any) -> None:
    backend = place if place == "memory" else f"disk:{tmp_path}"
    fetch = opero(cache_backend=backend, cache_namespace=f"by hand {place}", retries=0)(word)
    assert fetch(1) == "word 1"
    assert fetch.cache.info().size == 1
    with get_cache_context(backend, f"by hand {place}") as cache:
        cache.set(fetch.cache.key(1), "another")
        assert fetch(1) == "another"
        assert cache.delete(fetch.cache.key(1))
        assert cache.get(fetch.cache.key(1), "none") == "none"
    assert fetch(1) == "word 1"
    assert fetch.cache.refresh(1) == "word 1"
    assert fetch.cache.invalidate(1)
    assert fetch.call(1).source == "fresh"
    assert fetch.cache.clear() == 1
    fetch(1)
    assert clear_cache(f"by hand {place}", backend) == 1

    async def by_tasks() -> list[Any]:
        fetch(2)
        found = await fetch.cache.ainfo()
        return [found.size, await fetch.cache.ainvalidate(2), await fetch.cache.aclear()]

    assert asyncio.run(by_tasks()) == [1, True, 0]


def slow(x: int) -> list[int]:
    time.sleep(0.2)
    return [x]


def test_two_functions_on_one_disk_compute_a_key_once(tmp_path: Any) -> None:
    """Each has flights of its own, as two processes have: a lease in the store is what they share."""
    both = [opero(cache_backend=f"disk:{tmp_path}", retries=0)(slow) for _ in range(2)]
    results: list[Any] = []
    threads = [threading.Thread(target=lambda f=f: results.append(f(1))) for f in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[1], [1]]
    assert sum(f.stats.calls for f in both) == 1


DIFFERENT: list[Any] = [
    *(1, True, 1.0, "1", b"1", 0.0, -0.0, None, (), [], {}, set(), frozenset()),
    *((1, 2), [1, 2], {1: 2}, {"a": [1, {"b": 2}]}, collections.OrderedDict(a=1)),
    *(
        dt.date(2026, 1, 1),
        dt.datetime.fromisoformat("2026-01-01"),
        dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
    ),
    *(decimal.Decimal(1), decimal.Decimal("1.0"), uuid.UUID(int=1), fractions.Fraction(1, 2)),
    *(pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("a"), Colour.RED, Spot(1), Order("a")),
    *(np.array([1, 2], "<i4"), np.array([1, 2], ">i4"), np.array([[1, 2]], "<i4"), np.int64(1)),
    *(pd.Series([1, 2]), pd.Series([1, 2], name="a"), pd.DataFrame({"a": [1, 2]})),
    *(int, str, len, sum, int | None, list[int], types.SimpleNamespace(a=1), range(2)),
]


def test_arguments_that_a_function_can_distinguish_have_keys_of_their_own() -> None:
    seen: list[object] = []
    fetch = opero(retries=0)(seen.append)
    for _ in range(2):
        for value in DIFFERENT:
            fetch(value)
    assert len(seen) == len(DIFFERENT)


def test_a_hit_of_a_data_frame_is_a_copy_of_its_own() -> None:
    """Its copy is made by C code, which imports with the builtins of the wrapper's frame."""
    fetch = opero(retries=0)(lambda: pd.DataFrame({"n": [1]}))

    @opero(retries=0)
    async def afetch() -> pd.DataFrame:
        return pd.DataFrame({"n": [1]})

    async def twice() -> list[pd.DataFrame]:
        return [await afetch(), await afetch()]

    for first, hit in ((fetch(), fetch()), asyncio.run(twice())):
        first.loc[0, "n"] = 2
        assert hit.loc[0, "n"] == 1
    assert fetch.stats.hits == afetch.stats.hits == 1


def test_an_argument_without_content_is_named() -> None:
    with pytest.raises(UnkeyableError, match="client"):
        opero(cache_ttl=5)(lambda client: 1)(threading.Lock())
