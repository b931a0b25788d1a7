# this_file: tests/conftest.py
"""What the whole suite shares: a clean environment, and `cleanup.py` as a module."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

# A developer's own switch must not turn off what is under test.
os.environ.pop("OPERO_DISABLE", None)

# Shared machines stall: pytest-timeout guards against hangs, hypothesis need not judge speed.
settings.register_profile("opero", deadline=None)
settings.load_profile("opero")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def cleanup(root: Path) -> ModuleType:
    """`cleanup.py`, imported."""
    spec = importlib.util.spec_from_file_location("cleanup", root / "cleanup.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
