# this_file: tests/caching/stores/test_disk_store.py
"""The store on disk from within: other writers, killed ones, a full disk, and its descriptors."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.utils.test_sqlite import descriptors

from opero import opero
from opero.caching import lease
from opero.caching.stores import disk
from opero.caching.stores.disk import DiskStore
from opero.errors import StoreError

pytestmark = pytest.mark.internal

CONTENTION_SECONDS = 5.0
"""How long two processes write the same keys; a minute was run by hand."""

KILLS = 5
"""How often a writer is killed; a hundred were killed by hand."""

LARGE = 200_000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    made = DiskStore(tmp_path / "cache")
    yield made
    made.close()


def rows(store: DiskStore, statement: str, *arguments: object) -> list[Any]:
    """Look into the database past the store, or change it."""
    with sqlite3.connect(Path(store.folder) / "cache.db") as connection:
        found = connection.execute(statement, arguments).fetchall()
    connection.close()
    return found


def files(store: DiskStore) -> list[Path]:
    return sorted(Path(store.folder).glob("*/*.val"))


# --- tampering ------------------------------------------------------------------------------------


def large(x: int) -> str:
    return str(x) * LARGE


# --- a folder that changes under the program ------------------------------------------------------


def test_a_cache_that_fills_the_disk_can_be_cleared(store, monkeypatch):
    """Removing rows takes room, too: the files of large values make it."""
    store.set("a:k", os.urandom(200_000), None)
    transaction = store._transaction

    def while_there_is_room() -> Any:
        if any(Path(store.folder).glob("??/*.val")):
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorname = "SQLITE_FULL"
            raise StoreError("the disk is full") from error
        return transaction()

    monkeypatch.setattr(store, "_transaction", while_there_is_room)
    assert store.clear("a:") == 1
    assert store.get("a:k") is None


def test_a_deleted_folder_is_noticed_by_hits(store):
    store.set("a:k", b"x", None)
    shutil.rmtree(store.folder)
    time.sleep(disk._UNWATCHED)
    assert store.get("a:k") is None
    assert store.measure("") == (0, 0)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_many_functions_share_the_descriptors_of_one_store_which_the_last_one_closes(tmp_path):
    functions = [
        opero(cache_backend=f"disk:{tmp_path / 'cache'}", cache_version=str(n))(large)
        for n in range(20)
    ]
    for f in functions:
        threads = [threading.Thread(target=f, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert 0 < descriptors(tmp_path) <= 6
    lease._renewer.flush()
    del functions, f, threads, thread
    gc.collect()
    assert descriptors(tmp_path) == 0


# --- other writers --------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_TIMEOUT", 0.05)


def test_a_locked_folder_is_read_all_the_same_and_writers_fail_fast(tmp_path, impatient):
    store = DiskStore(tmp_path / "cache")
    store.set("a:k", b"x", None)
    lock = sqlite3.connect(Path(store.folder) / "cache.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    assert store.get("a:k") == b"x"
    with pytest.raises(StoreError, match="keep its folder locked"):
        store.set("a:k", b"y" * LARGE, None)
    assert files(store) == [], "what could not be stored is not left behind"
    with pytest.raises(StoreError, match="keep its folder locked"):
        store.acquire([("a:k", "me")], 30)
    lock.execute("ROLLBACK")
    lock.close()
    store.close()


def test_after_a_writer_that_waited_in_vain_the_next_ones_do_not_wait(tmp_path, impatient, clock):
    store = DiskStore(tmp_path / "cache")
    store.set("a:k", b"x", None)
    lock = sqlite3.connect(Path(store.folder) / "cache.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError):
        store.set("a:k", b"y", None)
    lock.execute("ROLLBACK")
    lock.close()
    with pytest.raises(StoreError, match="locked"):
        store.set("a:k", b"y", None)
    clock.advance(20)
    store.set("a:k", b"y", None)
    assert store.get("a:k") == b"y"
    store.close()


WRITER = """
import sys, time
from pathlib import Path
from opero.caching.stores.disk import DiskStore
from opero.caching.stores.base import StoreError

def blob(key, n):
    return (f"{key}:{n}:" * (30_000 if n % 5 == 0 else 3)).encode()

def whole(key, found):
    text = found.decode()
    return text == f"{key}:{text.split(':')[1]}:" * (len(text) // len(f"{key}:{text.split(':')[1]}:"))

store = DiskStore(Path(sys.argv[1]))
seconds = float(sys.argv[2])
store.get("k0")  # what the first call imports is not what is timed
end, n, lost, busy = time.monotonic() + seconds, 0, 0, 0
while n <= 100 or time.monotonic() < end:  # a loaded machine takes longer
    n += 1
    key = f"k{n % 20}"
    try:
        store.set(key, blob(key, n), 600)
    except StoreError as error:
        assert "locked" in str(error), error
        busy += 1
    own = f"{sys.argv[3]}:{n}"
    if n % 10 == 0:
        try:
            store.set(own, blob(own, n), 600)
        except StoreError:
            busy += 1
            continue
        lost += store.get(own) != blob(own, n)
    found = store.get(key)
    # The other process may be replacing the file between row and file.
    assert found is None or whole(key, found), key
print(n, lost, busy)
"""


def start(tmp_path: Path, *arguments: object, source: str = WRITER) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
    )


@pytest.mark.timeout(90)
def test_two_processes_that_write_the_same_keys_lose_and_corrupt_nothing(tmp_path):
    writers = [start(tmp_path, tmp_path / "cache", CONTENTION_SECONDS, n) for n in "ab"]
    reported = [writer.communicate(timeout=CONTENTION_SECONDS + 60)[0] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], reported
    for text in reported:
        written, lost, busy = map(int, text.split())
        assert written > 100
        assert lost == 0
        assert busy <= written / 100
    store = DiskStore(tmp_path / "cache")
    found = {item.key: store.get(item.key) for item in store.scan("")}
    assert all(found.values())
    assert {f"k{n}" for n in range(20)} <= found.keys()
    assert rows(store, "PRAGMA integrity_check") == [("ok",)]
    assert len(files(store)) == sum(len(blob) >= 131_072 for blob in found.values() if blob)
    store.close()


@pytest.mark.timeout(120)
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_writers_that_are_killed_leave_a_readable_cache(tmp_path):
    store = DiskStore(tmp_path / "cache")
    store.set("a:kept", b"x" * LARGE, None)
    for n in range(KILLS):
        writer = start(tmp_path, tmp_path / "cache", 60, n)
        end = time.monotonic() + 100
        while store.get(f"{n}:10") is None:
            assert time.monotonic() < end, writer.poll()
            time.sleep(0.002)
        time.sleep(n * 0.003)
        writer.kill()
        writer.communicate()
        store.set("a:next", str(n).encode(), None)
        assert store.get("a:next") == str(n).encode()
    assert store.get("a:kept") == b"x" * LARGE
    for item in store.scan("k"):
        blob = store.get(item.key)
        assert blob is not None
        assert len(set(blob.split(b":")[1::2])) == 1, "whole or not at all"
    assert rows(store, "PRAGMA integrity_check") == [("ok",)]
    store.close()
