# this_file: src/opero/concurrency/steps.py
"""Write blocking work of a map once, for maps that may block and for maps on an event loop.

The steps of a map are generators: where something may take long, they yield a blocking step. A map in a thread runs it
at once, one in an event loop awaits it, and the generator is sent its result.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Iterable
from typing import Any, Final, Protocol, TypeVar

__all__ = ["BlockingCall", "BlockingCalls", "BlockingStep", "Steps", "run_steps", "run_steps_async"]

T = TypeVar("T")

_AT_ONCE: Final = 32
"""Most calls that an event loop has open at the same time."""


class BlockingStep(Protocol):
    """Something that may take long."""

    def run_sync(self) -> Any:
        """Do it, and wait for it."""
        ...

    async def run_async(self) -> Any:
        """Do it without blocking the event loop."""
        ...


Steps = Generator[BlockingStep, Any, T]
"""A generator that yields blocking steps, is sent their results, and returns a result of its own."""


class BlockingCall:
    """A function that may block.

    Args:
        work: The function.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work

    def run_sync(self) -> Any:
        """Call it."""
        return self._work()

    async def run_async(self) -> Any:
        """Call it in another thread."""
        from asyncio import to_thread

        return await to_thread(self._work)


class BlockingCalls:
    """Calls of a function that exists in a blocking and in an awaitable form.

    Args:
        call: The blocking form.
        acall: The form that returns a coroutine.
        arguments: The arguments of each call.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        acall: Callable[..., Coroutine[Any, Any, Any]],
        arguments: Iterable[tuple[Any, ...]],
    ) -> None:
        self._call = call
        self._acall = acall
        self._arguments = list(arguments)

    def run_sync(self) -> list[Any]:
        """Call one after the other."""
        return [self._call(*one) for one in self._arguments]

    async def run_async(self) -> list[Any]:
        """Call many at the same time."""
        from asyncio import gather

        results: list[Any] = []
        for start in range(0, len(self._arguments), _AT_ONCE):
            part = self._arguments[start : start + _AT_ONCE]
            results += await gather(*(self._acall(*one) for one in part))
        return results


def run_steps(steps: Steps[T]) -> T:
    """Run steps in a thread that may block."""
    try:
        step = next(steps)
        while True:
            step = steps.send(step.run_sync())
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        steps.close()


async def run_steps_async(steps: Steps[T]) -> T:
    """Run steps in an event loop."""
    try:
        step = next(steps)
        while True:
            step = steps.send(await step.run_async())
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        steps.close()
