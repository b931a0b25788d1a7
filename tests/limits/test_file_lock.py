# this_file: tests/limits/test_file_lock.py
from __future__ import annotations

import errno
import os

import pytest

from opero.limits import state_file as file_lock

pytestmark = pytest.mark.internal

fcntl = pytest.importorskip("fcntl")


@pytest.fixture
def fd(tmp_path):
    opened = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield opened
    os.close(opened)


def failing(monkeypatch, *errors: int) -> list[int]:
    """Let `lockf` fail with these errors before it works."""
    left, real = list(errors), fcntl.lockf

    def lockf(*arguments):
        if left:
            raise OSError(left.pop(0), "made to fail")
        return real(*arguments)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    return left


def test_a_circle_that_the_kernel_only_imagines_is_tried_again(fd, monkeypatch):
    left = failing(monkeypatch, errno.EDEADLK, errno.EDEADLK)
    file_lock.lock(fd)
    assert not left


def test_a_file_system_without_locks_is_an_error(fd, monkeypatch):
    failing(monkeypatch, errno.ENOLCK)
    with pytest.raises(OSError, match="made to fail"):
        file_lock.lock(fd)


@pytest.mark.parametrize("taken", [errno.EACCES, errno.EAGAIN])
def test_a_lock_that_another_process_holds_is_not_taken(fd, monkeypatch, taken):
    failing(monkeypatch, taken)
    assert not file_lock.try_lock(fd)
    assert file_lock.try_lock(fd)


def test_a_lock_that_cannot_be_asked_for_is_an_error(fd, monkeypatch):
    failing(monkeypatch, errno.ENOLCK)
    with pytest.raises(OSError, match="made to fail"):
        file_lock.try_lock(fd)


def test_releasing_what_is_not_held_does_nothing(fd):
    file_lock.unlock(fd)
    file_lock.lock(fd)
    file_lock.unlock(fd)
    file_lock.unlock(fd)
