# this_file: src/opero/caching/stores/folder.py
"""The folder of a disk cache: where it is, and that nobody else can get at it.

Whoever can write into a cache can make a program believe things, and whoever can read it sees all
answers. So the folder belongs to this user alone (0700), and is used for nothing else: a tag shows
that it is a cache and opero's (https://bford.info/cachedir/; backup programs know it).
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from opero.errors import StoreError

__all__ = ["default_folder", "prepare_folder"]

_TAG: Final = "CACHEDIR.TAG"
_SIGNATURE: Final = b"""\
Signature: 8a477f597d28d172789f06886806bc55
# A cache of opero. It can be deleted at any time; what it holds is computed again.
"""


def default_folder() -> Path:
    """Return `OPERO_CACHE_DIR`, or a folder among the user's caches."""
    folder = os.environ.get("OPERO_CACHE_DIR")
    if folder:
        return Path(folder).expanduser().absolute()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("opero", appauthor=False)) / "results"


def prepare_folder(folder: Path) -> None:
    """Make a folder ready to hold a cache: there, this user's own, closed to all others.

    Raises:
        StoreError: It cannot be made, belongs to somebody else, or holds something else.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = _owned(folder)
        tagged = _tagged(folder)
        if not tagged and any(folder.iterdir()) and not _tagged(folder):
            raise StoreError(f"{folder} holds other files: give the cache a folder of its own")
        if os.name == "posix" and stat.S_IMODE(about.st_mode) & 0o077:
            if tagged and about.st_mode & 0o022:
                raise StoreError(
                    f"others can write to {folder}, so what it holds cannot be trusted: delete it"
                )
            folder.chmod(0o700)
        if not tagged:
            _tag(folder)
    except OSError as error:
        raise StoreError(f"{folder} cannot be used ({type(error).__name__})") from error


def _owned(folder: Path) -> os.stat_result:
    """Return what is known about a folder that is ours, as is the link that may lead to it."""
    about = folder.stat()
    if not stat.S_ISDIR(about.st_mode):
        raise StoreError(f"{folder} is not a folder")
    if hasattr(os, "geteuid"):
        ours = {os.geteuid()}
        # The system's own links, like /tmp on macOS, are as good as ours.
        if about.st_uid not in ours or folder.lstat().st_uid not in ours | {0}:
            raise StoreError(
                f"{folder} belongs to another user: give the cache a folder of your own, "
                'with OPERO_CACHE_DIR or cache_backend="disk:PATH"'
            )
    return about


def _tagged(folder: Path) -> bool:
    try:
        found = (folder / _TAG).read_bytes()
    except FileNotFoundError:
        return False
    # Another process may just be writing it.
    return _SIGNATURE.startswith(found)


def _tag(folder: Path) -> None:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    try:
        fd = os.open(folder / _TAG, flags, 0o600)
    except FileExistsError:
        return
    try:
        os.write(fd, _SIGNATURE)
    finally:
        os.close(fd)
