# this_file: src/opero/concurrency/executors/futures.py
"""Run items in a user's `concurrent.futures.Executor`: the standard library's, or one that a cluster offers.

A pool of threads runs items as threads of our own do. To all others chunks travel as bytes, so that an executor
need not know how to pickle anything, and a cluster that looks at tasks finds nothing to import but `run_chunk`.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    InvalidStateError,
    ThreadPoolExecutor,
)
from contextvars import Context
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from opero.caching.single_flight import Flight, become_leader, stop_leading
from opero.concurrency.executors.base import Chunk, Done, Lost, MapJob, Report
from opero.concurrency.executors.encoding import (
    decode_done,
    decode_value,
    encode_chunk,
    encode_done,
    encode_value,
)
from opero.concurrency.executors.in_process import ThreadExecutor
from opero.concurrency.executors.pickling import JobSpec
from opero.concurrency.item_runner import ItemRunner
from opero.core.deadline import deadline, remaining
from opero.errors import MapError, OperoError, OperoUsageError, warn_user
from opero.events import event_bus
from opero.limits.shared import registry, unshared_objects
from opero.utils import ambient
from opero.utils.steps import BlockingStep, run_async, run_sync

if TYPE_CHECKING:
    from opero.concurrency.executors.base import ItemOutcome, MapExecutor, Parked
    from opero.concurrency.executors.in_process import SharedChunk
    from opero.concurrency.item_runner import Result
    from opero.events import Event
    from opero.utils.steps import StepLogic


PROTOCOL: Final = 11
"""Version of the bytes that `run_chunk` takes and returns: map and worker must agree on it."""

_KEPT: Final = 8
"""Jobs that a worker remembers."""
WORKERS: Final = 4
"""Workers of an executor that does not say how many it has."""
_SLOW: Final = 5
"""A chunk that takes so many times its target gives back what has not started."""


def executor_for(given: Any, workers: int | None, context: Context) -> MapExecutor:
    """Return what runs a map in the executor that a user has named.

    Args:
        given: A `concurrent.futures.Executor`, a function that makes one, or a pool of pathos or twat-mp.
        workers: Chunks that it runs at the same time; None for what the executor says.
        context: Context of which each item in a thread gets a copy.
    """
    pool = _Pool(given)
    executor = pool.executor
    if workers is None:
        found = getattr(executor, "_max_workers", None)
        workers = found if isinstance(found, int) else WORKERS
    threads = isinstance(executor, ThreadPoolExecutor) and not _has_interpreters(executor)
    if threads or (isinstance(executor, _PathosExecutor) and executor.threads):
        return ThreadPoolMapExecutor(pool, workers, context)
    return FuturesExecutor(pool, workers)


def _has_interpreters(executor: Executor) -> bool:
    """Return whether each worker has an interpreter of its own, which live objects cannot enter."""
    module: Any = sys.modules.get("concurrent.futures.interpreter")
    kind = getattr(module, "InterpreterPoolExecutor", None)
    return kind is not None and isinstance(executor, kind)


def _broken(error: BaseException) -> MapError:
    return MapError(f"the executor takes no more items ({type(error).__name__}: {error})")


class _Pool:
    """The executor of a map: the user's own, or one that is made for the map and ends with it.

    Args:
        given: What the user has named.

    Attributes:
        executor: What takes tasks.
        renews: Whether there can be another one when it has broken.

    Raises:
        OperoUsageError: What a factory has made is no executor.
    """

    def __init__(self, given: Any) -> None:
        self._given = given
        self._begin()

    def _begin(self) -> None:
        given = self._given
        self._ends = self.renews = not hasattr(given, "submit") and callable(given)
        self._made: Any = given() if self.renews else given
        made = self._made
        if hasattr(made, "pool_class"):  # a block of twat-mp's
            if made.pool is None:
                made.__enter__()
                self._ends = True
            made = made.pool
        if hasattr(made, "apipe"):
            made = _PathosExecutor(made)
            self.renews = True
        if not hasattr(made, "submit"):
            raise OperoUsageError(
                f"executor={self._given!r} has made {made!r}, which is no executor."
            )
        self.executor: Any = made

    def renew(self) -> None:
        """Replace an executor that has broken."""
        if self._ends:
            self.end(graceful=False)
            self._begin()
        else:
            self.executor.restart()

    def end(self, *, graceful: bool, timeout: float = 5) -> None:
        """End the executor if it was made for the map; one that takes longer is left behind."""
        if self._ends:
            thread = threading.Thread(target=self._shut_down, args=(graceful,), daemon=True)
            # None begins any more when the interpreter ends.
            with contextlib.suppress(RuntimeError):
                thread.start()
                thread.join(timeout)

    def _shut_down(self, wait: bool) -> None:
        self.executor.shutdown(wait=wait)
        if hasattr(self._made, "pool_class"):
            self._made.__exit__(None, None, None)


class _PathosExecutor:
    """A pool of pathos, such as twat-mp makes them, with the methods of an executor that a map needs.

    Its processes are replaced when they die, but what they were at is never reported, and a pool that waits for that
    never ends.

    Args:
        pool: The pool.

    Attributes:
        threads: Whether its workers are threads.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._max_workers: int = pool.nodes
        self._flying: set[Future[Any]] = set()
        self._workers = self._running()
        self.threads: bool = any(isinstance(worker, threading.Thread) for worker in self._workers)

    def _running(self) -> set[Any]:
        """Return its workers; those that have died are taken out of this list ten times a second."""
        return set(self._pool._serve()._pool)  # noqa: SLF001 - there is no public way

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        """Let a worker call a function."""
        future: Future[Any] = Future()
        self._flying.add(future)
        future.add_done_callback(self._flying.discard)

        def end(settle: Callable[[Any], object], outcome: Any) -> None:
            with contextlib.suppress(InvalidStateError):  # given up meanwhile
                settle(outcome)

        ends = [functools.partial(end, f) for f in (future.set_result, future.set_exception)]
        self._pool._serve().apply_async(fn, args, {}, *ends)  # noqa: SLF001 - `apipe` takes no callbacks
        return future

    def check(self) -> None:
        """Give up what is under way if a process has died: which task was in it is not known."""
        running = self._running()
        if not self.threads and self._workers - running:
            for future in list(self._flying):
                with contextlib.suppress(InvalidStateError):
                    future.set_exception(BrokenExecutor("a process of the pool has died"))
        self._workers = running

    def restart(self) -> None:
        """End all processes; the pool begins others at its next use."""
        self.shutdown(wait=False)
        self._workers = self._running()

    def shutdown(self, *, wait: bool) -> None:
        """End the pool."""
        (self._pool.close if wait else self._pool.terminate)()
        self._pool.join()
        self._pool.clear()


class ThreadPoolMapExecutor(ThreadExecutor):
    """Items in the threads of a user's pool; each is given back when it has nothing to do.

    Args:
        pool: The pool.
        workers: Threads to use at once.
        context: Context of which each item gets a copy.
    """

    def __init__(self, pool: _Pool, workers: int, context: Context) -> None:
        super().__init__(workers, context)
        self._pool = pool
        self._take = self._take_now
        self._serving: set[Future[None]] = set()
        self._error: BaseException | None = None

    def poll(self, timeout: float | None) -> list[Report]:
        """Return what the threads have reported; at a deadline, what none of them has taken.

        Raises:
            MapError: The executor has dropped what it had taken.
        """
        left = None if self._context is None else self._context.run(remaining)
        if left == 0 and not self._waiting.empty():
            # Their calls are refused.
            self._serve()
        reports = super().poll(_sooner(timeout, left or None))
        if self._error is not None:
            raise _broken(self._error) from self._error
        return reports

    def _start_workers(self) -> None:
        """Ask for threads while there are chunks that none has taken."""
        while len(self._serving) < self.workers and not self._waiting.empty():
            try:
                future = self._pool.executor.submit(self._serve)
            except Exception as error:
                raise _broken(error) from error
            # Noted first: one that has ended already calls back at once.
            self._serving.add(future)
            future.add_done_callback(self._ended)

    def _ended(self, future: Future[None]) -> None:
        self._serving.discard(future)
        error = CancelledError() if future.cancelled() else future.exception()
        if error is not None and not self._stopped:
            self._error = error
        # A chunk may have come just before the thread was given back.
        self.wake()

    def _take_now(self) -> SharedChunk | None:
        """Return a chunk without waiting; None gives the thread back."""
        try:
            return self._waiting.get_nowait()
        except Empty:
            return None

    def close(self, *, graceful: bool, timeout: float) -> None:
        """Take back what has not started; an executor of the user's own lives on."""
        super().close(graceful=graceful, timeout=timeout)
        for future in list(self._serving):
            _cancel(future)
        self._pool.end(graceful=graceful, timeout=timeout)


def _sooner(*limits: float | None) -> float | None:
    """Return the shortest time of some; None for no limit."""
    return min((seconds for seconds in limits if seconds is not None), default=None)


def _cancel(future: Future[Any]) -> None:
    # Not every executor's futures can be cancelled, and some refuse with an error of their own.
    with contextlib.suppress(Exception):
        future.cancel()


# --- foreign workers ------------------------------------------------------------------------------


_CHECK: Final = 0.1
"""Seconds between two checks of the processes of a pool that does not report their death."""
_LATE: Final = 0.5
"""Seconds after a deadline in which workers may report what they have done; then it is given up."""


class FuturesExecutor:
    """Chunks as bytes in the workers of a user's executor, through `run_chunk`.

    Args:
        pool: The executor.
        workers: Chunks that it runs at the same time.
    """

    def __init__(self, pool: _Pool, workers: int) -> None:
        self._pool = pool
        self.slots: int = 2 * workers
        self._waiting: deque[Chunk] = deque()
        self._flying: dict[int, tuple[Future[Any], range]] = {}
        self._suspect = False
        self._deadline: float | None = None
        self._ended: SimpleQueue[int | None] = SimpleQueue()

    def open(self, job: MapJob) -> None:
        """Pickle the job.

        Raises:
            ShippingError: It cannot be pickled.
        """
        self._deadline = job.deadline
        self._number = uuid.uuid4().hex
        self._blob = JobSpec.of(job).pickled()

    def submit(self, chunk: Chunk) -> None:
        """Submit a chunk to the executor, at once or when it may.

        Raises:
            MapError: It takes none any more.
        """
        self._waiting.append(chunk)
        self._dispatch()

    def _dispatch(self) -> None:
        """Submit what waits; a chunk that may have broken the last executor is alone in the next one."""
        while self._waiting and self._left(_LATE) != 0:
            suspect = self._pool.renews and self._waiting[0].attempt > 0
            if self._flying and (suspect or self._suspect):
                return
            self._suspect = suspect
            self._send(self._waiting.popleft())

    def _send(self, chunk: Chunk) -> None:
        payload = pickle.dumps((*encode_chunk(chunk), self._left()), 5)
        try:
            submit = self._pool.executor.submit
            future = submit(run_chunk, PROTOCOL, self._number, self._blob, payload)
        except Exception as error:
            if not (self._pool.renews and isinstance(error, BrokenExecutor) and self._flying):
                raise _broken(error) from error
            # What it has under way will be reported as lost, this chunk with it.
            future = Future()
            future.set_exception(error)
        self._flying[chunk.id] = future, range(len(chunk.items))
        future.add_done_callback(lambda _: self._ended.put(chunk.id))

    def poll(self, timeout: float | None) -> list[Report]:
        """Return what was reported.

        Raises:
            MapError: The executor is broken, and there is no other.
        """
        reports: list[Report] = []
        left = self._left(_LATE) if self._flying or self._waiting else None
        timeout = _sooner(timeout, left)
        if isinstance(self._pool.executor, _PathosExecutor):
            self._pool.executor.check()
            timeout = _sooner(timeout, _CHECK)
        with contextlib.suppress(Empty):
            ended = self._ended.get_nowait() if timeout == 0 else self._ended.get(timeout=timeout)
            while ended is not None:
                reports += self._reports(ended)
                ended = self._ended.get_nowait()
        if left == 0:
            late = [(number, n) for number, places in self._take_back().items() for n in places]
            return reports + [Lost(number, (n,), n, "deadline") for number, n in late]
        self._dispatch()
        return reports

    def _left(self, late: float = 0) -> float | None:
        """Return the seconds until so many after the deadline, None without one."""
        end = self._deadline
        return None if end is None else max(0.0, end + late - ambient.clock().monotonic())

    def _reports(self, number: int) -> list[Report]:
        if number not in self._flying:
            return []
        future, places = self._flying[number]
        error = CancelledError() if future.cancelled() else future.exception()
        if isinstance(error, BrokenExecutor):
            return self._replace(error)
        del self._flying[number]
        if error is not None:
            # What the function raises comes back as outcomes: this is the executor's own failure.
            said = "" if future.cancelled() else repr(error)
            return [Lost(number, places, None, "crash", said=said)]
        return _open_reports(number, places, future.result())

    def _replace(self, error: BrokenExecutor) -> list[Report]:
        """Go on with another executor; return what became of all that the broken one had."""
        if not self._pool.renews:
            raise _broken(error) from error
        flying, self._flying = self._flying, {}
        self._pool.renew()
        reports: list[Report] = []
        alone = len(flying) == 1
        for number, (future, places) in flying.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                reports += _open_reports(number, places, future.result())
            else:
                lost = Lost(number, places, None, "crash", said=repr(error), only_chunk=alone)
                reports.append(lost)
        return reports

    def halt(self) -> None:
        """Do nothing: a worker that cannot be reached begins what it has, and gives back what follows an error."""

    def wake(self) -> None:
        """End a wait for reports."""
        self._ended.put(None)

    def close(self, *, graceful: bool, timeout: float) -> None:
        """Take back what has not started; an executor of the user's own lives on."""
        self._take_back()
        # After a deadline, nobody waits for calls that were given up.
        self._pool.end(graceful=graceful and self._left() != 0, timeout=timeout)

    def _take_back(self) -> dict[int, range]:
        """Return the chunks that are not reported, with their positions; the executor need not begin them."""
        found = {chunk.id: range(len(chunk.items)) for chunk in self._waiting}
        for number, (future, places) in self._flying.items():
            _cancel(future)
            found[number] = places
        self._waiting.clear()
        self._flying.clear()
        return found


_reported_limits: Final[set[str]] = set()
"""How the limits describe themselves that a worker could not share, as far as a warning has said so."""


def _open_reports(chunk: int, places: range, data: bytes) -> list[Report]:
    body, unshared = pickle.loads(data)  # noqa: S301 - from our own `run_chunk`
    for limit in unshared:
        if limit not in _reported_limits:
            _reported_limits.add(limit)
            warn_user(
                f"{limit} is not shared with all workers of the executor: those on another host limit by themselves. "
                "Use workers of this host, or a limit that a server keeps.",
                RuntimeWarning,
            )
    done = decode_done(chunk, body)
    given_back = places[len(done.values) :]
    return [done, Lost(chunk, given_back, None, "slow")] if given_back else [done]


# --- in a foreign worker --------------------------------------------------------------------------


class _RemoteJob:
    """A job in this process: its pipeline, and the events that the map does not know yet."""

    def __init__(self, _number: str, blob: bytes) -> None:
        self._events: list[Event] = []
        spec = JobSpec.open(blob)
        self._job: MapJob = spec.job(None, self._events.append)
        # In the map's own interpreter its listeners get every event already.
        self._foreign = spec.interpreter != registry.uid
        self._relays = spec.listens == "bus" and self._foreign
        self._runner = ItemRunner(self._job)
        # A worker may have several threads.
        self._lock = threading.Lock()

    def run(self, payload: bytes) -> bytes:
        """Run a chunk; return its results, pickled: none of the last items where it takes long."""
        entries, encoded, left = pickle.loads(payload)  # noqa: S301 - from the map
        parked = pickle.loads(encoded) if encoded else {}  # noqa: S301 - as above
        with contextlib.ExitStack() as stack:
            if left is not None:
                stack.enter_context(deadline(left))
            if self._relays:
                stack.callback(event_bus.subscribe(self._events.append).cancel)
            if self._job.leads:
                become_leader(marker := Flight(None))
                stack.callback(stop_leading, marker)
            if not self._job.pipeline.awaits:
                return run_sync(self._work(entries, parked))
            from opero.utils.async_utils import run_async as run_in_thread

            return run_in_thread(run_async(self._work(entries, parked)))

    def _work(self, entries: Sequence[Any], parked: dict[int, Parked]) -> StepLogic[bytes]:
        run, began = self._runner, perf_counter()
        values: list[Any] = []
        odd: dict[int, ItemOutcome] = {}
        result: Result
        for position, entry in enumerate(entries):
            if position and perf_counter() > began + _SLOW * self._job.target_s:
                break
            item, failed = decode_value(entry, "item")
            result = None, failed
            if failed is None:
                result = yield BlockingStep(run.run, run.run_async, (item, parked.get(position)))
            value, outcome = result
            if outcome is None:
                values.append(encode_value(value, "result", None))
            else:
                values.append(encode_value(outcome.value, "result", None))
                outcome.value, odd[position] = None, outcome
                if self._job.ends(outcome):
                    break
        done = Done(0, range(len(values)), values, odd, perf_counter() - began)
        with self._lock:
            counted = self._job.pipeline.stats.take()
            events, self._events[:] = self._events[:], []
        unshared = unshared_objects() if self._foreign else []
        return pickle.dumps((encode_done(done, counted, events), unshared), 5)


_remembered = functools.lru_cache(_KEPT)(_RemoteJob)
_lock = threading.Lock()


def run_chunk(protocol: int, number: str, blob: bytes, payload: bytes) -> bytes:
    """Run a chunk of a job in a foreign worker.

    Args:
        protocol: The version that the map uses.
        number: The job's own name, under which it is remembered here.
        blob: The job, pickled.
        payload: Items, pickled.

    Raises:
        OperoError: The map is of another version of opero.
    """
    if protocol != PROTOCOL:
        raise OperoError(
            f"the map speaks protocol {protocol} and this worker {PROTOCOL}: install the same version of opero"
        )
    with _lock:  # two threads would make it twice
        job = _remembered(number, blob)
    return job.run(payload)
