# this_file: src/opero/orchestrator/__init__.py
"""Configure the pipeline with objects: `Orchestrator`, `@orchestrate` and `FallbackChain`."""

from __future__ import annotations

from opero.orchestrator.fallback_chain import FallbackChain
from opero.orchestrator.execution import Orchestrator, orchestrate

__all__ = ["FallbackChain", "Orchestrator", "orchestrate"]
