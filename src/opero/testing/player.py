# this_file: src/opero/testing/player.py
"""The tape that reads: calls are answered from a recording, and nothing is called."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any, NoReturn

from opero.errors import OperoError
from opero.testing.identity import Identity, identify
from opero.testing.tape import Outcome, Untold

if TYPE_CHECKING:
    from opero.core.call import Call
    from opero.core.pipeline import Pipeline

__all__ = ["NotRecordedError", "Player"]


class NotRecordedError(OperoError, AssertionError):
    """A call within `replay` is not in the recording; nothing was called.

    Attributes:
        function: Module and name of the function.
        call: The digest of the arguments by which the call is looked up.
    """

    def __init__(self, message: str, function: str = "", call: str = "") -> None:
        super().__init__(message, function, call)
        self.function = function
        self.call = call

    def __str__(self) -> str:
        return str(self.args[0])


class Player:
    """Answers calls from a recording.

    Args:
        outcomes: What was recorded.
        name: Of the file, for messages.
    """

    def __init__(self, outcomes: dict[Identity, list[Outcome]], name: str) -> None:
        self._outcomes = outcomes
        self._name = name
        self._given = dict.fromkeys(outcomes, 0)
        self._lock = Lock()
        self._missed: tuple[str, str, str] | None = None

    def complain(self) -> None:
        """Fail if a call was not recorded.

        Raises:
            NotRecordedError: The first one's.
        """
        if self._missed is not None:
            raise NotRecordedError(*self._missed)

    def take(self, pipeline: Pipeline, call: Call) -> Any:
        """Return or raise what was recorded; nothing is called."""
        call.taped = True
        who = identify(pipeline.info, pipeline.options, call)
        if who is None:
            return pipeline.run(call)  # which says what is wrong with the arguments
        call.source = "hit"
        outcome = self._next(pipeline, who)
        if outcome is not None and outcome.awaited:
            pipeline.awaits = pipeline.fast_path.closed = True
        if pipeline.awaits:
            return self._atake(pipeline, who, outcome)
        return self._answer(pipeline, who, outcome)

    async def _atake(self, pipeline: Pipeline, who: Identity, outcome: Outcome | None) -> Any:
        return self._answer(pipeline, who, outcome)

    def _answer(self, pipeline: Pipeline, who: Identity, outcome: Outcome | None) -> Any:
        if outcome is None:
            self._miss(pipeline, who, self._absent(who))
        try:
            value, error = outcome.open(who)
        except Untold as signal:
            self._miss(pipeline, who, f"it is in {self._name}, but {signal}")
        try:
            if error is not None:
                raise error
            return value
        finally:
            # A frame that names an error which passes through it is a reference cycle.
            del error

    def _next(self, pipeline: Pipeline, who: Identity) -> Outcome | None:
        with self._lock:
            recorded, given = self._outcomes.get(who, ()), self._given.get(who, 0)
            if given < len(recorded):
                self._given[who] = given + 1
                return recorded[given]
            return recorded[-1] if recorded and pipeline.options.cache else None

    def _absent(self, who: Identity) -> str:
        recorded = len(self._outcomes.get(who, ()))
        if recorded:
            times = "once" if recorded == 1 else f"{recorded} times"
            return f"{self._name} holds it {times}, and it is made once more"
        others = sum(other.function == who.function for other in self._outcomes)
        known = f"{others or 'no'} other call{'s' * (others != 1)} of the function"
        return f"{self._name} holds {known}"

    def _miss(self, pipeline: Pipeline, who: Identity, why: str) -> NoReturn:
        told = f"{pipeline.info.qualname}() was not recorded: {why} (function {who.function}, call {who.call})"
        with self._lock:
            self._missed = self._missed or (told, who.function, who.call)
        raise NotRecordedError(told, who.function, who.call)
