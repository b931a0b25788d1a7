# this_file: src/opero/durable/stores/schema.py
"""Tables of the SQLite journal."""

from __future__ import annotations

from typing import Final

__all__ = ["SCHEMA", "VERSION"]

VERSION: Final = 1

SCHEMA: Final = f"""
CREATE TABLE IF NOT EXISTS workflow (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, version TEXT, args TEXT NOT NULL, hash TEXT NOT NULL,
    state TEXT NOT NULL, output TEXT, error TEXT, failed_step TEXT,
    owner TEXT, epoch INTEGER NOT NULL, recoveries INTEGER NOT NULL, progress INTEGER NOT NULL,
    wake REAL, cancel INTEGER NOT NULL, created REAL NOT NULL, updated REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS workflow_open ON workflow (state, wake)
    WHERE state NOT IN ('done', 'failed', 'cancelled', 'dead');
CREATE INDEX IF NOT EXISTS workflow_owned ON workflow (owner) WHERE owner IS NOT NULL;
CREATE INDEX IF NOT EXISTS workflow_age ON workflow (created);
CREATE TABLE IF NOT EXISTS step (
    workflow TEXT NOT NULL, path TEXT NOT NULL, name TEXT NOT NULL, hash TEXT NOT NULL,
    state TEXT NOT NULL, value TEXT, attempts INTEGER NOT NULL, wake REAL,
    began REAL NOT NULL, ended REAL, place INTEGER NOT NULL,
    PRIMARY KEY (workflow, path)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS signal (
    number INTEGER PRIMARY KEY, workflow TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS signal_of ON signal (workflow, name);
PRAGMA user_version = {VERSION};
"""
