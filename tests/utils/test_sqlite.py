# this_file: tests/utils/test_sqlite.py
"""SQLite files stay usable: new, locked, damaged, deleted, replaced, read-only, forked, foreign."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from opero.errors import OperoWarning, StoreError
from opero.utils.sqlite import SqliteFile, advice

pytestmark = pytest.mark.internal

SCRIPT = "CREATE TABLE Answer (text TEXT); PRAGMA user_version = 7"
posix = pytest.mark.skipif(os.name != "posix", reason="permissions and forks of POSIX")


def verify(connection: sqlite3.Connection) -> None:
    if connection.execute("PRAGMA user_version").fetchone() != (7,):
        raise StoreError("it is of another program")


def make(path: Path, **options: Any) -> SqliteFile:
    return SqliteFile(path, script=SCRIPT, verify=verify, timeout=0.2, **options)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.db"


def put(file: SqliteFile, text: str = "x") -> None:
    file.write("INSERT INTO Answer VALUES (?)", (text,))


def texts(file: SqliteFile) -> list[str]:
    return [text for (text,) in file.read("SELECT text FROM Answer ORDER BY rowid")]


def descriptors(path: Path) -> int:
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            found += str(path) in str(link.readlink())
        except OSError:
            pass
    return found


def test_what_is_written_is_read_by_the_next_one(path):
    file = make(path)
    assert texts(file) == []
    put(file)
    file.close()
    assert texts(make(path)) == ["x"]
    assert [entry.name for entry in path.parent.iterdir() if entry.name.startswith(".")] == []


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_brief_reads_and_writes_share_one_connection(path):
    file = make(path)
    query = "SELECT text FROM Answer"
    assert file.read(query, brief=True) == []
    opened = descriptors(path)
    put(file)
    assert file.read(query, brief=True) == [("x",)]
    assert descriptors(path) == opened
    file.close()


def test_a_brief_read_of_a_file_that_is_read_only_works(path, monkeypatch):
    query = "SELECT text FROM Answer"
    put(make(path))
    monkeypatch.setattr("opero.utils.sqlite._is_writable", lambda path: False)
    file = make(path)
    assert file.read(query, brief=True) == file.read(query, brief=True) == [("x",)]
    assert file.read_only


def test_a_brief_read_asks_the_connection_that_writes_and_never_waits_for_it(path):
    file = make(path)
    put(file)
    query = "SELECT text FROM Answer"
    assert file.read(query, brief=True) == [("x",)]
    found: list[Any] = []
    with file.transaction() as connection:
        connection.execute("INSERT INTO Answer VALUES ('y')")
        reader = threading.Thread(target=lambda: found.extend(file.read(query, brief=True)))
        reader.start()
        reader.join(10)
        assert found == [("x",)]
    assert file.read(query, brief=True) == [("x",), ("y",)]


def test_a_transaction_is_written_as_a_whole_or_not_at_all(path):
    file = make(path)
    with pytest.raises(StoreError, match="bindings"), file.transaction() as connection:
        connection.execute("INSERT INTO Answer VALUES ('half')").execute("SELECT ?", ())
    assert texts(file) == []
    with file.transaction() as connection:
        connection.execute("INSERT INTO Answer VALUES ('whole')")
    assert texts(file) == ["whole"]


@posix
def test_files_are_closed_to_others(path):
    old = os.umask(0)
    try:
        file = make(path)
        put(file)
    finally:
        os.umask(old)
    modes = [stat.S_IMODE(entry.stat().st_mode) for entry in path.parent.iterdir()]
    assert len(modes) == 3
    assert set(modes) == {0o600}
    file.close()
    path.chmod(0o644)
    texts(file)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_locked_file_is_read_and_writing_fails_after_the_timeout(path):
    file = make(path)
    put(file)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert texts(file) == ["x"]
    with pytest.raises(StoreError, match="held the file"):
        put(file)
    other.close()
    put(file)


@pytest.mark.parametrize("size", [10, 5000])
def test_a_file_that_was_cut_off_is_set_aside(path, size):
    file = make(path, on_damage="replace")
    for n in range(300):
        put(file, str(n) * 100)
    file.close()
    content = path.read_bytes()[:size]
    path.write_bytes(content)
    file = make(path, on_damage="replace")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert texts(file) == []
        put(file, "anew")
    assert texts(file) == ["anew"]
    (aside,) = path.parent.glob("a.db.damaged-*")
    assert aside.read_bytes() == content
    assert [str(one.message) for one in seen if aside.name in str(one.message)]
    assert len(seen) == 1


def test_a_file_of_noise_is_set_aside_where_all_in_the_folder_is_ours(path):
    path.write_bytes(os.urandom(20_000))
    with pytest.warns(OperoWarning, match=r"set aside as .*damaged"):
        assert texts(make(path, on_damage="replace")) == []


def test_damage_that_shows_while_the_file_is_open_is_mended(path):
    file = make(path, on_damage="replace")
    for n in range(2000):
        put(file, str(n) * 100)
    file.close()
    file.read("SELECT 1")
    with path.open("r+b") as raw:
        raw.seek(8192)
        raw.write(os.urandom(100_000))
    with pytest.warns(OperoWarning, match="set aside"):
        assert texts(file) == []
    put(file)
    assert texts(file) == ["x"]


def test_what_does_not_look_like_a_database_is_left_as_it_is(path):
    path.write_bytes(b"my thesis" * 1000)
    for choice in ("replace database", "raise"):
        with pytest.raises(StoreError, match=r"a\.db.*not a database"):
            texts(make(path, on_damage=choice))
    assert path.read_bytes() == b"my thesis" * 1000
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_a_database_of_another_program_is_left_exactly_as_it_was(path, mode):
    with sqlite3.connect(path) as other:
        other.execute(f"PRAGMA journal_mode={mode}")
        other.execute("CREATE TABLE Theirs (n)")
    other.close()
    path.chmod(0o644)
    before = path.read_bytes(), path.stat().st_mode
    with pytest.raises(StoreError, match="another program"):
        texts(make(path))
    assert (path.read_bytes(), path.stat().st_mode) == before
    assert list(path.parent.iterdir()) == [path]


def delete(path: Path) -> None:
    for entry in path.parent.iterdir():
        entry.unlink()


def replace(path: Path) -> None:
    delete(path)
    other = make(path)
    put(other, "theirs")
    other.close()


@pytest.mark.parametrize(("change", "there"), [(delete, []), (replace, ["theirs"])])
def test_a_file_that_is_gone_is_made_anew(path, change, there):
    file = make(path, on_damage="replace")
    put(file)
    change(path)
    assert texts(file) == there
    put(file, "y")
    assert texts(make(path)) == [*there, "y"]


@pytest.mark.parametrize("change", [delete, replace])
def test_a_file_that_is_gone_is_an_error_where_nothing_may_be_lost(path, change):
    file = make(path)
    put(file)
    change(path)
    for use in (texts, put):
        with pytest.raises(StoreError, match="deleted or replaced"):
            use(file)
    file.close()
    put(file)


class BrokenConnection:
    """A connection whose disk fails."""

    def cursor(self) -> Any:
        return self

    def execute(self, *_: Any) -> Any:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorname = "SQLITE_IOERR_SHORT_READ"
        raise error

    def close(self) -> None:
        pass


def test_a_connection_that_meets_an_error_of_the_disk_is_opened_anew(path):
    file = make(path, on_damage="replace")
    put(file)
    file._reader = BrokenConnection()  # type: ignore[assignment]
    with pytest.raises(StoreError, match="the disk failed"):
        texts(file)
    assert texts(file) == ["x"]


def test_what_was_beside_a_deleted_file_is_not_read_into_the_new_one(path):
    file = make(path)
    put(file)
    log = Path(f"{path}-wal").read_bytes()
    file.close()
    path.unlink()
    Path(f"{path}-wal").write_bytes(log)
    assert texts(make(path)) == []


READER = """
import ctypes, sys
from tests.utils.test_sqlite import StoreError, make, put, texts
file = make(sys.argv[1])
print(texts(file), file.read_only)
try:
    put(file)
except StoreError as error:
    print(error)
"""


@posix
@pytest.mark.parametrize("open_elsewhere", [True, False])
def test_a_file_in_a_read_only_folder_is_read(path, open_elsewhere):
    file = make(path)
    put(file)
    if not open_elsewhere:
        file.close()
    for entry in path.parent.iterdir():
        entry.chmod(0o400)
    path.parent.chmod(0o500)

    def obey_modes() -> None:
        if os.geteuid() == 0:  # without root's right to write against the modes
            ctypes.CDLL(None).prctl(24, 1)

    reported = subprocess.run(
        [sys.executable, "-c", READER, str(path)],
        capture_output=True, text=True, timeout=20, preexec_fn=obey_modes, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    path.parent.chmod(0o700)
    if "False" in reported.stdout:
        pytest.skip("folders cannot be made read-only here")
    assert reported.stdout.splitlines()[0] == "['x'] True", reported.stderr
    assert "read-only" in reported.stdout.splitlines()[1]


def test_an_open_file_that_has_lost_its_tables_is_begun_anew(path):
    file = make(path, on_damage="replace")
    put(file)
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("DROP TABLE Answer")
        other.commit()
    with pytest.warns(OperoWarning, match="no such table.*set aside"):
        assert texts(file) == []
    put(file)
    assert texts(file) == ["x"]


def test_a_full_disk_is_named(path):
    file = make(path)
    put(file)
    file._writer.execute("PRAGMA max_page_count = 2")  # type: ignore[union-attr]
    with pytest.raises(StoreError, match="disk is full"):
        put(file, "x" * 100_000)
    assert texts(file) == ["x"]


BEGINNERS = """
import sys
from tests.utils.test_sqlite import make, put
for n in range(20):
    file = make(f"{sys.argv[1]}/{n}.db", synchronous="FULL")
    file.timeout = 30
    put(file, sys.argv[2])
    file.close()
"""


def test_programs_that_begin_files_at_once_wait_for_no_other(tmp_path):
    children = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(BEGINNERS), str(tmp_path), str(n)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(3)
    ]
    reported = [child.communicate(timeout=100)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], reported
    for n in range(20):
        file = make(tmp_path / f"{n}.db")
        assert sorted(texts(file)) == ["0", "1", "2"]
        file.close()


@posix
def test_a_forked_child_opens_its_own_connections(path):
    file = make(path)
    put(file, "parent")
    child = os.fork()
    if not child:
        try:
            put(file, "child")
            assert texts(file) == ["parent", "child"]
            file.close()
        except BaseException:  # noqa: BLE001 - the child must not go on
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    put(file, "after")
    assert texts(file) == ["parent", "child", "after"]


def use(file: SqliteFile) -> None:
    for n in range(20):
        put(file, str(n))
        texts(file)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_threads_share_two_connections_that_are_closed_with_the_object(path):
    file = make(path)
    threads = [threading.Thread(target=use, args=(file,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts(file)) == 160
    assert 0 < descriptors(path) <= 6
    del file, threads, thread
    gc.collect()
    assert descriptors(path) == 0


def test_an_empty_file_is_filled(path):
    path.touch()
    file = make(path)
    put(file)
    assert texts(file) == ["x"]


def test_errors_say_what_to_do():
    assert advice(sqlite3.OperationalError("odd")) == "odd"


class InterruptedLock:
    """A lock whose taker gets Ctrl-C as it has taken it."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self.release = lock.release

    def acquire(self, *args: Any) -> None:
        self._lock.acquire(*args)
        raise KeyboardInterrupt


def test_ctrl_c_as_a_reader_takes_the_writers_connection_leaves_it_to_other_threads(
    tmp_path: Path,
) -> None:
    file = SqliteFile(tmp_path / "a.db", script="CREATE TABLE T (a)")
    file.write("INSERT INTO T VALUES (1)")
    lock = file._writing
    file._writing = InterruptedLock(lock)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        file.read("SELECT a FROM T", brief=True)
    file._writing = lock
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(file.write, "INSERT INTO T VALUES (2)").result(60) == 1
    file.close()
