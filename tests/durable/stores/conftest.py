# this_file: tests/durable/stores/conftest.py
"""The stores that are held to the protocol. A new one is named in `PLACES`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import pytest

from opero.durable import SqliteStore, sqlite_store

if TYPE_CHECKING:
    from opero.durable.records import JournalStore

sys.path.insert(0, str(Path(__file__).parent))
from memory_store import MemoryJournal, MemoryStore


class Place(Protocol):
    """Where a journal is kept, for a test."""

    def store(self) -> JournalStore:
        """Return a store on the journal, as one more process would make it."""
        ...

    def kill(self, owner: str) -> None:
        """Make an owner look as if its process had died."""
        ...


class InFile:
    def __init__(self, folder: Path) -> None:
        self._path = folder / "journal.db"

    def store(self) -> JournalStore:
        return SqliteStore(self._path)

    def kill(self, owner: str) -> None:
        os.close(sqlite_store._descriptors.pop(owner))


class InMemory:
    def __init__(self, folder: Path) -> None:
        self._journal = MemoryJournal()

    def store(self) -> JournalStore:
        return MemoryStore(self._journal)

    def kill(self, owner: str) -> None:
        self._journal.living.discard(owner)


PLACES: Final[dict[str, Callable[[Path], Place]]] = {"sqlite": InFile, "memory": InMemory}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return PLACES[request.param](tmp_path)


@pytest.fixture
def opened(place: Place) -> Iterator[Callable[[], JournalStore]]:
    """Make stores on one journal; they are closed at the end."""
    made: list[JournalStore] = []

    def open_one() -> JournalStore:
        store = place.store()
        store.open()
        made.append(store)
        return store

    yield open_one
    for store in made:
        store.close()


@pytest.fixture
def store(opened: Callable[[], JournalStore]) -> JournalStore:
    return opened()
