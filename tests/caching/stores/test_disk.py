# this_file: tests/caching/stores/test_disk.py
"""What is special about disk: its bounds, tampering, other writers, killed ones, and the host program."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.caching.stores.host import run_guarded
from tests.utils.test_sqlite import descriptors

from opero import opero
from opero.caching import lease
from opero.caching.stores import disk
from opero.caching.stores.disk import DiskStore
from opero.errors import OperoWarning, StoreError
from opero.events import CacheSkipped

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


def limit(store: DiskStore) -> int:
    ((found,),) = rows(store, "SELECT value FROM Setting WHERE key = 'size_limit'")
    return int(found)


def files(store: DiskStore) -> list[Path]:
    return sorted(Path(store.folder).glob("*/*.val"))


# --- bounds ---------------------------------------------------------------------------------------


def test_what_is_stored_anew_counts_as_the_newest(store):
    for key in ("a:1", "a:2", "a:1"):
        store.set(key, key.encode(), 60)
    assert rows(store, "SELECT key FROM Cache ORDER BY rowid") == [("a:2",), ("a:1",)]


def test_a_folder_stays_within_its_bytes(store):
    store.allow(4_000_000)
    for n in range(60):
        store.set(f"a:{n}", os.urandom(LARGE), None)
    taken = sum(path.stat().st_size for path in Path(store.folder).rglob("*.val"))
    assert taken < 4_500_000
    assert store.get("a:59") is not None
    assert store.get("a:0") is None, "what was stored first goes first"
    assert len(files(store)) == store.measure("")[0]


def test_the_largest_bound_that_was_asked_for_is_remembered(tmp_path):
    for asked, wanted in ((1_000_000, 1_000_000), (5_000_000, 5_000_000), (300_000, 5_000_000)):
        store = DiskStore(tmp_path / "cache")
        store.allow(asked)
        store.set("a:k", b"x", None)
        assert limit(store) == wanted
        store.close()


def test_a_bound_can_be_raised_while_the_folder_is_open(store):
    store.allow(1_000_000)
    store.set("a:k", b"x", None)
    store.allow(3_000_000)
    store.set("a:k", b"x", None)
    assert limit(store) == 3_000_000


def test_replaced_and_deleted_values_leave_no_files(store):
    for _ in range(3):
        store.set("a:k", os.urandom(LARGE), None)
    assert len(files(store)) == 1
    store.delete("a:k")
    store.set("a:1", os.urandom(LARGE), None)
    store.clear("a:")
    assert files(store) == []


def test_what_killed_writers_left_is_swept_up_once_a_day(store):
    store.set("a:k", os.urandom(LARGE), None)
    old, new = (Path(store.folder) / "aa" / f"{n * 30}.val" for n in "01")
    old.parent.mkdir(exist_ok=True)
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    os.utime(files(store)[0] if files(store)[0] not in (old, new) else files(store)[-1], (0, 0))
    store.close()
    store.get("a:k")
    assert old.exists(), "it was swept today"
    store.close()
    rows(store, "UPDATE Setting SET value = 0 WHERE key = 'swept'")
    assert store.get("a:k") is not None
    assert not old.exists()
    assert new.exists(), "its writer may still be at work"


# --- tampering ------------------------------------------------------------------------------------


class Planted:
    """Whoever unpickles it is caught."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('unpickled')",)


def plant_pickle(store: DiskStore) -> None:
    rows(store, "UPDATE Cache SET value = ?, filename = NULL", pickle.dumps(Planted()))


def plant_pickle_in_file(store: DiskStore) -> None:
    files(store)[0].write_bytes(pickle.dumps(Planted()))


def flip(store: DiskStore) -> None:
    data = bytearray(files(store)[0].read_bytes())
    data[len(data) // 2] ^= 1
    files(store)[0].write_bytes(data)


def flip_expiry(store: DiskStore) -> None:
    data = bytearray(files(store)[0].read_bytes())
    data[12] ^= 1
    files(store)[0].write_bytes(data)


def cut(store: DiskStore) -> None:
    path = files(store)[0]
    path.write_bytes(path.read_bytes()[:-1])


def empty(store: DiskStore) -> None:
    files(store)[0].write_bytes(b"")


def name(filename: str) -> Callable[[DiskStore], None]:
    def tamper(store: DiskStore) -> None:
        rows(store, "UPDATE Cache SET filename = ?", filename)

    tamper.__name__ = f"name {filename}"
    return tamper


def as_text(store: DiskStore) -> None:
    rows(store, "UPDATE Cache SET value = 'text', filename = NULL")


def as_number(store: DiskStore) -> None:
    rows(store, "UPDATE Cache SET value = 5, filename = NULL")


def as_nothing(store: DiskStore) -> None:
    rows(store, "UPDATE Cache SET value = NULL, filename = NULL")


def under_another_key(store: DiskStore) -> None:
    ((first, one), (second, other)) = rows(store, "SELECT rowid, key FROM Cache ORDER BY rowid")
    rows(store, "UPDATE Cache SET key = 'x' WHERE rowid = ?", first)
    rows(store, "UPDATE Cache SET key = ? WHERE rowid = ?", one, second)
    rows(store, "UPDATE Cache SET key = ? WHERE rowid = ?", other, first)


TAMPERED = [
    plant_pickle, plant_pickle_in_file, flip, flip_expiry, cut, empty, as_text, as_number,
    as_nothing, under_another_key, name("../../etc/passwd"), name("/etc/passwd"), name("cache.db"),
    name("ab/../../secret.val"), name("ab/" + "0" * 30 + ".val/.."), name(""), name("ab\\" + "0" * 30 + ".val"),
]  # fmt: skip


def large(x: int) -> str:
    return str(x) * LARGE


@pytest.mark.parametrize("tamper", TAMPERED, ids=lambda tamper: tamper.__name__)
def test_what_was_tampered_with_is_a_miss_and_an_event(tmp_path, tamper):
    secret = tmp_path / "secret.val"
    secret.write_text("not yours")
    received: list[str] = []

    def listen(event: object) -> None:
        if isinstance(event, CacheSkipped):
            received.append(event.reason)

    f = opero(cache_backend=f"disk:{tmp_path / 'cache'}", on_event=listen)(large)
    f(1), f(2)
    rows_of = DiskStore(tmp_path / "cache")
    rows(rows_of, "DELETE FROM Cache WHERE key LIKE '~%'")
    if tamper is not under_another_key:
        f.cache.invalidate(2)
    tamper(rows_of)
    assert f(1) == "1" * LARGE
    assert f.stats.hits == 0
    assert any("could not be read: an entry" in reason for reason in received), received
    assert all("passwd" not in reason for reason in received)
    assert f(1) == "1" * LARGE
    assert f.stats.hits == 1, "it was stored anew"
    f.cache.clear()
    assert secret.read_text() == "not yours", "nothing outside the folder is deleted"


def test_a_file_that_is_gone_is_a_miss(tmp_path):
    f = opero(cache_backend=f"disk:{tmp_path / 'cache'}")(large)
    f(1)
    for path in files(DiskStore(tmp_path / "cache")):
        path.unlink()
    assert f(1) == "1" * LARGE


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs links")
def test_a_file_that_became_a_link_is_not_followed(tmp_path, store):
    store.set("a:k", b"x" * LARGE, None)
    (tmp_path / "secret").write_bytes(b"not yours")
    (path,) = files(store)
    path.unlink()
    path.symlink_to(tmp_path / "secret")
    assert store.get("a:k") is None


# --- a folder that changes under the program ------------------------------------------------------


def spoil(store: DiskStore, content: bytes) -> None:
    store.close()
    for path in Path(store.folder).glob("cache.db*"):
        path.unlink()
    (Path(store.folder) / "cache.db").write_bytes(content)


def test_a_damaged_database_is_set_aside_and_begun_anew(store):
    store.set("a:k", b"x", None)
    spoil(store, b"no database" * 1000)
    with pytest.warns(
        OperoWarning, match=r"disk cache .* was damaged .* set aside as .*cache\.db\.damaged"
    ):
        assert store.get("a:k") is None
    store.set("a:k", b"y", None)
    assert DiskStore(store.folder).get("a:k") == b"y"


def test_a_damaged_database_can_be_cleared(store):
    store.set("a:k", b"x", None)
    spoil(store, b"no database" * 1000)
    with pytest.warns(OperoWarning, match="set aside"):
        assert store.clear("") == 0
    store.set("a:k", b"y", None)
    assert store.get("a:k") == b"y"


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


def test_damage_that_shows_while_rows_are_written_costs_that_write_only(store):
    for n in range(50):
        store.set(f"a:{n}", b"x" * 10_000, None)
    store.close()
    store.measure("nothing")
    with (Path(store.folder) / "cache.db").open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(200_000))
    with pytest.warns(OperoWarning, match="set aside"), contextlib.suppress(StoreError):
        store.set("a:k", b"y", None)
    store.set("a:k", b"y", None)
    assert store.get("a:k") == b"y"


@pytest.mark.parametrize("size", [10, LARGE])
@pytest.mark.parametrize("whole", [True, False], ids=["removed", "emptied"])
def test_a_deleted_folder_is_made_anew_as_a_whole(store, size, whole):
    store.set("a:k", b"x" * size, None)
    if whole:
        shutil.rmtree(store.folder)
    else:
        for path in Path(store.folder).iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    store.set("a:j", b"y" * size, None)
    assert store.get("a:k") is None
    assert store.get("a:j") == b"y" * size
    assert (Path(store.folder) / "CACHEDIR.TAG").exists()
    assert DiskStore(store.folder).get("a:j") == b"y" * size


def test_a_deleted_folder_is_noticed_by_hits(store):
    store.set("a:k", b"x", None)
    shutil.rmtree(store.folder)
    time.sleep(disk._UNWATCHED)
    assert store.get("a:k") is None
    assert store.measure("") == (0, 0)


def test_a_lease_that_never_ends_is_not_believed(store):
    rows_of = DiskStore(store.folder)
    rows_of.set("a:k", b"x", None)
    rows(rows_of, "INSERT INTO Lease VALUES ('a:k', 'squatter', 1e300)")
    assert all(store.acquire([("a:k", "me")], 5))
    assert not all(store.acquire([("a:k", "you")], 5))


def test_an_entry_larger_than_any_may_be_is_not_read(store):
    for size in (150_000, 250_000):
        store.set("a:k", b"x" * size, None)
        store.max_bytes = size // 2
        with pytest.raises(StoreError, match="larger than cache_max_bytes"):
            store.get("a:k")
    rows(store, "UPDATE Cache SET value = zeroblob(300000), filename = NULL")
    with pytest.raises(StoreError, match="larger than cache_max_bytes"):
        store.get("a:k")


def other_program(path: Path) -> None:
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE Theirs (n)")
    other.close()


def earlier_version(path: Path) -> None:
    """Make the database that opero had with the library diskcache."""
    import diskcache

    with diskcache.Cache(str(path.parent)) as cache:
        cache.set("a:k", b"x")


@pytest.mark.parametrize("make", [other_program, earlier_version])
def test_the_database_of_another_program_or_version_is_set_aside(store, make):
    store.set("a:k", b"x", None)
    store.close()
    (Path(store.folder) / "cache.db").unlink()
    make(Path(store.folder) / "cache.db")
    with pytest.warns(OperoWarning, match="another program or version.*set aside"):
        assert store.get("a:k") is None


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


# --- restarts, threads and the host program -------------------------------------------------------

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
        from opero.caching.handles import get_cache_context

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


def test_nothing_is_made_before_the_first_call(tmp_path):
    f = opero(cache_backend=f"disk:{tmp_path / 'cache'}")(large)
    f.explain(), repr(f)
    assert not (tmp_path / "cache").exists()


def test_a_store_that_is_collected_closes_its_connections(tmp_path):
    """From Python 3.13 on, one that is not closed before warns."""
    unraised: list[object] = []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "unraisablehook", unraised.append)
        warnings.simplefilter("error")
        for n in range(5):
            store = DiskStore(tmp_path / str(n))
            store.set("k", b"1", None)
            store.itself = store  # type: ignore[attr-defined]  # so that it is part of a cycle
            del store
            gc.collect()
    assert not unraised
