# this_file: src/opero/utils/threads.py
"""Threads for calls that may have to be left behind.

They are reused when idle, never exhausted, and never in the way of exit.
"""

from __future__ import annotations

import contextvars
import os
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from opero.utils.waiters import ThreadGate

__all__ = ["Job", "job_in", "run_in_thread"]

_IDLE_SECONDS = 10.0
"""How long an idle thread waits for another job before it ends."""


class Job:
    """A call in another thread.

    Args:
        work: What to run, in a copy of the caller's context.
    """

    __slots__ = (
        "_abandoned", "_asker", "_context", "_error", "_gate", "_lock", "_over", "_then", "_value",
        "_work",
    )  # fmt: skip

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work: Callable[[], Any] | None = work
        self._context: contextvars.Context | None = contextvars.copy_context()
        self._asker = threading.get_ident()
        self._gate = ThreadGate()
        self._lock = threading.Lock()
        self._then: Callable[[], object] | None = None
        self._value: Any = None
        self._error: BaseException | None = None
        self._over = self._abandoned = False

    def run(self) -> None:
        """Do the work; whatever it raises is kept for the caller."""
        work, self._work = self._work, None
        context, self._context = self._context, None
        try:
            if work is not None and context is not None:
                self._value = context.run(work)
        except BaseException as error:  # noqa: BLE001 - it is raised where the call was made
            self._error = error
        finally:
            # This frame lives on in the error's traceback.
            del work, context

    def finish(self) -> None:
        """Tell whoever waits for it that the work is over."""
        with self._lock:
            self._over, then, self._then = True, self._then, None
            if self._abandoned:
                self._value = self._error = None
        self._gate.open()
        if then is not None:
            then()

    def wait(self, seconds: float | None) -> bool:
        """Wait for the end, once; tell whether it came in time.

        If it did not, or the wait was interrupted, nobody will ask for the outcome any more.
        """
        came = False
        try:
            came = self._gate.wait(seconds)
        finally:
            if not came:
                self.abandon()
        return came

    def abandon(self) -> None:
        """Throw the outcome away, now or when it comes."""
        # An error that nobody takes would hold its traceback, and that this job: a cycle.
        with self._lock:
            self._abandoned = True
            self._value = self._error = None

    def then(self, callback: Callable[[], object]) -> None:
        """Call `callback` when the work is over, at once if it is."""
        with self._lock:
            over = self._over
            if not over:
                self._then = callback
        if over:
            callback()

    def calls_then(self, callback: Callable[[], object]) -> bool:
        """Tell whether `callback` is what will be called when the work is over."""
        return self._then == callback

    def asker(self) -> FrameType | None:
        """Return where the thread that waits for the outcome stands; None if nobody does any more."""
        return None if self._abandoned else sys._current_frames().get(self._asker)  # noqa: SLF001 - there is no other way

    def outcome(self) -> Any:
        """Return the value or raise the error, once; the job keeps neither."""
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                # A frame that names an error which passes through it is a reference cycle.
                del error
        value, self._value = self._value, None
        return value


def job_in(frame: FrameType) -> Job | None:
    """Return the job that a frame runs, None if it runs none: what is around it is in another thread."""
    return frame.f_locals["self"] if frame.f_code is Job.run.__code__ else None


class _Spare:
    """One thread and the hatch through which it gets its next job."""

    __slots__ = ("_hatch", "_job")

    def __init__(self) -> None:
        self._hatch = threading.Lock()
        self._hatch.acquire()
        self._job: Job | None = None

    def give(self, job: Job) -> None:
        self._job = job
        self._hatch.release()

    def serve(self) -> None:
        while True:
            if not self._hatch.acquire(timeout=_IDLE_SECONDS):
                if self._retired():
                    return
                # A job is on its way already.
                self._hatch.acquire()
            job, self._job = self._job, None
            if job is not None:
                job.run()
                # Idle before the caller knows: its next call then finds this thread.
                _idle.append(self)
                job.finish()
                del job

    def _retired(self) -> bool:
        """Leave the idle ones; False if somebody has called this one meanwhile."""
        try:
            _idle.remove(self)
        except ValueError:
            return False
        return True


_idle: list[_Spare] = []
"""Changed by single steps of C only, which need no lock."""


def run_in_thread(job: Job) -> None:
    """Start a job in an idle spare thread, or in a new one if all are busy.

    So calls that hang for ever never stop the next one.

    Raises:
        RuntimeError: The system has no more threads.
    """
    try:
        spare = _idle.pop()
    except IndexError:
        spare = _Spare()
        # Daemons: a call that hangs for ever must not keep the interpreter alive.
        threading.Thread(target=spare.serve, name="opero-call", daemon=True).start()
    spare.give(job)


if hasattr(os, "register_at_fork"):
    # The threads of the parent do not exist in the child.
    os.register_at_fork(after_in_child=_idle.clear)
