# this_file: tests/caching/codec/test_secret.py
"""The key of the signatures: made once, whole, for this user only, or taken from the environment."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from opero.caching import signing as secret
from opero.caching.codec import Coder
from opero.caching.plain_types import Undecodable, Unencodable
from opero.errors import OperoWarning

pytestmark = pytest.mark.internal

posix = pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX")


class Point:
    pass


def sign(*, shared: bool = False) -> bytes:
    return b"".join(Coder(shared=shared).encode(Point(), b"key"))


def forget() -> None:
    secret._of_file.cache_clear()


@posix
def test_the_key_is_made_for_this_user_only(config: Path) -> None:
    old = os.umask(0)
    try:
        sign()
    finally:
        os.umask(old)
    assert [path.name for path in config.iterdir()] == ["cache.key"]
    assert stat.S_IMODE((config / "cache.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(config.stat().st_mode) == 0o700


def test_plain_data_needs_no_key(config: Path) -> None:
    Coder().encode((1,), b"key")
    assert not config.exists()


def test_another_process_finds_the_same_key(config: Path) -> None:
    stored = sign()
    forget()
    assert type(Coder().decode(stored, b"key")) is Point


def test_another_key_opens_nothing(config: Path) -> None:
    stored = sign()
    (config / "cache.key").unlink()
    forget()
    with pytest.raises(Undecodable, match="signature"):
        Coder().decode(stored, b"key")


def test_processes_that_start_together_make_one_key(config: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from opero.caching import signing as secret\n"
        "sys.stdin.readline()\n"
        f"print(secret._of_file(Path({str(config / 'cache.key')!r})).hex())"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for process in started:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    keys = {process.communicate()[0] for process in started}
    assert len(keys) == 1
    assert len(keys.pop()) == 65
    assert [path.name for path in config.iterdir()] == ["cache.key"]


@posix
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o606])
def test_a_key_that_others_can_reach_is_refused(config: Path, mode: int) -> None:
    stored = sign()
    (config / "cache.key").chmod(mode)
    forget()
    with pytest.warns(OperoWarning, match="chmod 600"), pytest.raises(Unencodable):
        sign()
    with pytest.raises(Undecodable):
        Coder().decode(stored, b"key")


@posix
def test_a_folder_that_others_can_write_to_is_refused(config: Path) -> None:
    config.mkdir(parents=True)
    config.chmod(0o777)
    with pytest.warns(OperoWarning, match="chmod 700"), pytest.raises(Unencodable):
        sign()


@posix
def test_a_link_to_the_file_of_another_user_is_refused(config: Path, tmp_path: Path) -> None:
    (tmp_path / "planted").write_bytes(b"x" * 32)
    (tmp_path / "planted").chmod(0o600)
    config.mkdir(parents=True, mode=0o700)
    (config / "cache.key").symlink_to(tmp_path / "planted")
    with pytest.warns(OperoWarning), pytest.raises(Unencodable):
        sign()


@posix
def test_a_key_of_another_user_is_refused(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sign()
    forget()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.warns(OperoWarning, match="another user"), pytest.raises(Unencodable):
        sign()


def test_a_cut_key_is_refused(config: Path) -> None:
    sign()
    (config / "cache.key").write_bytes(b"short")
    forget()
    with pytest.warns(OperoWarning, match="holds no key"), pytest.raises(Unencodable):
        sign()


def test_a_folder_that_cannot_be_made_is_reported(config: Path) -> None:
    config.parent.write_text("in the way")
    with pytest.warns(OperoWarning, match="OPERO_CACHE_SECRET"), pytest.raises(Unencodable):
        sign()


class TestOfTheEnvironment:
    @pytest.fixture(autouse=True)
    def _set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPERO_CACHE_SECRET", "correct horse battery")

    def test_it_signs_without_a_file(self, config: Path) -> None:
        assert type(Coder().decode(sign(), b"key")) is Point
        assert not config.exists()

    def test_it_signs_for_other_hosts(self) -> None:
        assert type(Coder(shared=True).decode(sign(shared=True), b"key")) is Point

    def test_another_one_opens_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stored = sign(shared=True)
        monkeypatch.setenv("OPERO_CACHE_SECRET", "correct horse battery staple")
        with pytest.raises(Undecodable, match="signature"):
            Coder(shared=True).decode(stored, b"key")

    def test_one_that_could_be_guessed_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPERO_CACHE_SECRET", "hunter2")
        with (
            pytest.warns(OperoWarning, match="16 characters") as reported,
            pytest.raises(Unencodable),
        ):
            sign()
        assert "hunter2" not in str(reported[0].message)


class TestSharedWithoutASecret:
    def test_pickles_are_not_stored_and_one_warning_says_why(self, config: Path) -> None:
        # One block for three calls, because only the first one warns.
        with pytest.warns(OperoWarning, match="Set OPERO_CACHE_SECRET") as reported:  # noqa: PT031
            for _ in range(3):
                with pytest.raises(Unencodable, match="Point"):
                    sign(shared=True)
        assert len(reported) == 1
        assert not config.exists()

    def test_pickles_are_not_read(self) -> None:
        stored = sign()
        with pytest.warns(OperoWarning), pytest.raises(Undecodable):
            Coder(shared=True).decode(stored, b"key")

    def test_plain_data_is_stored(self) -> None:
        coder = Coder(shared=True)
        assert coder.decode(b"".join(coder.encode((1, 2), b"key")), b"key") == (1, 2)
