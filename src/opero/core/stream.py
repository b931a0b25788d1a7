# this_file: src/opero/core/stream.py
"""Generators in the pipeline: started and restarted until the first item is out, then left alone."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any

__all__ = ["AsyncStarted", "Started", "astart", "start"]


class Started:
    """A generator that has given its first item, or has ended without one.

    Attributes:
        source: The generator.
        item: What it yielded last.
        ended: Whether it has returned.
        value: What it returned.
    """

    __slots__ = ("ended", "item", "source", "value")

    def __init__(self, source: Generator[Any, Any, Any]) -> None:
        self.source = source
        self.item: Any = None
        self.value: Any = None
        self.ended = False
        self.advance(next, source)

    def advance(self, step: Callable[[Any], Any], given: Any) -> None:
        """Take the next item by `step(given)`; an error in the generator passes through."""
        try:
            self.item = step(given)
        except StopIteration as end:
            self.ended, self.item, self.value = True, None, end.value

    def stream(self) -> Generator[Any, Any, Any]:
        """Yield the first item and then all others, passing on what is sent and thrown in (PEP 380)."""
        while not self.ended:
            try:
                sent = yield self.item
            except GeneratorExit:
                self.source.close()
                raise
            except BaseException as thrown:  # noqa: BLE001 - the generator decides what an exception means
                self.advance(self.source.throw, thrown)
            else:
                self.advance(self.source.send, sent)
        return self.value


class AsyncStarted:
    """The same for an asynchronous generator, which returns no value.

    The generated wrapper has the loop of `stream()` once more: an asynchronous generator cannot delegate to another.
    """

    __slots__ = ("ended", "item", "source")

    def __init__(self, source: AsyncGenerator[Any, Any]) -> None:
        self.source = source
        self.item: Any = None
        self.ended = False

    async def advance(self, step: Callable[..., Any], *given: Any) -> None:
        """Take the next item by `await step(*given)`; an error in the generator passes through."""
        try:
            self.item = await step(*given)
        except StopAsyncIteration:
            self.ended, self.item = True, None

    async def stream(self) -> AsyncGenerator[Any, Any]:
        """Yield the first item and then all others, passing on what is sent and thrown in (PEP 525)."""
        while not self.ended:
            try:
                sent = yield self.item
            except GeneratorExit:
                await self.source.aclose()
                raise
            except BaseException as thrown:  # noqa: BLE001 - the generator decides what an exception means
                await self.advance(self.source.athrow, thrown)
            else:
                await self.advance(self.source.asend, sent)


def start(fn: Callable[..., Generator[Any, Any, Any]], /, *args: Any, **kwargs: Any) -> Started:
    """Call a generator function and take its first item, so that a failure before it can be retried."""
    return Started(fn(*args, **kwargs))


async def astart(
    fn: Callable[..., AsyncGenerator[Any, Any]], /, *args: Any, **kwargs: Any
) -> AsyncStarted:
    """Call an asynchronous generator function and take its first item."""
    started = AsyncStarted(fn(*args, **kwargs))
    await started.advance(started.source.__anext__)
    return started
