# this_file: tests/caching/stores/test_folder.py
"""The folder of a disk cache belongs to this user, is closed to others, and holds nothing else."""

from __future__ import annotations

import gc
import os
import stat
from pathlib import Path

import pytest

from opero import opero
from opero.core import get_cache_context
from opero.errors import OperoWarning, StoreError
from opero.events import CacheSkipped

posix = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")

USED = "used"


def answer(x: int) -> int:
    return x


def attempt(folder: Path) -> str:
    """Use a folder as a new program would and return why it was refused, `USED` if it was not."""
    gc.collect()  # the store of the attempt before
    cache = get_cache_context(f"disk:{folder}")
    try:
        cache.set("key", "value")
    except StoreError as error:
        return str(error)
    assert cache.get("key") == "value"
    return USED


def refusal(folder: Path) -> str:
    """Return why a folder is refused, which one warning says too."""
    with pytest.warns(OperoWarning, match="There is no disk cache"):
        return attempt(folder)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_environment_says_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("OPERO_CACHE_DIR", str(tmp_path / "mine"))
    get_cache_context("disk").set("key", 1)
    assert (tmp_path / "mine" / "cache.db").exists()
    monkeypatch.delenv("OPERO_CACHE_DIR")
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path / "caches"))
    get_cache_context("disk").set("key", 1)
    assert (tmp_path / "caches" / "results" / "cache.db").exists()


def test_a_path_does_not_move_with_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    f = opero(cache_backend="disk:answers")(answer)
    monkeypatch.chdir("/")
    f(1)
    assert (tmp_path / "answers" / "cache.db").exists()
    monkeypatch.setenv("HOME", str(tmp_path))
    get_cache_context("disk:~/x").set("key", 1)
    assert (tmp_path / "x" / "cache.db").exists()


def test_a_relative_folder_from_the_environment_is_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPERO_CACHE_DIR", "answers")
    cache = get_cache_context("disk")
    cache.set("key", 1)
    monkeypatch.chdir("/")
    cache.set("large", "x" * 200_000)
    assert {path.suffix for path in (tmp_path / "answers").rglob("*")} >= {".db", ".val"}


@posix
@pytest.mark.parametrize("umask", [0o022, 0o000, 0o077], ids=oct)
def test_no_other_user_can_read_anything(tmp_path, umask):
    old = os.umask(umask)
    try:
        cache = get_cache_context(f"disk:{tmp_path / 'a' / 'b'}")
        cache.set("small", b"x")
        cache.set("large", b"x" * 200_000)
    finally:
        os.umask(old)
    files = [path for path in (tmp_path / "a" / "b").rglob("*") if path.is_file()]
    assert len(files) > 2
    assert mode(tmp_path / "a" / "b") == 0o700
    assert all(mode(path) & 0o077 == 0 for path in files)


@posix
def test_a_database_that_cannot_be_read_is_no_cache(tmp_path, monkeypatch):
    assert attempt(tmp_path) == USED
    # What root may do is not asked for.
    monkeypatch.setattr(os, "access", lambda path, wanted: wanted != os.R_OK)
    assert "cache.db cannot be read" in refusal(tmp_path)


@posix
def test_an_empty_folder_is_closed_to_others(tmp_path):
    (tmp_path / "c").mkdir(mode=0o755)
    assert attempt(tmp_path / "c") == USED
    assert mode(tmp_path / "c") == 0o700


@posix
@pytest.mark.parametrize(("left", "used"), [(0o770, False), (0o755, True)], ids=["write", "read"])
def test_a_cache_that_others_could_read_is_closed_again_and_one_they_could_write_to_is_refused(
    tmp_path, left, used
):
    assert attempt(tmp_path / "c") == USED
    (tmp_path / "c").chmod(left)
    if used:
        assert attempt(tmp_path / "c") == USED
        assert mode(tmp_path / "c") == 0o700
    else:
        assert "others can write" in refusal(tmp_path / "c")


@posix
def test_a_database_that_others_could_read_is_closed_again(tmp_path):
    assert attempt(tmp_path / "c") == USED
    (tmp_path / "c" / "cache.db").chmod(0o644)
    assert attempt(tmp_path / "c") == USED
    assert mode(tmp_path / "c" / "cache.db") == 0o600


@posix
def test_a_folder_that_others_could_replace_is_refused(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert "and so replace" in refusal(tmp_path / "open" / "c")
    (tmp_path / "open").chmod(0o1777)  # as /tmp is
    assert attempt(tmp_path / "open" / "c") == USED


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("text")
    before = mode(tmp_path)
    assert "holds other files" in refusal(tmp_path)
    assert mode(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_tag_of_another_program_does_not_count(tmp_path):
    (tmp_path / "CACHEDIR.TAG").write_text("Signature: 8a477f597d28d172789f06886806bc55\n# pytest")
    assert "holds other files" in refusal(tmp_path)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "f").write_text("")
    assert "not a folder" in refusal(tmp_path / "f")
    assert "cannot be used (NotADirectoryError)" in refusal(tmp_path / "f" / "g")


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs links")
def test_a_database_that_is_no_plain_file_is_refused(tmp_path):
    assert attempt(tmp_path / "c") == USED
    database = tmp_path / "c" / "cache.db"
    database.rename(tmp_path / "elsewhere.db")
    database.symlink_to(tmp_path / "elsewhere.db")
    assert "no plain file" in refusal(tmp_path / "c")


@posix
def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert "belongs to another user" in refusal(tmp_path / "c")


@posix
@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can give away links")
def test_a_link_of_another_user_is_refused(tmp_path):
    assert attempt(tmp_path / "c") == USED
    (tmp_path / "link").symlink_to(tmp_path / "c")
    assert attempt(tmp_path / "link") == USED
    os.chown(tmp_path / "link", 12345, 12345, follow_symlinks=False)
    assert "belongs to another user" in refusal(tmp_path / "link")


def test_a_refused_folder_is_a_miss_an_event_and_one_warning(tmp_path):
    (tmp_path / "thesis.tex").write_text("text")
    received: list[str] = []

    def listen(event: object) -> None:
        if isinstance(event, CacheSkipped):
            received.append(event.reason)

    f = opero(cache_backend=f"disk:{tmp_path}", on_event=listen)(answer)
    with pytest.warns(OperoWarning, match="no disk cache: .*holds other files") as warned:
        assert (f(1), f(1)) == (1, 1)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert sum("holds other files" in reason for reason in received) >= 3
    with pytest.raises(StoreError, match="holds other files"):
        f.cache.clear()
    assert f.cache.info().size is None


def test_two_first_users_at_once_both_succeed(tmp_path):
    """The second finds a tag that the first has not finished writing."""
    (tmp_path / "c").mkdir(mode=0o700)
    (tmp_path / "c" / "CACHEDIR.TAG").write_bytes(b"")
    assert attempt(tmp_path / "c") == USED
