# this_file: src/opero/cli/cache.py
"""List and clear disk and redis caches: `opero cache list`, `opero cache clear`."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from opero.caching.context import clear_cache
from opero.caching.keys.function_keys import namespace_of
from opero.caching.stores.base import open_store, settle
from opero.cli.output import as_json, as_size, as_table
from opero.errors import OperoUsageError

if TYPE_CHECKING:
    from opero.caching.stores.base import ByteStore, StoredItem

__all__ = ["Namespace", "namespaces", "register"]


@dataclass(frozen=True)
class Namespace:
    """Contents of a store for one `cache_namespace`.

    Attributes:
        namespace: Its name.
        functions: How many functions and contexts have entries.
        entries, bytes: Number and total size of the entries.
    """

    namespace: str
    functions: int
    entries: int
    bytes: int


def register(commands: Any) -> None:
    """Add the commands."""
    parser = commands.add_parser("cache", help="list and clear disk and redis caches")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    listing = verbs.add_parser("list", help="namespaces with their entries and bytes")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(run=_list)

    clearing = verbs.add_parser("clear", help="remove all entries of a namespace")
    clearing.add_argument("namespace", metavar="NAMESPACE", help="the cache_namespace of functions")
    clearing.set_defaults(run=_clear)

    for verb in (listing, clearing):
        verb.add_argument(
            "--backend",
            default="disk",
            help='"disk" (the default), "disk:PATH", "redis" or "redis://HOST:PORT/DB"',
        )


def namespaces(items: Iterable[StoredItem], *, now: float) -> list[Namespace]:
    """Count entries by namespace, in order of their names; expired entries do not count."""
    entries: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    functions: dict[str, set[str]] = {}
    for item in items:
        if item.key.startswith("~") or (item.expires is not None and item.expires <= now):
            continue
        name = namespace_of(item.key)
        entries[name] += 1
        sizes[name] += item.size
        functions.setdefault(name, set()).add(item.key.rpartition(":")[0])
    return [
        Namespace(name, len(functions[name]), entries[name], sizes[name])
        for name in sorted(entries)
    ]


def _store(backend: str) -> ByteStore | None:
    """Return a store, None for a folder that does not exist: listing must not create it."""
    if backend == "memory":
        raise OperoUsageError(
            "--backend memory: results in memory can be seen by their own program only."
        )
    store = open_store(settle(backend))
    folder = getattr(store, "folder", None)
    return None if folder is not None and not folder.exists() else store


def _list(given: argparse.Namespace) -> int:
    store = _store(given.backend)
    found = [] if store is None else namespaces(store.scan(""), now=time.time())
    if given.json:
        print(as_json([asdict(one) for one in found]))
    elif not found:
        print("No entries.")
    else:
        rows = [(one.namespace, one.functions, one.entries, as_size(one.bytes)) for one in found]
        print(as_table([("namespace", "functions", "entries", "size"), *rows]))
    return 0


def _clear(given: argparse.Namespace) -> int:
    removed = 0
    if _store(given.backend) is not None:
        removed = clear_cache(given.namespace, backend=given.backend)
    print(f"Removed {removed} {'entry' if removed == 1 else 'entries'} of {given.namespace!r}.")
    return 0
