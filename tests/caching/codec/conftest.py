# this_file: tests/caching/codec/conftest.py
"""A user's home of its own, so that no test reads or writes the developer's key."""

from __future__ import annotations

from pathlib import Path

import pytest

from opero.caching import signing


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration folder that the key is kept in; it does not exist yet."""
    folder = tmp_path / "config" / "opero"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder.parent))
    monkeypatch.setattr(signing, "_key_path", lambda: folder / "cache.key")
    monkeypatch.delenv("OPERO_CACHE_SECRET", raising=False)
    signing._warned_of.cache_clear()
    signing._of_file.cache_clear()
    return folder
