# this_file: src/opero/concurrency/checkpoint.py
"""Write the results of a map to a file as they come, and let a later run take them from it."""

from __future__ import annotations

import functools
import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from opero.caching.codec import Coder
from opero.caching.keys.function_keys import FunctionKeys, function_id
from opero.caching.plain_types import Undecodable, Unencodable
from opero.concurrency.executors.base import ItemOutcome
from opero.errors import OperoUsageError, StoreError, UnkeyableError, warn_user
from opero.utils.sqlite import SqliteFile

if TYPE_CHECKING:
    from opero.concurrency.executors.base import Finished, MapJob
    from opero.core.function import FunctionInfo
    from opero.core.options import MapOptions


_LAYOUT: Final = 1
_APPLICATION: Final = 0x6F706A6D  # "opjm"
_BATCH: Final = 500
"""Keys in one query: SQLite takes a limited number of parameters."""

_SCRIPT: Final = f"""
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_LAYOUT};
CREATE TABLE results (key TEXT PRIMARY KEY, result BLOB) WITHOUT ROWID
"""

OpenCheckpoint = Callable[["MapJob"], "Checkpoint"]
"""From the job of one run of a map to its checkpoint."""


def checkpoints_of(info: FunctionInfo, options: MapOptions) -> OpenCheckpoint:
    """Return the function that opens the checkpoint of a run of a map.

    The key of an item is made of the function (its module or script, its name, what it closes over), `cache_version`,
    the item or what `item_key` makes of it, and the further arguments without those that `cache_ignore` names.
    """
    prefix = functools.cache(lambda: function_id(info, options.cache_version) + ":")
    keying = FunctionKeys(info, ignore=options.cache_ignore, prefix=prefix)
    identify = options.item_key

    def key_of(job: MapJob, item: Any) -> str:
        what = item if identify is None else identify(item)
        args = (*job.before, what, *job.after)
        try:
            # Arguments that do not fit are the function's to refuse.
            key = keying.key(args, dict(job.kwargs))
            return "" if key is None else str(key)
        except UnkeyableError as error:
            why = str(error).partition(". ")[0]
            raise OperoUsageError(
                f"checkpoint={options.checkpoint!r} cannot tell the items of {info.name}() apart: {why}. Return what "
                "an item is, as text or a number, from item_key=…, and leave clients out with cache_ignore=(…)."
            ) from error

    def open_one(job: MapJob) -> Checkpoint:
        prefix()  # may raise, and no key for items would help then
        file = CheckpointFile(options.checkpoint or "")
        return Checkpoint(info.name, file, functools.partial(key_of, job))

    return open_one


class Checkpoint:
    """The results of one map in a file: an `ItemRecorder`.

    Args:
        name: The function's name, for messages.
        file: The file.
        make_key: Makes the key of an item.
    """

    def __init__(self, name: str, file: CheckpointFile, make_key: Callable[[Any], str]) -> None:
        self._name = name
        self._file = file
        self._make_key = make_key
        self._coder = Coder()
        self._keys: dict[int, str] = {}
        self._warned = False

    def enter(self, index: int, item: Any) -> None:
        """Do nothing: items need no preparation."""

    def find_known(self, idx: Sequence[int], items: Sequence[Any]) -> Mapping[int, ItemOutcome]:
        """Return what an earlier run has written."""
        keys = {index: self._make_key(item) for index, item in zip(idx, items, strict=True)}
        written = self._file.find([key for key in keys.values() if key])
        known: dict[int, ItemOutcome] = {}
        for index, key in keys.items():
            blob = written.get(key)
            try:
                if blob is not None:
                    value = self._coder.decode(blob, key.encode())
                    known[index] = ItemOutcome(value=value, attempts=0, calls=0)
                    continue
            except Undecodable:
                pass  # written by another version or program: the item is run again
            if key:
                self._keys[index] = key
        return known

    def keep(self, finished: Sequence[Finished]) -> None:
        """Write results; failures are tried again by the next run."""
        rows: list[tuple[str, bytes]] = []
        for index, _, outcome in finished:
            key = self._keys.pop(index, None)
            if key is None or outcome.error is not None or outcome.rejected:
                continue
            try:
                rows.append((key, b"".join(self._coder.encode(outcome.value, key.encode()))))
            except Unencodable as why:
                if not self._warned:
                    self._warned = True
                    warn_user(
                        f"{self._name}(): some results cannot be written to the checkpoint, so a later run "
                        f"computes them again: {why}."
                    )
        if rows:
            self._file.put(rows)

    def close(self) -> None:
        """Close the file."""
        self._keys.clear()
        self._file.close()


# --- the file -------------------------------------------------------------------------------------


class CheckpointFile(SqliteFile):
    """Results by key in an SQLite file, opened at its first use; they survive the death of the program.

    Args:
        path: Where it is.

    Raises:
        StoreError: From all methods: it cannot be read or written, or is something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(
            path,
            script=_SCRIPT,
            verify=functools.partial(_check_layout, os.fspath(path)),
            name=f"checkpoint {os.fspath(path)!r}",
            on_damage="replace database",
        )

    def find(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return what is written under these keys."""
        found: dict[str, bytes] = {}
        for start in range(0, len(keys), _BATCH):
            part = keys[start : start + _BATCH]
            marks = ",".join("?" * len(part))
            query = f"SELECT key, result FROM results WHERE key IN ({marks})"  # noqa: S608 - only marks
            found.update(self.read(query, part))
        return found

    def put(self, rows: Iterable[tuple[str, bytes]]) -> None:
        """Write results, all in one transaction; when this returns they survive the program."""
        with self.transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO results VALUES (?, ?)", rows)


def _check_layout(path: str, connection: sqlite3.Connection) -> None:
    (owner,) = connection.execute("PRAGMA application_id").fetchone()
    (layout,) = connection.execute("PRAGMA user_version").fetchone()
    if (owner, layout) != (_APPLICATION, _LAYOUT):
        raise StoreError(
            f"checkpoint {path!r}: the file is no checkpoint of this version of opero; "
            "name another one, or delete it."
        )
