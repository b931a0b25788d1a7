# this_file: src/opero/concurrency/journal.py
"""A file of results by key, in SQLite: what is written there survives the death of the program."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Sequence
from typing import Final

from opero.errors import StoreError
from opero.utils.sqlite import SqliteFile

__all__ = ["Journal"]

_LAYOUT: Final = 1
_APPLICATION: Final = 0x6F706A6D  # "opjm"
_BATCH: Final = 500
"""Keys in one query: SQLite takes a limited number of parameters."""

_SCRIPT: Final = f"""
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_LAYOUT};
CREATE TABLE results (key TEXT PRIMARY KEY, result BLOB) WITHOUT ROWID
"""


class Journal:
    """The file, opened at its first use.

    Args:
        path: Where it is.

    Raises:
        StoreError: From all methods: it cannot be read or written, or is something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: str = os.fspath(path)
        self._file = SqliteFile(
            self.path,
            script=_SCRIPT,
            verify=self._verify,
            name=f"checkpoint {self.path!r}",
            on_damage="replace database",
            on_loss="recreate",
        )

    def find(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return what is written under these keys."""
        found: dict[str, bytes] = {}
        for start in range(0, len(keys), _BATCH):
            part = keys[start : start + _BATCH]
            marks = ",".join("?" * len(part))
            found.update(
                self._file.read(
                    f"SELECT key, result FROM results WHERE key IN ({marks})",  # noqa: S608 - only marks
                    part,
                )
            )
        return found

    def write(self, rows: Iterable[tuple[str, bytes]]) -> None:
        """Write results, all in one transaction; when this returns they survive the program."""
        with self._file.transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO results VALUES (?, ?)", rows)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _verify(self, connection: sqlite3.Connection) -> None:
        (owner,) = connection.execute("PRAGMA application_id").fetchone()
        (layout,) = connection.execute("PRAGMA user_version").fetchone()
        if (owner, layout) != (_APPLICATION, _LAYOUT):
            raise StoreError(
                f"checkpoint {self.path!r}: the file is no checkpoint of this version of opero; "
                "name another one, or delete it."
            )

    def __repr__(self) -> str:
        return f"<Journal {self.path!r}, {'open' if self._file.is_open else 'closed'}>"
