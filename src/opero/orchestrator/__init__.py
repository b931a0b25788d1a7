# this_file: src/opero/orchestrator/__init__.py
"""The pipeline by configuration objects: `Orchestrator`, `@orchestrate` and `FallbackChain`."""

from __future__ import annotations

from opero.orchestrator.chain import FallbackChain
from opero.orchestrator.decorator import orchestrate
from opero.orchestrator.orchestrator import Orchestrator

__all__ = ["FallbackChain", "Orchestrator", "orchestrate"]
