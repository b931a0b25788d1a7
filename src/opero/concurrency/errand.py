# this_file: src/opero/concurrency/errand.py
"""What a map has to ask of a disk or a server, written once for maps that may wait and for those that must not.

The steps of a map are generators: where something may take long they yield an errand. A map in a thread runs it on the
spot, one in an event loop awaits it, and the steps go on with its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Iterable
from typing import Any, Final, Protocol, TypeVar

__all__ = ["Errand", "InThread", "Several", "Steps", "arun_steps", "run_steps"]

T = TypeVar("T")

_AT_ONCE: Final = 32
"""Most questions that an event loop has open at the same time."""


class Errand(Protocol):
    """Something that may take long."""

    def here(self) -> Any:
        """Do it, and wait for it."""
        ...

    async def away(self) -> Any:
        """Do it without holding up the event loop."""
        ...


Steps = Generator[Errand, Any, T]
"""Steps that yield errands, are sent their answers, and return a result."""


class InThread:
    """A function that may block.

    Args:
        work: The function.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work

    def here(self) -> Any:
        """Call it."""
        return self._work()

    async def away(self) -> Any:
        """Call it in another thread."""
        from asyncio import to_thread

        return await to_thread(self._work)


class Several:
    """The same question about several things, each of which has a way to ask that does not block.

    Args:
        ask: Asks about one, and waits.
        aask: Returns a coroutine that does so.
        about: The things, each as a tuple of arguments.
    """

    def __init__(
        self,
        ask: Callable[..., Any],
        aask: Callable[..., Coroutine[Any, Any, Any]],
        about: Iterable[tuple[Any, ...]],
    ) -> None:
        self._ask = ask
        self._aask = aask
        self._about = list(about)

    def here(self) -> list[Any]:
        """Ask one after the other."""
        return [self._ask(*one) for one in self._about]

    async def away(self) -> list[Any]:
        """Ask many at the same time."""
        from asyncio import gather

        answers: list[Any] = []
        for start in range(0, len(self._about), _AT_ONCE):
            part = self._about[start : start + _AT_ONCE]
            answers += await gather(*(self._aask(*one) for one in part))
        return answers


def run_steps(steps: Steps[T]) -> T:
    """Go through steps in a thread that may wait."""
    try:
        errand = next(steps)
        while True:
            errand = steps.send(errand.here())
    except StopIteration as end:
        found: T = end.value
        return found
    finally:
        steps.close()


async def arun_steps(steps: Steps[T]) -> T:
    """Go through steps in an event loop."""
    try:
        errand = next(steps)
        while True:
            errand = steps.send(await errand.away())
    except StopIteration as end:
        found: T = end.value
        return found
    finally:
        steps.close()
