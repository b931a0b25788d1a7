# this_file: tests/caching/stores/test_codecs.py
"""`cache_codec`: how results become bytes in the stores that outlive a process."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from opero import opero
from opero.core import get_cache_context
from opero.errors import OperoUsageError
from opero.events import CacheSkipped

if TYPE_CHECKING:
    from tests.conftest import Face


class Json:
    """A user's codec."""

    def encode(self, value: Any) -> bytes:
        return json.dumps(value).encode()

    def decode(self, data: bytes) -> Any:
        return json.loads(data)


class Broken(Json):
    """One that cannot read what it has written."""

    def decode(self, data: bytes) -> Any:
        raise ZeroDivisionError


class World:
    """What the function below does."""

    calls = 0
    value: Any = None


@pytest.fixture(autouse=True)
def world() -> None:
    World.calls, World.value = 0, None


def work(x: int = 0) -> Any:
    World.calls += 1
    return World.value


def make(face: Face, place: str, **options: Any) -> tuple[Any, list[str]]:
    skips: list[str] = []

    def listen(event: object) -> None:
        if isinstance(event, CacheSkipped):
            skips.append(event.reason)

    return opero(cache_backend=place, on_event=listen, **options)(face.of(work)), skips


def test_plain_refuses_what_would_be_pickled(face: Face, place: str) -> None:
    World.value = ValueError("no plain data")
    f, skips = make(face, place, cache_codec="plain")
    assert [repr(face.run(f)) for _ in range(2)] == ["ValueError('no plain data')"] * 2
    assert World.calls == 2
    assert len(skips) == 1
    assert 'cache_codec="plain"' in skips[0]
    assert "plain data only" in f.explain()


def test_plain_opens_no_pickle_that_auto_has_stored(face: Face, place: str) -> None:
    World.value = ValueError("signed")
    auto, _ = make(face, place)
    face.run(auto)
    plain, skips = make(face, place, cache_codec="plain")
    face.run(plain)
    assert World.calls == 2
    assert "another codec" in skips[0]


def test_plain_stores_plain_data(face: Face, place: str) -> None:
    World.value = {"a": [1, (2, None)]}
    f, skips = make(face, place, cache_codec="plain")
    assert [face.run(f) for _ in range(2)] == [World.value] * 2
    assert (World.calls, skips) == (1, [])


def test_a_users_codec_encodes_everything(face: Face, place: str) -> None:
    World.value = ("a tuple",)
    f, skips = make(face, place, cache_codec=Json())
    assert [face.run(f) for _ in range(2)] == [("a tuple",), ["a tuple"]]
    assert (World.calls, skips) == (1, [])


def test_what_a_codec_raises_is_a_result_that_is_not_stored(face: Face, place: str) -> None:
    World.value = {1, 2}
    f, skips = make(face, place, cache_codec=Json())
    assert [face.run(f) for _ in range(2)] == [{1, 2}] * 2
    assert World.calls == 2
    assert "cache_codec raised TypeError" in skips[0]


def test_what_it_raises_when_it_reads_is_a_miss(face: Face, place: str) -> None:
    World.value = 1
    f, skips = make(face, place, cache_codec=Broken())
    assert [face.run(f) for _ in range(2)] == [1, 1]
    assert World.calls == 2
    assert "cache_codec raised ZeroDivisionError" in skips[0]


def test_another_codec_has_another_store(face: Face, place: str) -> None:
    World.value = 1
    f, _ = make(face, place)
    changed = f.with_options(cache_codec="plain")
    assert changed.__opero__.cache.store is not f.__opero__.cache.store


def test_contexts_have_one_too(place: str) -> None:
    cache = get_cache_context(place, cache_namespace="codec", cache_codec="plain")
    with pytest.raises(OperoUsageError, match="no plain data"):
        cache.set("k", ValueError())
    get_cache_context(place, cache_namespace="codec", cache_codec=Json()).set("k", (1,))
    assert get_cache_context(place, cache_namespace="codec", cache_codec=Json()).get("k") == [1]
