# this_file: src/opero/instrumentation/__init__.py
"""Log, count, trace and draw events. No listener is on unless the program asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opero.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from opero.instrumentation.logs import log_events
    from opero.instrumentation.opentelemetry import OpenTelemetryListener, trace_calls
    from opero.instrumentation.prometheus import PrometheusListener
    from opero.instrumentation.timeline import Timeline
    from opero.utils.logging import configure_logging

__all__ = [
    "OpenTelemetryListener",
    "PrometheusListener",
    "Timeline",
    "configure_logging",
    "log_events",
    "trace_calls",
]

__getattr__: Callable[[str], Any]
__dir__: Callable[[], list[str]]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "opero.instrumentation.logs": ("log_events",),
        "opero.instrumentation.opentelemetry": ("OpenTelemetryListener", "trace_calls"),
        "opero.instrumentation.prometheus": ("PrometheusListener",),
        "opero.instrumentation.timeline": ("Timeline",),
        "opero.utils.logging": ("configure_logging",),
    },
)
