# this_file: tests/caching/test_source_change.py
"""A function that was edited keeps its entries, and says so once."""

from __future__ import annotations

import importlib.util
import sqlite3
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from opero import opero
from opero.events import CacheSkipped, FunctionEdited

BEFORE = """
def f(x):
    return [x]
"""


@pytest.fixture
def load(tmp_path: Path):
    """Import a module anew from its source, as the next process would."""
    number = iter(range(100))

    def load(source: str) -> ModuleType:
        path = tmp_path / f"edited_{next(number)}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location("edited", path)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.modules.pop("edited", None)


def call(face: Any, fn: Any, place: str, **options: Any) -> tuple[Any, list[type], Any]:
    """Call a function as a new process would; return its result, the events, and the function."""
    received: list[Any] = []
    f = opero(cache_backend=place, on_event=received.append, **options)(face.of(fn))
    results = [face.run(f, 1), face.run(f, 1)]
    assert not [event for event in received if isinstance(event, CacheSkipped)]
    return results[0], [type(event) for event in received].count(FunctionEdited), f.stats.misses


def test_an_edited_function_keeps_its_entries_and_says_so_once(load, tmp_path):
    from tests.conftest import Face

    face, place = Face(asynchronous=False), f"disk:{tmp_path / 'cache'}"
    assert call(face, load(BEFORE).f, place) == ([1], 0, 1)
    assert call(face, load(BEFORE).f, place) == ([1], 0, 0)
    edited = BEFORE.replace("[x]", "[x, x]")
    assert call(face, load(edited).f, place) == ([1], 1, 0)
    assert call(face, load(edited).f, place) == ([1], 0, 0)


def test_an_edited_function_can_start_afresh(load, tmp_path):
    from tests.conftest import Face

    face, place = Face(asynchronous=False), f"disk:{tmp_path / 'cache'}"
    call(face, load(BEFORE).f, place)
    edited = load(BEFORE.replace("[x]", "[x, x]")).f
    assert call(face, edited, place, cache_version=2) == ([1, 1], 0, 1)


def counted(x: int) -> int:
    return x


def test_event_loops_hear_of_it_too(place_of_edits):
    from tests.conftest import Face

    place, forge = place_of_edits
    face = Face(asynchronous=True)
    call(face, counted, place)
    forge()
    assert call(face, counted, place)[1:] == (1, 0)


@pytest.fixture
def place_of_edits(tmp_path: Path):
    """A place, and what makes it believe that its functions looked otherwise."""
    place = f"disk:{tmp_path / 'cache'}"

    def forge() -> None:
        with sqlite3.connect(tmp_path / "cache" / "cache.db") as connection:
            connection.execute("UPDATE Cache SET value = ? WHERE key LIKE '~code:%'", (b"another",))
        connection.close()

    return place, forge


def test_marks_are_no_entries(tmp_path):
    f = opero(cache_backend=f"disk:{tmp_path / 'cache'}")(counted)
    f(1)
    assert f.cache.info().size == 1
    assert f.cache.clear() == 1
