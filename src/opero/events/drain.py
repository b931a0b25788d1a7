# this_file: src/opero/events/drain.py
"""Waiting until asynchronous handlers have dealt with what was sent to them."""

from __future__ import annotations

import atexit
import functools
import threading
from collections.abc import Iterable
from time import monotonic
from typing import TYPE_CHECKING

from opero.errors import OperoUsageError
from opero.events.mailbox import Mailbox, mailboxes, running_loop
from opero.events.spare_loop import spare_loop

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future

__all__ = ["drain", "drain_at_exit", "drain_sync"]

_PATIENCE_AT_EXIT = 5.0


async def drain(boxes: Iterable[Mailbox]) -> None:
    """Wait until the letters that are in these mailboxes now are dealt with."""
    from asyncio import get_running_loop

    loop = get_running_loop()
    for box, number in [(box, box.sent) for box in boxes]:
        while True:
            done: Future[None] = loop.create_future()
            if not box.when_done(number, lambda done=done: _settle(loop, done)):  # type: ignore[misc]  # no default type
                break
            await done


def drain_sync(boxes: Iterable[Mailbox], timeout: float | None = None) -> bool:
    """Wait likewise in a thread without an event loop, `timeout` seconds at most; tell whether all is done.

    Raises:
        OperoUsageError: An event loop runs in this thread: its handlers could not.
    """
    if running_loop() is not None:
        raise OperoUsageError("drain_sync() would block the event loop: write `await bus.drain()`.")
    end = None if timeout is None else monotonic() + timeout
    for box, number in [(box, box.sent) for box in boxes]:
        while box.when_done(number, (done := threading.Event()).set):
            if not done.wait(None if end is None else max(0.0, end - monotonic())):
                return False
    return True


def _settle(loop: AbstractEventLoop, done: Future[None]) -> None:
    try:
        loop.call_soon_threadsafe(_set, done)
    except RuntimeError:
        pass  # nobody waits any more: the loop is closed


def _set(done: Future[None]) -> None:
    if not done.done():
        done.set_result(None)


@functools.cache
def drain_at_exit() -> None:
    """From now on, deliver what waits when the program ends; called again, it does nothing more."""
    atexit.register(_at_exit)


def _at_exit() -> None:
    """Deliver what a program that ends has left waiting, on a loop in this thread where no other one runs any more."""
    waiting = [box for box in mailboxes() if box.waiting]
    if waiting and running_loop() is None:
        import asyncio

        try:
            asyncio.run(asyncio.wait_for(drain(waiting), _PATIENCE_AT_EXIT))
        except TimeoutError:
            pass  # a handler that hangs must not keep the interpreter alive
    spare_loop.stop()
