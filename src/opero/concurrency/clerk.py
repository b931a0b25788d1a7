# this_file: src/opero/concurrency/clerk.py
"""A small thread of a worker process: it reports what is done, and gives back the rest, while the worker is busy.

It is there only where it can be of use. It begins with the first chunk of several items, sleeps while there is none,
blocks all signals, and is not there when the user's code forks.
"""

from __future__ import annotations

import _thread
import os
import signal
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final

from opero.concurrency.rounds import LOOK

if TYPE_CHECKING:
    from opero.concurrency.executors.base import Report
    from opero.concurrency.sheet import Sheet

__all__ = ["Clerk", "clerks"]

_LEAVING: Final = 0.0001
"""Seconds between two looks whether a thread that has ended is gone."""

_begun: set[_thread.LockType] = set()
_present: set[int] = set()


class Clerk:
    """Looks at the sheet that the worker is at.

    Its thread is a bare one, which the user's code does not find among `threading`'s.

    Args:
        tell: Takes what it has to report; called from its thread.
    """

    def __init__(self, tell: Callable[[Report], object]) -> None:
        self._tell = tell
        self._sheet: Sheet | None = None
        self._bell: SimpleQueue[bool] = SimpleQueue()
        self._asleep = False
        self._at_work: _thread.LockType | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self.rest, after_in_parent=self._resume, after_in_child=self.leave
            )

    # --- in the worker's thread -------------------------------------------------------------------

    def watch(self, sheet: Sheet) -> None:
        """Look at a sheet from now on."""
        self._sheet = sheet
        if self._at_work is None:
            self._resume()
        elif self._asleep:
            self._asleep = False
            self._bell.put(True)

    def leave(self) -> None:
        """Look at nothing."""
        self._sheet = None

    def _resume(self) -> None:
        if self._sheet is None or self._at_work is not None:
            return
        self._bell, self._asleep = SimpleQueue(), False
        at_work = _thread.allocate_lock()
        at_work.acquire()
        _begun.add(at_work)
        try:
            _thread.start_new_thread(self._live, (self._bell, at_work))
        except RuntimeError:
            # There is none to be had: the worker reports what it gets to.
            _begun.discard(at_work)
        else:
            self._at_work = at_work

    def rest(self) -> None:
        """End the thread; it begins again when it is needed."""
        at_work = self._at_work
        if at_work is None or _thread.get_native_id() in _present:
            return
        self._bell.put(False)
        with at_work:
            pass
        # The system counts it for a moment longer, and Python complains of forks beside a thread.
        for number in list(_present):
            while os.path.exists(f"/proc/self/task/{number}"):  # noqa: PTH110 - as in `look_around`
                time.sleep(_LEAVING)
        _present.clear()
        _begun.clear()
        if self._at_work is at_work:
            self._at_work = None

    # --- in its own -------------------------------------------------------------------------------

    def _live(self, bell: SimpleQueue[bool], at_work: _thread.LockType) -> None:
        _present.add(_thread.get_native_id())
        try:
            self._serve(bell)
        finally:
            at_work.release()

    def _serve(self, bell: SimpleQueue[bool]) -> None:
        if hasattr(signal, "pthread_sigmask"):
            # They are for the worker's thread: one that ends up here would not end a wait there.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        busy = True
        while True:
            try:
                if not bell.get(timeout=LOOK if busy else None):
                    return
            except Empty:
                pass
            sheet = self._sheet
            try:
                busy = sheet is not None and sheet.look(self._tell)
            except Exception:  # noqa: BLE001 - the worker's own thread meets the same, and says so
                return
            if not busy:
                self._asleep = True
                # A sheet that came in between has rung no bell.
                busy = self._sheet is not sheet


def clerks() -> int:
    """Return how many threads of this process are clerks, which are never in the way of a fork."""
    while len(_present) < len(_begun):
        # The system counts it a moment before it can tell who it is.
        time.sleep(_LEAVING)
    return len(_present)
