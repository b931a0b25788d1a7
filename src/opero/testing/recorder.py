# this_file: src/opero/testing/recorder.py
"""The tape that writes: calls run as usual, and what they give is written down."""

from __future__ import annotations

import warnings
from threading import Lock
from typing import IO, TYPE_CHECKING, Any

from opero.errors import OperoUsageError, OperoWarning
from opero.testing.identity import Identity, identify, secrets_of
from opero.testing.tape import HEADER, Outcome, write_line
from opero.utils.stack import users_stacklevel

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from opero.core.call import Call
    from opero.core.pipeline import Pipeline

__all__ = ["Recorder"]


class Recorder:
    """Runs calls as usual and writes down what they give.

    Args:
        stream: Where to.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream: IO[str] | None = stream
        self._lock = Lock()
        self._last: dict[Identity, Outcome] = {}
        self._hidden: set[str] = set()
        stream.write(f"{HEADER}\n")

    def stop(self) -> None:
        """Write no more: a call that outlives the block is not recorded."""
        with self._lock:
            self._stream = None

    def take(self, pipeline: Pipeline, call: Call) -> Any:
        """Run a call and write down its outcome."""
        call.taped = True
        who = identify(pipeline.info, pipeline.options, call)
        if who is None:
            return pipeline.run(call)
        if pipeline.info.kind in ("generator", "async_generator"):
            self._write(pipeline, who, Outcome("missing", "generators are not recorded"))
            return pipeline.run(call)
        try:
            value = pipeline.run(call)
        except Exception as error:
            self._failed(pipeline, call, who, error)
            raise
        if pipeline.awaits:
            return self._atake(pipeline, call, who, value)
        self._gave(pipeline, call, who, value)
        return value

    async def _atake(
        self, pipeline: Pipeline, call: Call, who: Identity, running: Coroutine[Any, Any, Any]
    ) -> Any:
        try:
            value = await running
        except Exception as error:
            self._failed(pipeline, call, who, error)
            raise
        self._gave(pipeline, call, who, value)
        return value

    def _gave(self, pipeline: Pipeline, call: Call, who: Identity, value: object) -> None:
        self._write(pipeline, who, Outcome.of_value(value, self._secrets(pipeline, call), who))

    def _failed(self, pipeline: Pipeline, call: Call, who: Identity, error: Exception) -> None:
        # A mistake of the program's is no answer of a service.
        if not isinstance(error, OperoUsageError):
            self._write(pipeline, who, Outcome.of_error(error, self._secrets(pipeline, call)))

    def _secrets(self, pipeline: Pipeline, call: Call) -> list[str]:
        """Return the secrets of all calls so far, the longest first: a function passes its own on."""
        with self._lock:
            self._hidden.update(secrets_of(pipeline.info, pipeline.options, call))
            return sorted(self._hidden, key=len, reverse=True)

    def _write(self, pipeline: Pipeline, who: Identity, outcome: Outcome) -> None:
        if pipeline.awaits and pipeline.info.kind == "sync":
            outcome = Outcome(outcome.kind, outcome.told, awaited=True)
        if outcome.kind == "missing":
            warnings.warn(
                f"{pipeline.info.name}() is not recorded: {outcome.told}.",
                OperoWarning,
                stacklevel=users_stacklevel(),
            )
        with self._lock:
            # A result from the cache says nothing new.
            if pipeline.options.cache and self._last.get(who) == outcome:
                return
            self._last[who] = outcome
            if self._stream is not None:
                self._stream.write(f"{write_line(who, outcome)}\n")
                self._stream.flush()
