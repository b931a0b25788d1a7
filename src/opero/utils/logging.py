# this_file: src/opero/utils/logging.py
"""Context for the standard library's loggers: what belongs to the program, and what belongs to the work at hand.

The former stands in a `ContextAdapter`. The latter is carried by a context variable: tasks begun within
`log_context`, and threads that get a copy of the context, have it too; work at the same time does not
see it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter

__all__ = ["ContextAdapter", "get_logger", "log_context"]

_contexts: ContextVar[Mapping[str, Mapping[str, Any]]] = ContextVar(
    "opero_log", default=MappingProxyType({})
)
"""Name of a logger → what `log_context` has put around the work at hand."""


def get_logger(name: str, level: int | str | None = None) -> logging.Logger:
    """Return the standard library's logger of that name, and set its level.

    Where its lines go is for the program to say (`logging.basicConfig`): no handler is added.

    Args:
        name: Its name.
        level: A number or a name such as "DEBUG"; None leaves the level alone.

    Example:
        >>> get_logger("my_app", level=logging.DEBUG)
        <Logger my_app (DEBUG)>
    """
    logger = logging.getLogger(name)
    if level is not None:
        logger.setLevel(level)
    return logger


class ContextAdapter(_Adapter):
    """A logger with context that stands in all its lines: ` [service=api version=1.0]`, and in `record.context`.

    Args:
        logger: The logger.
        context: What to begin with.

    Example:
        >>> logger = ContextAdapter(get_logger("my_app"), {"service": "api"})
        >>> logger.add_context(version="1.0")
        >>> logger.remove_context("service")
        >>> logger
        <ContextAdapter my_app [version=1.0]>
    """

    extra: Mapping[str, object] | None

    def __init__(self, logger: logging.Logger, context: Mapping[str, Any] | None = None) -> None:
        super().__init__(logger, dict(context or {}))
        self._lock = threading.Lock()
        _show_context(logger)

    @property
    def context(self) -> dict[str, Any]:
        """What stands in all lines of this adapter."""
        return dict(self.extra or {})

    def add_context(self, **context: Any) -> None:
        """Put more into all lines from now on, in all threads and tasks."""
        with self._lock:
            # Replaced, never changed: a line that is just being written keeps what it has seen.
            self.extra = {**(self.extra or {}), **context}

    def remove_context(self, *names: str) -> None:
        """Take these names out again, all of them if none is given; unknown ones do no harm."""
        with self._lock:
            kept = self.extra or {}
            self.extra = {k: v for k, v in kept.items() if names and k not in names}

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """Add the context to one line; what the line itself says in `extra={"context": …}` goes first."""
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
        context: Names and values; they go before an adapter's own.

    Example:
        >>> with log_context(get_logger("my_app"), batch_id="123"):
        ...     get_logger("my_app").info("begins")   # my_app: begins [batch_id=123]
    """
    while isinstance(logger, logging.LoggerAdapter):
        logger = logger.logger
    _show_context(logger)
    known = _contexts.get()
    around = known.get(logger.name, {})
    token = _contexts.set({**known, logger.name: {**around, **context}})
    try:
        yield
    finally:
        _contexts.reset(token)


class _Shown(logging.Filter):
    """Lets every record pass, with its context in it: a filter sees the lines of its own logger only."""

    def filter(self, record: logging.LogRecord) -> bool:
        own = getattr(record, "context", None) or {}
        if not isinstance(own, Mapping):
            return True  # somebody else's meaning of the word
        # The work at hand knows more than the program, and the line itself knows best; an adapter has already
        # put what the line says over what is its own.
        context = {**own, **_contexts.get().get(record.name, {})}
        record.context = context
        if context:
            text = _text(context)
            record.msg = f"{record.msg}{text.replace('%', '%%') if record.args else text}"
        return True


_shown = _Shown()


def _show_context(logger: logging.Logger) -> None:
    if _shown not in logger.filters:
        logger.addFilter(_shown)


def _text(context: Mapping[str, Any]) -> str:
    shown = " ".join(f"{name}={value}" for name, value in context.items())
    return f" [{shown}]" if shown else ""
