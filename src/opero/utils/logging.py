# this_file: src/opero/utils/logging.py
"""Add context to log lines of the standard library, and switch on opero's own.

Context of the whole program is held by a `ContextAdapter`. Context of the current work is held by a context variable:
tasks started within `log_context`, and threads that get a copy of the context, have it too; concurrent work does not.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import opero.utils.checks as checks

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter

__all__ = ["ContextAdapter", "configure_logging", "get_logger", "log_context"]

_contexts: ContextVar[Mapping[str, Mapping[str, Any]]] = ContextVar(
    "opero_log", default=MappingProxyType({})
)
"""Name of a logger → context of the current work."""


def configure_logging(
    level: int | str | None = "INFO",
    *,
    to: logging.Logger | _Adapter | str | None = None,
    messages: bool = False,
) -> None:
    """Write opero's events to a log from now on; called again, it replaces what was configured before.

    Args:
        level: Lowest level that is written; None for silence.
        to: A logger of the standard library or its name; None for loguru.
        messages: Show errors with their messages, not only their types. Known forms of secrets are masked.

    Raises:
        OperoUsageError: The level is not known.

    Example:
        >>> configure_logging("WARNING")
        >>> configure_logging(None)
    """
    # The listener belongs to a layer above, and is loaded when it is used.
    import_module("opero.instrumentation.logs").configure(level, to, messages=messages)


def get_logger(name: str, level: int | str | None = None) -> logging.Logger:
    """Return the standard library's logger of that name, and set its level.

    No handler is added: the program decides where lines go (`logging.basicConfig`).

    Args:
        name: Its name.
        level: A number or a name such as "DEBUG"; None keeps the level.

    Example:
        >>> get_logger("my_app", level=logging.DEBUG)
        <Logger my_app (DEBUG)>
    """
    logger = logging.getLogger(name)
    if level is not None:
        logger.setLevel(level)
    return logger


class ContextAdapter(_Adapter):
    """A logger with context in all its lines: ` [service=api version=1.0]`, and in `record.context`.

    Args:
        logger: The logger.
        context: The first context.

    Example:
        >>> logger = ContextAdapter(get_logger("my_app"), {"service": "api"})
        >>> logger.add_context(version="1.0")
        >>> logger.remove_context("service")
        >>> logger
        <ContextAdapter my_app [version=1.0]>
    """

    extra: Mapping[str, object] | None

    def __init__(self, logger: logging.Logger, context: Mapping[str, Any] | None = None) -> None:
        _show_context(logger)
        super().__init__(logger, dict(context or {}))
        self._lock = threading.Lock()

    @property
    def context(self) -> dict[str, Any]:
        """Context of all lines of this adapter."""
        return dict(self.extra or {})

    def add_context(self, **context: Any) -> None:
        """Put more into all lines from now on, in all threads and tasks."""
        with self._lock:
            # Replaced, never changed: a line that is just being written keeps its context.
            self.extra = {**(self.extra or {}), **context}

    def remove_context(self, *names: str) -> None:
        """Remove these names, or all of them if none is given; unknown names are ignored."""
        with self._lock:
            kept = self.extra or {}
            self.extra = {k: v for k, v in kept.items() if names and k not in names}

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """Add the context to one line; `extra={"context": …}` of the line itself takes precedence."""
        extra = dict(kwargs.get("extra") or {})
        extra["context"] = {**(self.extra or {}), **(extra.get("context") or {})}
        return msg, {**kwargs, "extra": extra}

    def __repr__(self) -> str:
        return f"<ContextAdapter {self.logger.name}{_text(self.extra or {})}>"


@contextmanager
def log_context(logger: logging.Logger | _Adapter, **context: Any) -> Iterator[None]:
    """Put context into all lines that this logger writes for the work within the block.

    Args:
        logger: A logger or an adapter around one.
        context: Names and values; they take precedence over those of an adapter.

    Example:
        >>> with log_context(get_logger("my_app"), batch_id="123"):
        ...     get_logger("my_app").info("begins")   # my_app: begins [batch_id=123]
    """
    logger = _show_context(logger)
    known = _contexts.get()
    around = known.get(logger.name, {})
    token = _contexts.set({**known, logger.name: {**around, **context}})
    try:
        yield
    finally:
        _contexts.reset(token)


class _ContextFilter(logging.Filter):
    """Adds the context to every record: a filter sees the lines of its own logger only."""

    def filter(self, record: logging.LogRecord) -> bool:
        own = getattr(record, "context", None) or {}
        if not isinstance(own, Mapping):
            return True  # another meaning of the word
        # The current work takes precedence over the program, and the line itself over both; an adapter has already
        # put the context of the line over its own.
        context = {**own, **_contexts.get().get(record.name, {})}
        record.context = context
        if context:
            text = _text(context)
            record.msg = f"{record.msg}{text.replace('%', '%%') if record.args else text}"
        return True


_context_filter = _ContextFilter()


def _show_context(logger: logging.Logger | _Adapter) -> logging.Logger:
    """Let a logger write the context, and return it, without the adapters around it."""
    checks.logger("logger", logger)
    while isinstance(logger, logging.LoggerAdapter):
        logger = logger.logger
    if _context_filter not in logger.filters:
        logger.addFilter(_context_filter)
    return logger


def _text(context: Mapping[str, Any]) -> str:
    shown = " ".join(f"{name}={value}" for name, value in context.items())
    return f" [{shown}]" if shown else ""
