# this_file: src/opero/events/spare_loop.py
"""The event loop for asynchronous handlers of programs, or threads, that have none."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

__all__ = ["SpareLoop", "spare_loop"]


class SpareLoop:
    """An event loop in a thread of its own, started when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def get(self) -> AbstractEventLoop:
        """Return the loop; it is running."""
        with self._lock:
            if self._loop is None or self._thread is None or not self._thread.is_alive():
                self._loop, self._thread = _started()
            return self._loop

    def stop(self, patience: float = 1.0) -> None:
        """End the loop and wait for its thread, so many seconds at most; a later `get` starts another."""
        with self._lock:
            loop, thread, self._loop = self._loop, self._thread, None
        if loop is not None and thread is not None and thread.is_alive():
            loop.call_soon_threadsafe(loop.stop)
            thread.join(patience)

    def forget(self) -> None:
        """Let go of the loop: after a fork it is the parent's."""
        self._lock = threading.Lock()
        self._loop = self._thread = None

    def __repr__(self) -> str:
        return f"<SpareLoop {'not started' if self._loop is None else 'running'}>"


def _started() -> tuple[AbstractEventLoop, threading.Thread]:
    import asyncio

    loop = asyncio.new_event_loop()
    ready = threading.Event()
    loop.call_soon(ready.set)
    # A daemon, so that a handler which never ends does not keep the interpreter alive.
    thread = threading.Thread(target=_run, args=(loop,), name="opero-event-handlers", daemon=True)
    thread.start()
    ready.wait()
    return loop, thread


def _run(loop: AbstractEventLoop) -> None:
    import asyncio

    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks, timeout=0.5))
    finally:
        loop.close()


spare_loop: Final = SpareLoop()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=spare_loop.forget)
