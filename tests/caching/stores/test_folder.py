# this_file: tests/caching/stores/test_folder.py
"""The folder of a disk cache belongs to this user, is closed to others, and holds nothing else."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from opero import opero
from opero.caching.stores import disk as folders
from opero.caching.stores.disk import DiskStore, default_folder, locate, prepare_folder, settle
from opero.errors import OperoWarning, StoreError
from opero.events import CacheSkipped

pytestmark = pytest.mark.internal

posix = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_environment_says_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("OPERO_CACHE_DIR", str(tmp_path / "mine"))
    assert locate("disk") == str(tmp_path / "mine")
    monkeypatch.delenv("OPERO_CACHE_DIR")
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path / "caches"))
    assert default_folder() == str(tmp_path / "caches" / "results")


def test_a_path_does_not_move_with_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    settled = settle("disk:answers")
    monkeypatch.chdir("/")
    assert locate(settled) == str(tmp_path / "answers")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settle("disk:~/x") == f"disk:{tmp_path / 'x'}"


def test_a_relative_folder_from_the_environment_is_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPERO_CACHE_DIR", "answers")
    assert default_folder() == str(tmp_path / "answers")


@posix
@pytest.mark.parametrize("umask", [0o022, 0o000, 0o077], ids=oct)
def test_no_other_user_can_read_anything(tmp_path, umask):
    old = os.umask(umask)
    try:
        store = DiskStore(tmp_path / "a" / "b")
        store.set("small", b"x", None)
        store.set("large", b"x" * 100_000, None)
    finally:
        os.umask(old)
    files = [path for path in (tmp_path / "a" / "b").rglob("*") if path.is_file()]
    assert len(files) > 2
    assert mode(tmp_path / "a" / "b") == 0o700
    assert all(mode(path) & 0o077 == 0 for path in files)
    store.close()


@posix
def test_an_empty_folder_is_closed_to_others(tmp_path):
    (tmp_path / "c").mkdir(mode=0o755)
    prepare_folder(tmp_path / "c")
    assert mode(tmp_path / "c") == 0o700


@posix
def test_a_cache_that_others_could_write_to_is_refused(tmp_path):
    prepare_folder(tmp_path / "c")
    (tmp_path / "c").chmod(0o770)
    with pytest.raises(StoreError, match="others can write"):
        prepare_folder(tmp_path / "c")


@posix
def test_a_cache_that_others_could_only_read_is_closed_again(tmp_path):
    prepare_folder(tmp_path / "c")
    (tmp_path / "c").chmod(0o755)
    prepare_folder(tmp_path / "c")
    assert mode(tmp_path / "c") == 0o700


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("text")
    before = mode(tmp_path)
    with pytest.raises(StoreError, match="holds other files"):
        prepare_folder(tmp_path)
    assert mode(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_tag_of_another_program_does_not_count(tmp_path):
    (tmp_path / "CACHEDIR.TAG").write_text("Signature: 8a477f597d28d172789f06886806bc55\n# pytest")
    with pytest.raises(StoreError, match="holds other files"):
        prepare_folder(tmp_path)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(StoreError, match="not a folder"):
        prepare_folder(tmp_path / "f")


@posix
def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(folders.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(StoreError, match="belongs to another user"):
        prepare_folder(tmp_path / "c")


@posix
@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can give away links")
def test_a_link_of_another_user_is_refused(tmp_path):
    prepare_folder(tmp_path / "c")
    (tmp_path / "link").symlink_to(tmp_path / "c")
    prepare_folder(tmp_path / "link")
    os.chown(tmp_path / "link", 12345, 12345, follow_symlinks=False)
    with pytest.raises(StoreError, match="belongs to another user"):
        prepare_folder(tmp_path / "link")


def answer(x: int) -> int:
    return x


def test_a_refused_folder_is_a_miss_an_event_and_one_warning(tmp_path):
    (tmp_path / "thesis.tex").write_text("text")
    heard: list[str] = []

    def listen(event: object) -> None:
        if isinstance(event, CacheSkipped):
            heard.append(event.reason)

    f = opero(cache_backend=f"disk:{tmp_path}", on_event=listen)(answer)
    with pytest.warns(OperoWarning, match="no disk cache: .*holds other files") as warned:
        assert (f(1), f(1)) == (1, 1)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert sum("holds other files" in reason for reason in heard) >= 3
    with pytest.raises(StoreError, match="holds other files"):
        f.cache.clear()
    assert f.cache.info().size is None


def test_two_first_users_at_once_both_succeed(tmp_path, monkeypatch):
    """The second finds a tag that the first has not finished writing."""
    (tmp_path / "c").mkdir(mode=0o700)
    (tmp_path / "c" / "CACHEDIR.TAG").write_bytes(b"")
    prepare_folder(tmp_path / "c")
