# this_file: tests/benchmarks/conftest.py
"""Makes the `benchmarks` package importable: it is part of the repository, not of the wheel."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
