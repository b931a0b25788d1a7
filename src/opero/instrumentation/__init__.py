# this_file: src/opero/instrumentation/__init__.py
"""Log, count, trace and draw events. No listener is on unless the program asks for it."""

from __future__ import annotations

from opero.instrumentation.exporters import OpenTelemetryListener, PrometheusListener, trace_calls
from opero.instrumentation.logs import Timeline, log_events
from opero.utils.logging import configure_logging

__all__ = [
    "OpenTelemetryListener", "PrometheusListener", "Timeline", "configure_logging", "log_events", "trace_calls",
]  # fmt: skip
