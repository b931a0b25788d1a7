# this_file: src/opero/caching/signing.py
"""Sign pickles, and open only those that this user, or a host that shares the secret, has signed.

The secret comes from `OPERO_CACHE_SECRET`, or from a file of this user's. That lies in the user's
configuration folder, never beside what it signs: a process that can write to the cache must not be
able to read it. It is made by whichever process is first, whole or not at all, and refused if any
other user could have read or replaced it.
"""

from __future__ import annotations

import functools
import hmac
import os
import pickle
import stat
from hashlib import blake2b
from pathlib import Path
from secrets import token_bytes
from typing import Any, Final

from opero.caching.plain_types import Buffer, Undecodable, Unencodable
from opero.errors import warn_user

_SIGNATURE_SIZE: Final = 32
"""Bytes of a signature: BLAKE2b with a key (RFC 7693)."""

_PROTOCOL: Final = 5
"""Known to every Python that opero runs on, so that entries survive a change of version."""


def write_signed(value: Any, context: bytes, *, shared: bool) -> tuple[bytes, bytes]:
    """Pickle a value and return its signature and the pickle.

    Args:
        value: The value.
        context: What the entry belongs to; the signature covers it too.
        shared: Whether other hosts read what is written.

    Raises:
        Unencodable: It cannot be pickled, or there is no secret to sign it with.
    """
    kind = type(value).__qualname__
    secret, why = find_secret(shared=shared)
    if secret is None:
        raise Unencodable(f"its result ({kind}) is no plain data, and {why}")
    try:
        data = pickle.dumps(value, _PROTOCOL)
    except Exception as error:
        raise Unencodable(
            f"its result ({kind}) cannot be pickled ({type(error).__name__})"
        ) from error
    return _sign(secret, context, data), data


def read_signed(signed: memoryview, context: bytes, *, shared: bool) -> Any:
    """Check the signature before a pickle, and only then open it.

    Raises:
        Undecodable: The signature does not fit, or the pickle does not open.
    """
    secret, why = find_secret(shared=shared)
    if secret is None:
        raise Undecodable(f"it is signed, and {why}")
    signature, data = signed[:_SIGNATURE_SIZE], signed[_SIGNATURE_SIZE:]
    if not hmac.compare_digest(_sign(secret, context, data), signature):
        raise Undecodable(
            "its signature does not fit: another secret, another key, or tampered with"
        )
    try:
        return pickle.loads(data)  # noqa: S301 - no other program can have signed it
    except Exception as error:
        raise Undecodable(f"its pickle does not open ({type(error).__name__})") from error


def _sign(secret: bytes, context: bytes, data: Buffer) -> bytes:
    signer = blake2b(key=secret, digest_size=_SIGNATURE_SIZE, person=b"opero.cache.1")
    signer.update(len(context).to_bytes(8, "little"))
    signer.update(context)
    signer.update(data)
    return signer.digest()


# --- the secret ------------------------------------------------------------------------------------------------------

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
        return None, _warned_of(f"{_VARIABLE} has fewer than {_SHORTEST} characters.")
    if shared:
        return None, _warned_of(
            f"{_VARIABLE} is not set: hosts that share a cache need one secret to sign pickles with."
        )
    try:
        return _of_file(_key_path()), ""
    except OSError as error:
        return None, _warned_of(f"there is no key to sign pickles with: {error}.")


@functools.cache
def _warned_of(reason: str) -> str:
    """Warn of a reason the first time it is met, and return it."""
    warn_user(f"Some results are not cached, because {reason} {_WAYS_OUT}")
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
    _refuse_others(path.parent.lstat(), path.parent, 0o022)
    try:
        return _read(path)
    except FileNotFoundError:
        _create(path)
        return _read(path)


def _read(path: Path) -> bytes:
    flags = (getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_BINARY", "O_NONBLOCK"))
    fd = os.open(path, os.O_RDONLY | sum(flags))
    with os.fdopen(fd, "rb") as file:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            raise PermissionError(f"{path} is no plain file")
        _refuse_others(about, path, 0o077)
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


def _refuse_others(about: os.stat_result, path: Path, forbidden: int) -> None:
    if not hasattr(os, "geteuid"):  # Windows: the folder is the user's by inherited permissions
        return
    if about.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to another user")
    if stat.S_IMODE(about.st_mode) & forbidden:
        wanted = "700" if stat.S_ISDIR(about.st_mode) else "600"
        raise PermissionError(f"{path} is open to others: chmod {wanted} it, and remove its key")
