# this_file: src/opero/caching/codec/secret.py
"""The secret that pickles are signed with: from `OPERO_CACHE_SECRET`, or a file of this user's.

The file lies in the user's configuration folder, never beside what it signs: whoever can write to
the cache must not be able to read it. It is made by whichever process is first, whole or not at
all, and refused if anybody else could have read or replaced it.
"""

from __future__ import annotations

import functools
import os
import stat
import warnings
from hashlib import blake2b
from pathlib import Path
from secrets import token_bytes
from typing import Final

from opero.errors import OperoWarning
from opero.utils.stack import users_stacklevel

__all__ = ["find_secret"]

_VARIABLE: Final = "OPERO_CACHE_SECRET"
_SHORTEST: Final = 16
_SIZE: Final = 32
_WAYS_OUT: Final = f"Set {_VARIABLE} to the same random text on every host, or return plain data."


def find_secret(*, shared: bool) -> tuple[bytes | None, str]:
    """Return the secret, or None and why there is none; the latter is also warned of once.

    Args:
        shared: Whether other hosts have to know it, so that a file of this host's will not do.
    """
    text = os.environ.get(_VARIABLE)
    if text:
        if len(text) >= _SHORTEST:
            return _of_text(text), ""
        return None, _told(f"{_VARIABLE} has fewer than {_SHORTEST} characters.")
    if shared:
        return None, _told(
            f"{_VARIABLE} is not set: hosts that share a cache need one secret to sign pickles with."
        )
    try:
        return _of_file(_key_path()), ""
    except OSError as error:
        return None, _told(f"there is no key to sign pickles with: {error}.")


@functools.cache
def _told(reason: str) -> str:
    """Warn of a reason the first time it is met, and return it."""
    warnings.warn(
        f"Some results are not cached, because {reason} {_WAYS_OUT}",
        OperoWarning,
        stacklevel=users_stacklevel(),
    )
    return reason


@functools.lru_cache(maxsize=8)
def _of_text(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogateescape"), digest_size=_SIZE).digest()


def _key_path() -> Path:
    from platformdirs import user_config_path

    return user_config_path("opero", appauthor=False) / "cache.key"


@functools.lru_cache(maxsize=8)
def _of_file(path: Path) -> bytes:
    """Return the key in a file, which is made if it is not there.

    Raises:
        OSError: It cannot be made or read, or others could have.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_strangers(path.parent.lstat(), path.parent, 0o022)
    try:
        return _read(path)
    except FileNotFoundError:
        _create(path)
        return _read(path)


def _read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(fd, "rb") as file:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            raise PermissionError(f"{path} is no plain file")
        _refuse_strangers(about, path, 0o077)
        key = file.read(_SIZE + 1)
    if len(key) != _SIZE:
        raise OSError(f"{path} holds no key: remove it, and a new one is made")
    return key


def _create(path: Path) -> None:
    """Make the file, or leave it to the process that was quicker."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{token_bytes(4).hex()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(draft, flags, 0o600), "wb") as file:
            file.write(token_bytes(_SIZE))
            file.flush()
            os.fsync(file.fileno())
        # Unlike a rename, a link never replaces the key that another process has just made.
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink(missing_ok=True)


def _refuse_strangers(about: os.stat_result, path: Path, forbidden: int) -> None:
    if not hasattr(os, "geteuid"):  # Windows: the folder is the user's by inherited permissions
        return
    if about.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to another user")
    if stat.S_IMODE(about.st_mode) & forbidden:
        wanted = "700" if stat.S_ISDIR(about.st_mode) else "600"
        raise PermissionError(f"{path} is open to others: chmod {wanted} it, and remove its key")
