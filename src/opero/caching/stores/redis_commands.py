# this_file: src/opero/caching/stores/redis_commands.py
"""What the store says to a Redis server, written once for threads and event loops.

The server sees entries behind `opero:cache:` and leases behind `opero:lease:`, so that neither can
be mistaken for the other or for anybody else's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Final

__all__ = [
    "Command", "claim", "delete", "entry", "get", "get_many", "inspect", "key_of", "put", "release", "remove", "scan",
    "scanned",
]  # fmt: skip

Command = tuple[Any, ...]

_ENTRIES: Final = b"opero:cache:"
_LEASES: Final = b"opero:lease:"
_BATCH: Final = 1000
_WILD: Final = re.compile(rb"[*?\[\]\\]")

_CLAIM: Final = """\
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1"""
_RELEASE: Final = """\
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0"""


def entry(key: str) -> bytes:
    """Return the server's key of an entry. File names in a key may hold what is no Unicode."""
    return _ENTRIES + key.encode("utf-8", "surrogatepass")


def _lease(key: str) -> bytes:
    return _LEASES + key.encode("utf-8", "surrogatepass")


def key_of(name: bytes) -> str:
    """Return the key of an entry by that of the server."""
    return name[len(_ENTRIES) :].decode("utf-8", "surrogatepass")


def get(key: str) -> Command:
    """Ask for an entry."""
    return "GET", entry(key)


def get_many(keys: Sequence[str]) -> Command:
    """Ask for many entries."""
    return "MGET", *map(entry, keys)


def put(key: str, blob: bytes, ttl: float | None) -> Command:
    """Store an entry, for at least a millisecond."""
    stored = ("SET", entry(key), blob)
    return stored if ttl is None else (*stored, "PX", _milliseconds(ttl))


def delete(key: str) -> Command:
    """Remove an entry; the answer is 1 if it was there."""
    return "UNLINK", entry(key)


def remove(names: list[bytes]) -> Command:
    """Remove what a scan has found; the answer is how many were still there."""
    return "UNLINK", *names


def scan(cursor: int, prefix: str) -> Command:
    """Ask for the next keys that begin with a text, none of whose characters is a wildcard."""
    pattern = _WILD.sub(rb"\\\g<0>", entry(prefix)) + b"*"
    return "SCAN", cursor, "MATCH", pattern, "COUNT", _BATCH


def scanned(answer: Any) -> tuple[int, list[bytes]]:
    """Return what a scan has answered: the next cursor, 0 at the end, and the keys, perhaps none."""
    cursor, names = answer
    return int(cursor), names


def inspect(name: bytes) -> tuple[Command, Command]:
    """Ask for the size of what a scan has found, and for its remaining milliseconds."""
    return ("STRLEN", name), ("PTTL", name)


def claim(key: str, owner: str, seconds: float) -> Command:
    """Take or extend a lease; the answer is 1 if `owner` has it."""
    return "EVAL", _CLAIM, 1, _lease(key), owner, _milliseconds(seconds)


def release(key: str, owner: str) -> Command:
    """Give a lease back if `owner` has it."""
    return "EVAL", _RELEASE, 1, _lease(key), owner


def _milliseconds(seconds: float) -> int:
    return max(1, math.ceil(seconds * 1000))
