# this_file: src/opero/instrumentation/__init__.py
"""Log, count, trace and draw events. No listener is on unless the program asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opero.utils.lazy import export_lazily

if TYPE_CHECKING:
    from opero.instrumentation.logs import log_events as log_events
    from opero.instrumentation.opentelemetry import OpenTelemetryListener as OpenTelemetryListener
    from opero.instrumentation.opentelemetry import trace_calls as trace_calls
    from opero.instrumentation.prometheus import PrometheusListener as PrometheusListener
    from opero.instrumentation.timeline import Timeline as Timeline
    from opero.utils.logging import configure_logging as configure_logging


export_lazily(
    __name__,
    {
        "opero.instrumentation.logs": ("log_events",),
        "opero.instrumentation.opentelemetry": ("OpenTelemetryListener", "trace_calls"),
        "opero.instrumentation.prometheus": ("PrometheusListener",),
        "opero.instrumentation.timeline": ("Timeline",),
        "opero.utils.logging": ("configure_logging",),
    },
)
