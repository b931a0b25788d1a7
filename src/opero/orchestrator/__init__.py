# this_file: src/opero/orchestrator/__init__.py
"""Configure the pipeline with objects: `Orchestrator`, `@orchestrate` and `FallbackChain`."""

from __future__ import annotations

from opero.orchestrator.execution import Orchestrator, orchestrate
from opero.orchestrator.fallback_chain import FallbackChain

__all__ = ["FallbackChain", "Orchestrator", "orchestrate"]
