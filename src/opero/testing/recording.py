# this_file: src/opero/testing/recording.py
"""Record the outcomes of calls once, and answer calls from the file afterwards, without the network."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from types import coroutine
from typing import IO, TYPE_CHECKING, Any, Final, NoReturn, cast

from opero.core.stream import HandedOut, Stream
from opero.errors import OperoError, OperoUsageError, warn_user
from opero.testing.tape import (
    HEADER,
    CallIdentity,
    RecordedOutcome,
    Unreadable,
    identify,
    read_tape,
    secrets_of,
    write_line,
)
from opero.utils import ambient

if TYPE_CHECKING:
    import os
    from collections.abc import Coroutine

    from opero.core.call import Call
    from opero.core.pipeline import Pipeline


@contextmanager
def record(path: str | os.PathLike[str]) -> Iterator[None]:
    """Record the outcomes of all calls of decorated functions within the block, for `replay`.

    It holds for the whole process: in threads, tasks and maps, and also where the cache is off. The
    outcome is what the caller gets at the end: a result, possibly from the cache, or the last error. It
    is written at once, so that a block that is interrupted keeps what was paid for. Of a generator the items are
    written when it has ended, has been left early, or the block ends.

    Args:
        path: The file; one that is there is written anew. Arguments are not in it, only a digest of
            those that are neither secret nor without content. Results are, so look at it before
            you share it.

    Example:
        >>> import tempfile
        >>> from opero import opero
        >>> from opero.testing import record, replay
        >>> @opero
        ... def price(item):
        ...     print("asking")
        ...     return {"tea": 3}[item]
        >>> path = tempfile.mkdtemp() + "/prices.jsonl"
        >>> with record(path):
        ...     price("tea")
        asking
        3
        >>> with replay(path):
        ...     price("tea")
        3
    """
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="\n") as stream:
        recorder = Recorder(stream)
        try:
            with _installed(recorder):
                yield
        finally:
            recorder.stop()


@contextmanager
def replay(path: str | os.PathLike[str]) -> Iterator[None]:
    """Answer all calls of decorated functions within the block from a file, and call none of them.

    A function is known by its module and name, a call by its arguments. The outcomes of equal calls
    come in the order in which they were recorded. Where the cache is on, the last one also stands for
    all further calls; where it is off, each is given once. There are no pauses, no limits, no
    retries.

    Args:
        path: What `record` has written.

    Raises:
        NotRecordedError: A call was not recorded. It is raised by the call, and by the block too if
            something has swallowed it there.
        OperoUsageError: The file is no recording.
        FileNotFoundError: There is no file.
    """
    file = Path(path)
    player = Player(read_tape(file.read_bytes(), file.name), file.name)
    with _installed(player):
        yield
    player.complain()


@contextmanager
def _installed(tape: ambient.Tape) -> Iterator[None]:
    before = ambient.install_tape(tape)
    try:
        yield
    finally:
        ambient.install_tape(before)


# --- recording --------------------------------------------------------------------------------------

_LEFT: Final = RecordedOutcome("missing", "its consumer left the stream here when it was recorded")


class Recorder:
    """Runs calls as usual and records their outcomes.

    Args:
        stream: The file.

    Attributes:
        streams: Calls of generators that have begun and not ended.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream: IO[str] | None = stream
        self._lock = Lock()
        self._last: dict[CallIdentity, RecordedOutcome] = {}
        self._secrets: set[str] = set()
        self.streams: set[_RecordedCall] = set()
        stream.write(f"{HEADER}\n")

    def stop(self) -> None:
        """Write no more: a call that outlives the block is not recorded, of a stream what has been read."""
        for recorded in list(self.streams):
            self.end_stream(recorded, _LEFT)
        with self._lock:
            self._stream = None

    def take(self, pipeline: Pipeline, call: Call) -> Any:
        """Run a call and write down its outcome."""
        call.taped = True
        identity = identify(pipeline.info, pipeline.options, call)
        if identity is None:
            return pipeline.run(call)
        recorded = _RecordedCall(self, pipeline, call, identity)
        if pipeline.info.kind == "generator":
            return Stream(cast("Generator[Any, Any, Any]", recorded.listen()))
        if pipeline.info.kind == "async_generator":
            return recorded.listen()
        try:
            value = pipeline.run(call)
        except Exception as error:
            recorded.failed(error)
            raise
        if pipeline.awaits:
            return recorded.finish(value)
        self.write(recorded, recorded.value(value))
        return value

    def secrets(self, recorded: _RecordedCall) -> list[str]:
        """Return the secrets of all calls so far, the longest first: a function hands its own to others."""
        found = secrets_of(recorded.pipeline.info, recorded.pipeline.options, recorded.call)
        with self._lock:
            self._secrets.update(found)
            return sorted(self._secrets, key=len, reverse=True)

    def end_stream(self, recorded: _RecordedCall, end: RecordedOutcome) -> None:
        """Write down the items of a call and their end, unless that is done."""
        if recorded in self.streams:
            self.streams.discard(recorded)
            self.write(recorded, RecordedOutcome.of_stream([*recorded.items, end]))

    def write(self, recorded: _RecordedCall, outcome: RecordedOutcome) -> None:
        """Write down the outcome of a call."""
        pipeline, identity = recorded.pipeline, recorded.identity
        if pipeline.awaits and pipeline.info.kind == "sync":
            outcome = RecordedOutcome(outcome.kind, outcome.data, awaited=True)
        for part in outcome.parts if outcome.kind == "stream" else [outcome]:
            if part.kind == "missing" and part != _LEFT:
                warn_user(f"{pipeline.info.name}() is not recorded: {part.data}.")
                break
        with self._lock:
            # A result from the cache is no further outcome.
            if pipeline.options.cache and self._last.get(identity) == outcome:
                return
            self._last[identity] = outcome
            if self._stream is not None:
                self._stream.write(f"{write_line(identity, outcome)}\n")
                self._stream.flush()


class _RecordedCall:
    """A call whose outcome is recorded.

    Attributes:
        items: Those of a generator, so far.
    """

    def __init__(
        self, recorder: Recorder, pipeline: Pipeline, call: Call, identity: CallIdentity
    ) -> None:
        self._recorder = recorder
        self.pipeline = pipeline
        self.call = call
        self.identity = identity
        self.items: list[RecordedOutcome] = []

    def value(self, value: object) -> RecordedOutcome:
        """Return a value as it is written."""
        return RecordedOutcome.of_value(value, self._recorder.secrets(self), self.identity)

    def failed(self, error: Exception) -> None:
        """Write down an error; a wrong use of opero is no answer of a service."""
        if not isinstance(error, OperoUsageError):
            outcome = RecordedOutcome.of_error(error, self._recorder.secrets(self))
            self._recorder.write(self, outcome)

    async def finish(self, running: Coroutine[Any, Any, Any]) -> Any:
        """Await a call and write down its outcome."""
        try:
            value = await running
        except Exception as error:
            self.failed(error)
            raise
        self._recorder.write(self, self.value(value))
        return value

    @coroutine
    def listen(self) -> Generator[Any, Any, Any]:
        """Run the call of a generator, of either kind, and write down its items when it ends."""
        awaits, end = self.pipeline.awaits, _LEFT
        given: Any = None
        self._recorder.streams.add(self)
        try:
            running = self.pipeline.run(self.call)
            source: Any = running if awaits else running.iterate()
            step = source.send
            while True:
                got = step(given)
                if not awaits:
                    self.items.append(self.value(got))
                elif type(got) is HandedOut:  # anything else is for the event loop
                    self.items.append(self.value(got.value))
                try:
                    given, step = (yield got), source.send
                except BaseException as thrown:  # noqa: BLE001 - it is for the generator
                    given, step = thrown, source.throw
        except StopIteration as stop:
            end = self.value(stop.value)
            return stop.value
        except Exception as error:
            end = RecordedOutcome.of_error(error, self._recorder.secrets(self))
            raise
        finally:
            self._recorder.end_stream(self, end)
            # A frame that names an error which passes through it is a reference cycle.
            given = None


# --- replaying --------------------------------------------------------------------------------------


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

    def __init__(self, outcomes: dict[CallIdentity, list[RecordedOutcome]], name: str) -> None:
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
        identity = identify(pipeline.info, pipeline.options, call)
        if identity is None:
            return pipeline.run(call)  # the function itself refuses the arguments
        call.source = "hit"
        outcome = self._next(pipeline, identity)
        if outcome is not None and outcome.awaited:
            pipeline.awaits = pipeline.fast_path.closed = True
        if pipeline.info.kind == "generator":
            return Stream(cast("Generator[Any, Any, Any]", self._play(pipeline, identity, outcome)))
        if pipeline.info.kind == "async_generator":
            return self._play(pipeline, identity, outcome)
        if pipeline.awaits:
            return self._atake(pipeline, identity, outcome)
        return self._answer(pipeline, identity, outcome)

    async def _atake(
        self, pipeline: Pipeline, identity: CallIdentity, outcome: RecordedOutcome | None
    ) -> Any:
        return self._answer(pipeline, identity, outcome)

    @coroutine
    def _play(
        self, pipeline: Pipeline, identity: CallIdentity, outcome: RecordedOutcome | None
    ) -> Generator[Any, Any, Any]:
        """Give out the items of a stream, of either kind, and its end."""
        parts = [outcome] if outcome is None or outcome.kind != "stream" else outcome.parts
        for part in parts[:-1]:
            item = self._answer(pipeline, identity, part)
            yield HandedOut(item) if pipeline.awaits else item
        return self._answer(pipeline, identity, parts[-1])

    def _answer(
        self, pipeline: Pipeline, identity: CallIdentity, outcome: RecordedOutcome | None
    ) -> Any:
        if outcome is None:
            self._miss(pipeline, identity, self._absent(identity))
        try:
            value, error = outcome.open(identity)
        except Unreadable as signal:
            self._miss(pipeline, identity, f"it is in {self._name}, but {signal}")
        try:
            if error is not None:
                raise error
            return value
        finally:
            # A frame that names an error which passes through it is a reference cycle.
            del error

    def _next(self, pipeline: Pipeline, identity: CallIdentity) -> RecordedOutcome | None:
        with self._lock:
            recorded, given = self._outcomes.get(identity, ()), self._given.get(identity, 0)
            if given < len(recorded):
                self._given[identity] = given + 1
                return recorded[given]
            return recorded[-1] if recorded and pipeline.options.cache else None

    def _absent(self, identity: CallIdentity) -> str:
        recorded = len(self._outcomes.get(identity, ()))
        if recorded:
            times = "once" if recorded == 1 else f"{recorded} times"
            return f"{self._name} holds it {times}, and it is made once more"
        others = sum(other.function == identity.function for other in self._outcomes)
        known = f"{others or 'no'} other call{'s' * (others != 1)} of the function"
        return f"{self._name} holds {known}"

    def _miss(self, pipeline: Pipeline, identity: CallIdentity, why: str) -> NoReturn:
        message = (
            f"{pipeline.info.qualname}() was not recorded: {why} "
            f"(function {identity.function}, call {identity.call})"
        )
        with self._lock:
            self._missed = self._missed or (message, identity.function, identity.call)
        raise NotRecordedError(message, identity.function, identity.call)
