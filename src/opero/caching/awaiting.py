# this_file: src/opero/caching/awaiting.py
"""Reading and writing a store for an event loop, which must not wait for a disk or a server.

A store with verbs of its own for event loops says that it is `native`; others run in a thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opero.caching.memory import Entry, EntryStore

__all__ = ["keep", "read"]


async def read(store: EntryStore, key: Any) -> Entry | None:
    """Return the entry of `key`, even if it has expired."""
    if getattr(store, "native", False):
        native: Any = store
        found: Entry | None = await native.afind(key)
        return found
    from asyncio import to_thread

    return await to_thread(store.find, key)


async def keep(
    store: EntryStore, key: Any, make: Callable[[], Entry], *, unless: Callable[[], bool]
) -> tuple[Entry, bool]:
    """Make an entry and store it.

    Args:
        store: Where.
        key: Its key.
        make: Makes the entry, which may take as long as storing it.
        unless: Whether it must not be stored after all.

    Returns:
        The entry, and whether all is well: False if it was too heavy.
    """
    if getattr(store, "native", False):
        native: Any = store
        entry = make()
        return entry, unless() or await native.aput(key, entry)
    from asyncio import to_thread

    def work() -> tuple[Entry, bool]:
        made = make()
        return made, unless() or store.put(key, made)

    return await to_thread(work)
