# this_file: src/opero/concurrency/memory.py
"""How much memory a worker may take: the kernel refuses more, and the map looks at what is really used."""

from __future__ import annotations

import os
import sys
from typing import Final

__all__ = ["limit_memory", "resident"]

_PAGE: Final = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def limit_memory(most: int) -> None:
    """Let the kernel refuse this process more than so many bytes of data: a `MemoryError` where it asks for more.

    Address space that is reserved but never used does not count, as `RLIMIT_AS` would have it.

    Args:
        most: Bytes.
    """
    if sys.platform == "linux":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def resident(pid: int) -> int:
    """Return the bytes of memory that a process really uses; 0 where nobody can tell."""
    from pathlib import Path

    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):
        return 0
