# this_file: src/opero/core/stream.py
"""Run generators as calls that last until their last item.

A plain generator is started by the stages, which register what they do at its end. An asynchronous
one is read by a coroutine that runs through all stages and is suspended between two items.
"""

from __future__ import annotations

import contextvars
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from types import coroutine
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from opero.core.call import Call


Step = Callable[[Callable[[], Any]], Any]
"""Runs one step of a generator, within the limits of time."""


# --- plain generators -----------------------------------------------------------------------------


def _unlimited(work: Callable[[], Any]) -> Any:
    return work()


class Stream:
    """A plain generator that has given its first item, or has ended without one.

    Attributes:
        source: The generator.
        item: What it yielded last.
        ended: Whether it has returned, failed or been closed.
        value: What it returned.
    """

    __slots__ = ("_call", "_callbacks", "_step", "ended", "item", "source", "value")

    def __init__(self, source: Generator[Any, Any, Any]) -> None:
        self.source: Generator[Any, Any, Any] = source
        self.item: Any = None
        self.value: Any = None
        self.ended: bool = False
        self._call: Call | None = None
        self._step: Step = _unlimited
        self._callbacks: list[Callable[[BaseException | None], object]] = []
        self._take(lambda: next(source))

    def attach(self, call: Call, step: Step) -> None:
        """Make the stream part of a call whose steps have limits."""
        self._call, self._step = call, step
        call.stream, call.items = self, 1

    def at_end(self, callback: Callable[[BaseException | None], object]) -> None:
        """Call `callback` when the stream ends: with its error, a `GeneratorExit` if it is dropped, or None."""
        self._callbacks.append(callback)

    def at_failure(self, callback: Callable[[Exception], object]) -> None:
        """Call `callback` with the error of the stream, if it fails."""
        self.at_end(lambda error: callback(error) if isinstance(error, Exception) else None)

    def iterate(self) -> Generator[Any, Any, Any]:
        """Yield the first item and then all others, passing on what is sent and thrown in (PEP 380)."""
        while not self.ended:
            try:
                sent = yield self.item
            except GeneratorExit:
                self.close()
                raise
            except BaseException as thrown:  # noqa: BLE001 - the generator decides what an exception means
                self._advance(self.source.throw, thrown)
            else:
                self._advance(self.source.send, sent)
        return self.value

    def close(self) -> None:
        """Close the generator; the call counts as neither success nor failure."""
        if self.ended:
            return
        outcome: BaseException = GeneratorExit()
        try:
            self.source.close()
        except BaseException as error:
            outcome = error
            raise
        finally:
            self._finish(outcome)
            # A frame that names an error which passes through it is a reference cycle.
            del outcome

    def __del__(self) -> None:
        # A receipt's stream that nothing has read.
        self.close()

    def _advance(self, method: Callable[[Any], Any], given: Any) -> None:
        try:
            self._step(lambda: self._take(lambda: method(given)))
        except BaseException as error:
            self._finish(error)
            raise
        if self.ended:
            self._finish(None)
        elif self._call is not None:
            self._call.items += 1

    def _take(self, work: Callable[[], Any]) -> None:
        """Take the next item; an error in the generator passes through."""
        try:
            self.item = work()
        except StopIteration as end:
            self.ended, self.item, self.value = True, None, end.value

    def _finish(self, outcome: BaseException | None) -> None:
        self.ended, self.item = True, None
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(outcome)
        # Stream and call refer to each other.
        if self._call is not None:
            self._call.stream = None
            self._call = None
        self._step = _unlimited


def start_stream(
    fn: Callable[..., Generator[Any, Any, Any]], /, *args: Any, **kwargs: Any
) -> Stream:
    """Call a generator function and take its first item, so that a failure before it can be retried."""
    return Stream(fn(*args, **kwargs))


# --- asynchronous generators ----------------------------------------------------------------------


class HandedOut:
    """Carries an item from the innermost step to the consumer, past the event loop."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value: Any = value


@coroutine
def _hand_out(item: Any) -> Generator[Any, Any, Any]:
    """Suspend the whole call until the consumer asks for the next item; return what it sends."""
    return (yield HandedOut(item))


async def read_stream(
    source: AsyncGenerator[Any, Any], call: Call, limited: Callable[..., Any]
) -> None:
    """Read an asynchronous generator to its end, as the innermost step of a call.

    Args:
        source: The generator.
        call: The call; counts the items.
        limited: Calls a function that asks for one item, and puts the limits of time around the wait for it.
    """
    step: Callable[..., Any] = source.__anext__
    given: tuple[Any, ...] = ()
    try:
        while True:
            try:
                item = await limited(step, *given)
            except StopAsyncIteration:
                return
            call.items += 1
            try:
                sent = await _hand_out(item)
            except GeneratorExit:
                raise
            except BaseException as thrown:  # noqa: BLE001 - the generator decides what an exception means
                step, given = source.athrow, (thrown,)
            else:
                step, given = source.asend, (sent,)
            del item
    finally:
        await source.aclose()


class AsyncStream:
    """An asynchronous generator's call: a coroutine through all stages, suspended between two items.

    It runs in a copy of the consumer's context, so that its deadline and its run end with it.

    Args:
        running: The coroutine.

    Attributes:
        item: What the generator yielded last.
        ended: Whether the call has ended.
    """

    __slots__ = ("_context", "_running", "ended", "item")

    def __init__(self, running: Coroutine[Any, Any, Any]) -> None:
        self._running = running
        self._context = contextvars.copy_context()
        self.item: Any = None
        self.ended: bool = False

    @coroutine
    def _advance(self, method: Callable[[Any], Any], given: Any) -> Generator[Any, Any, None]:
        """Run the call until its next item; what it awaits meanwhile is passed on to the event loop."""
        try:
            got = self._context.run(method, given)
            while type(got) is not HandedOut:
                try:
                    answer = yield got
                except BaseException as thrown:  # noqa: BLE001 - a cancellation, for the call to handle
                    got = self._context.run(self._running.throw, thrown)
                else:
                    got = self._context.run(self._running.send, answer)
        except StopIteration:
            self.ended, self.item = True, None
        except BaseException:
            self.ended, self.item = True, None
            raise
        else:
            self.item = got.value

    async def send(self, value: Any = None) -> None:
        """Go on to the next item; the first time, start the call."""
        await self._advance(self._running.send, value)

    async def throw(self, error: BaseException) -> None:
        """Throw an exception into the generator; a `GeneratorExit` drops the stream."""
        if isinstance(error, GeneratorExit):
            await self.close()
            raise GeneratorExit
        await self._advance(self._running.throw, error)

    async def close(self) -> None:
        """Drop the stream: everything is given back, and the call counts as neither success nor failure."""
        try:
            await self._advance(self._running.throw, GeneratorExit())
        except GeneratorExit:
            return
        if not self.ended:
            raise RuntimeError("the asynchronous generator ignored GeneratorExit")

    async def iterate(self) -> AsyncGenerator[Any, Any]:
        """Yield the first item and then all others, passing on what is sent and thrown in (PEP 525)."""
        while not self.ended:
            try:
                step = self.send((yield self.item))
            except BaseException as thrown:  # noqa: BLE001 - the generator decides what an exception means
                step = self.throw(thrown)
            await step


STREAMS: Final = {
    "generator": "return (yield from _opero_run({new_call}).iterate())",
    # An asynchronous generator cannot delegate to another: this is the loop of `AsyncStream.iterate`.
    "async_generator": """\
_opero_stream = _opero_AsyncStream(_opero_run({new_call}))
await _opero_stream.send()
while not _opero_stream.ended:
    try:
        _opero_step = _opero_stream.send((yield _opero_stream.item))
    except _opero_BaseException as _opero_thrown:
        _opero_step = _opero_stream.throw(_opero_thrown)
    await _opero_step
""",
}
"""The bodies of decorated generators, by kind, as `core.wrapper` fills them in."""
