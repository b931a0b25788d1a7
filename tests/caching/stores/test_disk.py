# this_file: tests/caching/stores/test_disk.py
"""What is special about disk: its bounds, tampering, a folder that changes under the program, and the host program."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.caching.stores.host import run_guarded

from opero import opero
from opero.core import get_cache_context
from opero.errors import OperoWarning, StoreError
from opero.events import CacheSkipped

LARGE = 200_000
"""Bytes of a value that gets a file of its own."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def context(folder: Path) -> Any:
    """Return what sets and gets values in a folder without the lease of a call."""
    return get_cache_context(f"disk:{folder}")


def close() -> None:
    """Close the stores of functions and contexts that are gone."""
    gc.collect()


def rows(folder: Path, statement: str, *arguments: object) -> list[Any]:
    """Look into the database past the store, or change it."""
    with sqlite3.connect(folder / "cache.db") as connection:
        found = connection.execute(statement, arguments).fetchall()
    connection.close()
    return found


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.val"))


def value(x: int) -> str:
    return str(x) * 20


def large(x: int) -> str:
    return str(x)[-1] * LARGE


def cached(fn: Callable[[int], str], folder: Path, **options: Any) -> tuple[Any, list[str]]:
    """Return a function with a cache in a folder, and a list of the reasons for which the cache was skipped."""
    received: list[str] = []

    def listen(event: object) -> None:
        if isinstance(event, CacheSkipped):
            received.append(event.reason)

    options = {"cache_backend": f"disk:{folder}", "retries": 0, "on_event": listen} | options
    return opero(**options)(fn), received


# --- bounds ---------------------------------------------------------------------------------------


def test_a_folder_stays_within_its_bytes_and_what_was_stored_first_goes_first(folder):
    f, _ = cached(large, folder, cache_max_bytes=2_000_000)
    for n in range(30):
        f(n)
    assert sum(path.stat().st_size for path in files(folder)) < 2_300_000
    assert [f.call(n).source for n in range(23, 30)] == ["hit"] * 7
    assert f.call(0).source == "fresh"


def test_what_is_stored_anew_counts_as_the_newest(folder):
    f, _ = cached(large, folder, cache_max_bytes=2_000_000)
    for n in range(8):
        f(n)
    f.cache.refresh(0)
    for n in range(8, 12):
        f(n)
    assert [f.call(n).source for n in (0, 1)] == ["hit", "fresh"]


def test_the_largest_bound_that_any_function_has_asked_for_holds(folder):
    f, _ = cached(large, folder, cache_max_bytes=300_000)
    f(0)
    g, _ = cached(large, folder, cache_max_bytes=3_000_000, cache_version=2)
    for n in range(8):
        g(n)
    assert [g.call(n).source for n in range(8)] == ["hit"] * 8
    del f, g
    close()
    h, _ = cached(value, folder, cache_max_bytes=300_000)
    for n in range(20):
        h(n)
    again, _ = cached(large, folder, cache_max_bytes=300_000, cache_version=2)
    assert [again.call(n).source for n in range(8)] == ["hit"] * 8


def test_what_has_expired_goes_when_there_is_something_new_to_store(folder):
    with context(folder) as cache:
        for n in range(10):
            cache.set(n, "x" * LARGE, ttl=0.001)
        for n in range(20):
            cache.set(f"new {n}", "y")
        assert files(folder) == []
        assert [cache.get(f"new {n}") for n in range(20)] == ["y"] * 20


def test_replaced_and_deleted_values_leave_no_files(folder):
    f, _ = cached(large, folder)
    f(1)
    for _ in range(2):
        f.cache.refresh(1)
    assert len(files(folder)) == 1
    f.cache.invalidate(1)
    assert files(folder) == []
    f(1), f(2)
    f.cache.clear()
    assert files(folder) == []


def test_what_killed_writers_left_is_swept_up_once_a_day(folder):
    context(folder).set("k", "x" * LARGE)
    (kept,) = files(folder)
    old, new = (folder / "aa" / f"{n * 30}.val" for n in "01")
    draft, foreign = folder / ".cache.db.1.ab", folder / "aa" / "notes.txt"
    old.parent.mkdir(exist_ok=True)
    for path in (old, new, draft, foreign):
        path.write_bytes(b"x")
    for path in (kept, old, draft, foreign):
        os.utime(path, (0, 0))
    close()
    assert context(folder).get("k")
    assert old.exists(), "it was swept today"
    close()
    rows(folder, "UPDATE Setting SET value = 0 WHERE key = 'swept'")
    assert context(folder).get("k") == "x" * LARGE
    assert [path.exists() for path in (old, draft, new, foreign)] == [False, False, True, True]


# --- tampering ------------------------------------------------------------------------------------


class Planted:
    """Whoever unpickles it is caught."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('unpickled')",)


def plant_pickle(folder: Path) -> None:
    rows(folder, "UPDATE Cache SET value = ?, filename = NULL", pickle.dumps(Planted()))


def plant_pickle_in_file(folder: Path) -> None:
    files(folder)[0].write_bytes(pickle.dumps(Planted()))


def flip(folder: Path) -> None:
    data = bytearray(files(folder)[0].read_bytes())
    data[len(data) // 2] ^= 1
    files(folder)[0].write_bytes(data)


def flip_expiry(folder: Path) -> None:
    data = bytearray(files(folder)[0].read_bytes())
    data[12] ^= 1
    files(folder)[0].write_bytes(data)


def cut(folder: Path) -> None:
    path = files(folder)[0]
    path.write_bytes(path.read_bytes()[:-1])


def empty(folder: Path) -> None:
    files(folder)[0].write_bytes(b"")


def name(filename: str) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        rows(folder, "UPDATE Cache SET filename = ?", filename)

    tamper.__name__ = f"name {filename}"
    return tamper


def as_text(folder: Path) -> None:
    rows(folder, "UPDATE Cache SET value = 'text', filename = NULL")


def as_number(folder: Path) -> None:
    rows(folder, "UPDATE Cache SET value = 5, filename = NULL")


def as_nothing(folder: Path) -> None:
    rows(folder, "UPDATE Cache SET value = NULL, filename = NULL")


def under_another_key(folder: Path) -> None:
    ((first, one), (second, other)) = rows(folder, "SELECT rowid, key FROM Cache ORDER BY rowid")
    rows(folder, "UPDATE Cache SET key = 'x' WHERE rowid = ?", first)
    rows(folder, "UPDATE Cache SET key = ? WHERE rowid = ?", one, second)
    rows(folder, "UPDATE Cache SET key = ? WHERE rowid = ?", other, first)


TAMPERED = [
    plant_pickle, plant_pickle_in_file, flip, flip_expiry, cut, empty, as_text, as_number,
    as_nothing, under_another_key, name("../../etc/passwd"), name("/etc/passwd"), name("cache.db"),
    name("ab/../../secret.val"), name("ab/" + "0" * 30 + ".val/.."), name(""), name("ab\\" + "0" * 30 + ".val"),
]  # fmt: skip


@pytest.mark.parametrize("tamper", TAMPERED, ids=lambda tamper: tamper.__name__)
def test_what_was_tampered_with_is_a_miss_and_an_event(tmp_path, folder, tamper):
    secret = tmp_path / "secret.val"
    secret.write_text("not yours")
    f, received = cached(large, folder)
    f(1), f(2)
    rows(folder, "DELETE FROM Cache WHERE key LIKE '~%'")
    if tamper is not under_another_key:
        f.cache.invalidate(2)
    tamper(folder)
    assert f(1) == "1" * LARGE
    assert f.stats.hits == 0
    assert any("could not be read: an entry" in reason for reason in received), received
    assert all("passwd" not in reason for reason in received)
    assert f(1) == "1" * LARGE
    assert f.stats.hits == 1, "it was stored anew"
    f.cache.clear()
    assert secret.read_text() == "not yours", "nothing outside the folder is deleted"


def test_an_entry_larger_than_any_may_be_is_not_read(folder):
    f, received = cached(large, folder, cache_max_bytes=300_000)
    f(1)
    with files(folder)[0].open("ab") as file:
        file.write(bytes(200_000))
    for _ in range(2):
        received.clear()
        assert f.call(1).source == "fresh"
        assert any("larger than cache_max_bytes" in reason for reason in received), received
        rows(folder, "UPDATE Cache SET value = zeroblob(400000), filename = NULL")


def test_a_file_that_is_gone_is_a_miss(folder):
    f, received = cached(large, folder)
    f(1)
    for path in files(folder):
        path.unlink()
    assert f.call(1).source == "fresh"
    assert not received


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs links")
def test_a_file_that_became_a_link_is_not_followed(tmp_path, folder):
    f, _ = cached(large, folder)
    f(1)
    (path,) = files(folder)
    path.rename(tmp_path / "secret")
    path.symlink_to(tmp_path / "secret")
    assert f.call(1).source == "fresh"


def test_a_lease_that_never_ends_is_not_believed(folder):
    f, _ = cached(value, folder, deadline=20)
    f(1)
    ((key,),) = rows(folder, "SELECT key FROM Cache WHERE key NOT LIKE '~%'")
    f.cache.invalidate(1)
    rows(folder, "INSERT OR REPLACE INTO Lease VALUES (?, 'squatter', 1e300)", key)
    assert f.call(1).source == "fresh"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(folder):
    f, _ = cached(large, folder)
    f(1)
    (path,) = files(folder)
    path.unlink()
    os.mkfifo(path)
    assert f.call(1).source == "fresh"


def test_a_folder_that_lost_its_tag_is_still_a_cache(tmp_path, folder):
    f, _ = cached(value, folder)
    f(1)
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "CACHEDIR.TAG").unlink()
    f, _ = cached(value, copy)
    assert f.call(1).source == "hit"
    assert (copy / "CACHEDIR.TAG").exists()


def test_settings_that_are_no_numbers_count_as_missing(tmp_path, folder):
    f, _ = cached(value, folder)
    f(1)
    copy = shutil.copytree(folder, tmp_path / "copy")
    rows(copy, "UPDATE Setting SET value = 'x'")
    f, received = cached(value, copy)
    for n in range(40):
        f(n)
    assert f.call(1).source == "hit"
    assert not received


# --- a folder that changes under the program ------------------------------------------------------


def spoil(folder: Path) -> None:
    for path in folder.glob("cache.db*"):
        path.unlink()
    (folder / "cache.db").write_bytes(b"no database" * 1000)


def test_a_damaged_database_is_set_aside_and_begun_anew(folder):
    cache = context(folder)
    cache.set(1, "old")
    spoil(folder)
    with pytest.warns(
        OperoWarning, match=r"disk cache .* was damaged .* set aside as .*cache\.db\.damaged"
    ):
        cache.set(2, "new")
    assert [cache.get(key) for key in (1, 2)] == [None, "new"]


def test_a_damaged_database_can_be_cleared(folder):
    cache = context(folder)
    cache.set(1, "old")
    spoil(folder)
    with pytest.warns(OperoWarning, match="set aside"):
        assert cache.clear() == 0
    cache.set(1, "new")
    assert cache.get(1) == "new"


def test_damage_that_shows_while_rows_are_written_costs_that_write_only(folder):
    cache = context(folder)
    for n in range(50):
        cache.set(n, "x" * 10_000)
    del cache
    close()
    with (folder / "cache.db").open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(200_000))
    f, _ = cached(value, folder)
    with pytest.warns(OperoWarning, match="set aside"):
        assert [f(n) for n in range(3)] == [value(n) for n in range(3)]
    assert f.call(2).source == "hit"


@pytest.mark.parametrize("size", [10, LARGE])
@pytest.mark.parametrize("whole", [True, False], ids=["removed", "emptied"])
def test_a_deleted_folder_is_made_anew_as_a_whole(folder, size, whole):
    cache = context(folder)
    cache.set(1, "x" * size)
    if whole:
        shutil.rmtree(folder)
    else:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    cache.set(2, "y" * size)
    assert [cache.get(key) for key in (1, 2)] == [None, "y" * size]
    assert (folder / "CACHEDIR.TAG").exists()
    assert rows(folder, "SELECT count(*) FROM Cache") == [(1,)]


def other_program(path: Path) -> None:
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE Theirs (n)")
    other.close()


def earlier_version(path: Path) -> None:
    """Make the database that opero had with the library diskcache."""
    import diskcache

    with diskcache.Cache(str(path.parent)) as cache:
        cache.set("a:k", b"x")


def endless_view(path: Path) -> None:
    """Make a database in which each look for an entry would take for ever."""
    with sqlite3.connect(path) as other:
        other.executescript(
            "PRAGMA application_id = 0x6F706463; PRAGMA user_version = 1;"
            "CREATE TABLE Setting (key TEXT PRIMARY KEY, value);"
            "CREATE VIEW Cache AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
            " SELECT 'k' key, NULL expires, i size, NULL filename, x'00' value FROM n;"
        )
    other.close()


@pytest.mark.parametrize("make", [other_program, earlier_version, endless_view])
def test_the_database_of_another_program_or_version_is_set_aside(folder, make):
    cache = context(folder)
    cache.set(1, "old")
    for path in folder.glob("cache.db*"):
        path.unlink()
    make(folder / "cache.db")
    with pytest.warns(OperoWarning, match="another program or version.*set aside"):
        cache.set(2, "new")
    assert [cache.get(key) for key in (1, 2)] == [None, "new"]


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="needs a user that permissions bind"
)
def test_a_folder_that_may_only_be_read_gives_hits_and_says_so_once(folder):
    context(folder).set("k", "v")
    close()
    folder.chmod(0o500)
    try:
        with pytest.warns(OperoWarning, match="is read-only: what it holds is used"):
            assert context(folder).get("k") == "v"
    finally:
        folder.chmod(0o700)


def test_file_that_cannot_be_written_is_an_event_and_leaves_nothing(folder):
    f, received = cached(large, folder)
    cached(value, folder)[0](1)
    # Where the folders of files would be, there are plain files.
    for n in range(256):
        (folder / f"{n:02x}").write_bytes(b"")
    assert f(1) == "1" * LARGE
    assert any("cannot be written" in reason for reason in received), received
    with pytest.raises(StoreError, match="cannot be written"):
        context(folder).set("k", "x" * LARGE)


# --- restarts and the host program ----------------------------------------------------------------

SCRIPT = """
import sys
from opero import opero

@opero(cache_backend="disk:" + sys.argv[1])
def costly(x, *, unit="m"):
    return {x: [unit]}

print(costly(1), costly.stats.hits)
"""


def test_results_survive_the_process_and_are_found_by_the_next(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    reported = []
    for seed in ("0", "1", "random"):
        done = subprocess.run(
            [sys.executable, "script.py", str(tmp_path / "cache")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": seed},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        reported.append(done.stdout.strip() or done.stderr)
    assert reported == ["{1: ['m']} 0", "{1: ['m']} 1", "{1: ['m']} 1"]


def test_the_host_program_notices_nothing(tmp_path):
    run_guarded(
        """
        import asyncio
        from opero import opero, clear_cache
        from opero.core import get_cache_context

        @opero(cache_backend="disk")
        def f(x):
            return [x] * 50_000
        @opero(cache_backend="disk")
        async def g(x):
            return {x}

        assert f(1) == f(1) == [1] * 50_000
        async def main():
            return [await g(1), await g(1)]
        assert asyncio.run(main()) == [{1}, {1}]
        assert (f.stats.hits, g.stats.hits) == (1, 1)
        get_cache_context("disk").set("k", object)
        f.cache.info(), f.cache.invalidate(1), clear_cache(backend="disk")
        """,
        tmp_path,
        OPERO_CACHE_DIR=str(tmp_path / "there"),
        XDG_CONFIG_HOME=str(tmp_path / "config"),
    )
    found = {path.name for path in tmp_path.iterdir()}
    assert found <= {"log", "cwd", "there", "config"}


def test_nothing_is_made_before_the_first_call(folder):
    f, _ = cached(value, folder)
    f.explain(), repr(f)
    assert not folder.exists()


def test_a_store_that_is_collected_closes_its_connections(tmp_path):
    """From Python 3.13 on, one that is not closed before warns."""
    unraised: list[object] = []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "unraisablehook", unraised.append)
        warnings.simplefilter("error")
        for n in range(3):
            cache = context(tmp_path / str(n))
            cache.set("k", 1)
            cache.itself = cache  # so that it is part of a cycle
            del cache
            gc.collect()
    assert not unraised
