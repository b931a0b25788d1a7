# this_file: src/opero/utils/threads.py
"""Block a thread until another one goes on, and run calls that may have to be abandoned in threads of their own.

The threads of calls are reused when idle, never exhausted, and never keep the interpreter from exiting.
"""

from __future__ import annotations

import contextvars
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from opero.utils.fork import run_after_fork

if TYPE_CHECKING:
    from queue import SimpleQueue

_CHECK_SECONDS: Final = 1.0
"""A waiting thread wakes so often, so that Ctrl-C reaches it on every platform."""
_IDLE_SECONDS: Final = 10.0
"""How long an idle thread waits for another call before it ends."""


def locked() -> threading.Lock:
    """Return a lock that is held, for `wait_for_release`."""
    lock = threading.Lock()
    lock.acquire()
    return lock


def wait_for_release(lock: threading.Lock, seconds: float | None) -> bool:
    """Block until another thread releases a lock; False if the time was up first."""
    if seconds is None:
        while not lock.acquire(timeout=_CHECK_SECONDS):
            pass
        return True
    end = time.monotonic() + seconds
    while not lock.acquire(timeout=min(_CHECK_SECONDS, max(0.0, seconds))):
        seconds = end - time.monotonic()
        if seconds <= 0:
            return False
    return True


class ThreadCall:
    """A call in another thread, and its outcome.

    Args:
        work: What to run, in a copy of the caller's context.

    Attributes:
        thread: The thread that runs it, None before it begins.
    """

    __slots__ = (
        "_abandoned", "_asker", "_callback", "_context", "_done", "_error", "_lock", "_over", "_value", "_work",
        "thread",
    )  # fmt: skip

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work: Callable[[], Any] | None = work
        self._context: contextvars.Context | None = contextvars.copy_context()
        self._context.run(_calls.set, (*_calls.get(), self))
        self._asker = threading.get_ident()
        self._lock = threading.Lock()
        self._over = locked()
        self._callback: Callable[[], object] | None = None
        self._value: Any = None
        self._error: BaseException | None = None
        self._done = self._abandoned = False
        self.thread: int | None = None

    def run(self) -> None:
        """Do the work; whatever it raises is kept for the caller."""
        work, self._work = self._work, None
        context, self._context = self._context, None
        self.thread = threading.get_ident()
        try:
            if work is not None and context is not None:
                self._value = context.run(work)
        except BaseException as error:  # noqa: BLE001 - it is raised where the call was made
            self._error = error
        finally:
            # This frame lives on in the error's traceback.
            del work, context

    def finish(self) -> None:
        """Wake the caller that waits for the outcome."""
        with self._lock:
            self._done, callback, self._callback = True, self._callback, None
            if self._abandoned:
                self._value = self._error = None
        self._over.release()
        if callback is not None:
            callback()

    def wait(self, seconds: float | None) -> bool:
        """Wait for the end, once; return whether it came in time.

        If it did not, or the wait was interrupted, the call is abandoned.
        """
        in_time = False
        try:
            in_time = wait_for_release(self._over, seconds)
        finally:
            if not in_time:
                self.abandon()
        return in_time

    def abandon(self) -> None:
        """Throw the outcome away, now or when it comes."""
        # An error that is never raised would hold its traceback, and that this object: a cycle.
        with self._lock:
            self._abandoned = True
            self._value = self._error = None

    def then(self, callback: Callable[[], object]) -> None:
        """Call `callback` when the work is over, at once if it is."""
        with self._lock:
            done = self._done
            if not done:
                self._callback = callback
        if done:
            callback()

    def outcome(self) -> Any:
        """Return the value or raise the error, once; neither is kept."""
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                # A frame that names an error which passes through it is a reference cycle.
                del error
        value, self._value = self._value, None
        return value


_idle: Final[list[SimpleQueue[ThreadCall]]] = []
"""What idle threads wait at, each for its next call. Changed by single steps of C only, which need no lock."""


def _serve(calls: SimpleQueue[ThreadCall]) -> None:
    """Run calls in this thread until none has come for a while."""
    from queue import Empty

    process = os.getpid()
    while True:
        try:
            call = calls.get(timeout=_IDLE_SECONDS)
        except Empty:
            try:
                _idle.remove(calls)
            except ValueError:
                call = calls.get()  # on its way already
            else:
                return
        call.run()
        if os.getpid() != process:
            # The call has forked, and this is the child: nobody here waits for the outcome.
            return
        # Idle before the caller knows: its next call then finds this thread.
        _idle.append(calls)
        call.finish()
        del call


_calls: contextvars.ContextVar[tuple[ThreadCall, ...]] = contextvars.ContextVar(
    "opero_thread_calls", default=()
)


def waiting_threads() -> list[int]:
    """Return the threads that wait for what this one does as a `ThreadCall`."""
    return [call._asker for call in _calls.get() if not call._abandoned]  # noqa: SLF001 - one thing with this module


def run_in_thread(call: ThreadCall) -> None:
    """Start a call in an idle thread, or in a new one if all are busy.

    So calls that hang for ever never hold up the next one.

    Raises:
        RuntimeError: The system has no more threads.
    """
    try:
        calls = _idle.pop()
    except IndexError:
        # Loaded with the first thread.
        from queue import SimpleQueue

        calls = SimpleQueue()
        # Daemons: a call that hangs for ever must not keep the interpreter alive.
        threading.Thread(target=_serve, args=(calls,), name="opero-call", daemon=True).start()
    calls.put(call)


# The threads of the parent do not exist in the child.
run_after_fork(_idle.clear)
