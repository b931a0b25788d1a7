# this_file: tests/examples/conftest.py
"""Makes the examples importable as their readers run them: from their own folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture
def examples() -> Path:
    """The folder of the examples."""
    return EXAMPLES
