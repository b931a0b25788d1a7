# this_file: src/opero/concurrency/journal.py
"""A file of results by key, in SQLite: what is written there survives the death of the program."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from opero.errors import StoreError

__all__ = ["Journal"]

_LAYOUT: Final = 1
_APPLICATION: Final = 0x6F706A6D  # "opjm"
_ASKED: Final = 500
"""Keys in one question: SQLite takes a limited number of parameters."""
_PATIENCE: Final = 30.0
"""Seconds to wait for another program that writes to the file."""


class Journal:
    """The file, opened at its first use.

    Args:
        path: Where it is.

    Raises:
        StoreError: From all methods: it cannot be read or written, or is something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: str = os.fspath(path)
        self._opened: sqlite3.Connection | None = None

    def find(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return what is written under these keys."""
        found: dict[str, bytes] = {}
        with self._told() as connection:
            for start in range(0, len(keys), _ASKED):
                part = keys[start : start + _ASKED]
                marks = ",".join("?" * len(part))
                found.update(
                    connection.execute(
                        f"SELECT key, result FROM results WHERE key IN ({marks})",  # noqa: S608 - only marks
                        part,
                    )
                )
        return found

    def write(self, rows: Iterable[tuple[str, bytes]]) -> None:
        """Write results, all in one transaction; when this returns they survive the program."""
        with self._told() as connection, connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("INSERT OR REPLACE INTO results VALUES (?, ?)", rows)

    def close(self) -> None:
        """Close the file."""
        connection, self._opened = self._opened, None
        if connection is not None:
            connection.close()

    # --- the file ---------------------------------------------------------------------------------

    @contextmanager
    def _told(self) -> Iterator[sqlite3.Connection]:
        try:
            if self._opened is None:
                self._opened = self._open()
            yield self._opened
        except sqlite3.Error as error:
            raise StoreError(f"checkpoint {self.path!r}: {error}") from error

    def _open(self) -> sqlite3.Connection:
        # One thread at a time, but not always the same.
        connection = sqlite3.connect(
            self.path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False
        )
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        (owner,) = connection.execute("PRAGMA application_id").fetchone()
        (layout,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if (owner, layout) != (_APPLICATION, _LAYOUT):
            if tables:
                raise StoreError(
                    f"checkpoint {self.path!r}: the file is no checkpoint of this version of opero; "
                    "name another one, or delete it."
                )
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            connection.execute(f"PRAGMA user_version = {_LAYOUT}")
        connection.execute("PRAGMA journal_mode = WAL")
        # Survives the program at once, and a power failure up to the last moments before it.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS results (key TEXT PRIMARY KEY, result BLOB) WITHOUT ROWID"
        )

    def __repr__(self) -> str:
        return f"<Journal {self.path!r}, {'closed' if self._opened is None else 'open'}>"
