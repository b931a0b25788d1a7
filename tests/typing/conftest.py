# this_file: tests/typing/conftest.py
"""Type checkers take some seconds: `pytest -m "not typing"` leaves them out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", "typing: runs a type checker, which takes some seconds")
