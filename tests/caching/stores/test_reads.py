# this_file: tests/caching/stores/test_reads.py
"""How often a store is read: once for a hit, and once for a miss where no other caller computes the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tests.caching.stores.conftest import SHARED

from opero import opero, operomap
from opero.caching import function_cache, lease
from opero.caching.stores import base as stores
from opero.concurrency import lookup
from opero.core import cache as stage

if TYPE_CHECKING:
    from tests.conftest import Face

pytestmark = pytest.mark.internal


@pytest.fixture(autouse=True)
def no_time_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow machine a look may be too old to count when the lease is there."""
    for module in (function_cache, lease, lookup, stage):
        monkeypatch.setattr(module, "monotonic", lambda: 0.0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that a store was asked for."""
    asked: list[str] = []

    def count(kind: type, verb: str) -> None:
        plain = getattr(kind, verb)

        def read(self: Any, keys: Any, *more: Any) -> Any:
            asked.extend([keys] if isinstance(keys, str) else keys)
            return plain(self, keys, *more)

        monkeypatch.setattr(kind, verb, read)

    for verb in ("find", "find_many", "afind"):
        count(stores.CodedStore, verb)
    count(stores.UserStore, "find")
    return asked


def square(x: int) -> int:
    return x * x


SLOWER = pytest.mark.parametrize("backend", [*SHARED, "user's", "user's slow"], indirect=True)


@SLOWER
def test_a_miss_and_a_hit_read_the_store_once_each(
    face: Face, backend: Any, reads: list[str]
) -> None:
    f = opero(cache_backend=backend)(face.of(square))
    assert [face.run(f, x) for x in (2, 3)] == [4, 9]  # the first call goes another way
    assert len(reads) == 2
    assert face.run(f, 3) == 9
    assert len(reads) == 3
    assert (f.stats.calls, f.stats.hits) == (2, 1)


@SLOWER
@pytest.mark.parametrize("mode", ["thread", "async"])
def test_a_map_reads_the_store_once_for_each_item(
    mode: str, backend: Any, reads: list[str]
) -> None:
    f = operomap(cache_backend=backend, mode=mode, workers=2)(square)
    assert f([1, 2, 3]) == [1, 4, 9]
    assert len(reads) == 3
    assert f([1, 2, 3]) == [1, 4, 9]
    assert len(reads) == 6
