# this_file: src/opero/concurrency/mapper.py
"""Build the functions that users call to map: from a function's options and some items to a run."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from contextvars import Context, copy_context
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from opero.concurrency.executors.base import MapJob, recording
from opero.concurrency.item_runner import judge_lost
from opero.core.deadline import current_deadline
from opero.core.decorate import build_function, decorate, explain, place_in_class, with_changes
from opero.core.options import Options
from opero.core.pipeline import Pipeline
from opero.errors import OperoUsageError
from opero.utils import ambient
from opero.utils.ambient import switch
from opero.utils.units import parse_seconds, parse_size

if TYPE_CHECKING:
    from opero.concurrency.checkpoint import OpenCheckpoint
    from opero.concurrency.executors.base import ItemRecorder
    from opero.concurrency.loop import MapRun, Returns
    from opero.concurrency.scheduler import Scheduler
    from opero.core.decorated import Explanation
    from opero.core.options import MapOptions


Mode = Literal["sequential", "thread", "async", "process", "async_process", "executor"]

IN_FLIGHT: Final = 32
"""Coroutines that each worker process of `mode="async_process"` has under way at once."""

_TARGETS: Final[dict[Mode, float]] = {
    "sequential": 0.0,
    "thread": 0.002,
    "async": 0.001,
    "process": 0.03,
    "async_process": 0.1,
    "executor": 0.05,
}
"""Seconds of work in a chunk, by mode: so long that handing it over costs next to nothing."""

_OF_PROCESSES: Final = ("worker_init", "max_tasks_per_worker", "memory_limit", "start_method")
_FORKS: Final = hasattr(os, "fork")
"""Whether worker processes can be forked, from this process or from a fresh one."""


class Mapper:
    """Maps one function, by its pipeline's options.

    Args:
        pipeline: The function's pipeline, with the cache.
        relays_all: Whether its listeners also get, from worker processes, the events of functions that it calls.

    Raises:
        OperoUsageError: The function cannot be mapped.
    """

    def __init__(self, pipeline: Pipeline, *, relays_all: bool = False) -> None:
        info = pipeline.info
        if info.kind in ("generator", "async_generator"):
            raise OperoUsageError(
                f"{info.name}() is a generator, and a map wants one result for each item: "
                "return a list, or use @opero."
            )
        self.pipeline = pipeline
        self.options: MapOptions = cast("MapOptions", pipeline.options)
        self.awaits: bool = info.kind == "async"
        self.mode: Mode = choose_mode(self.options, awaits=self.awaits)
        _check_mode(self.options, self.mode, info.name)
        options = self.options
        self._open_checkpoint: OpenCheckpoint | None = None
        if options.checkpoint is not None:
            from opero.concurrency.checkpoint import checkpoints_of

            self._open_checkpoint = checkpoints_of(info, options)
        # The pipeline beside the function: no cache, and nothing of the map's.
        names = {name for name in Options.declared if not name.startswith("cache")}
        kept = {name: getattr(options, name) for name in options.given & names}
        bare = Options.of("operomap", cache=False, **kept)
        self._worker = Pipeline(info, bare, origin=pipeline, changed=frozenset({"cache"}))
        limit, timeout = options.memory_limit, options.timeout
        self._job = partial(
            MapJob,
            function=info.fn,
            pipeline=self._worker,
            item_timeout=None if timeout is None else parse_seconds(timeout, "timeout"),
            details=options.cache_if is not None and self._worker.fallback is not None,
            worker_init=options.worker_init,
            memory_limit=None if limit is None else parse_size(limit, "memory_limit"),
            max_tasks_per_worker=options.max_tasks_per_worker,
            relays_all=relays_all,
            stopped=None if options.stop_token is None else options.stop_token.is_set,
        )

    def describe(self) -> str:
        """Return one line for `explain()`."""
        options = self.options
        where = _describe_mode(self.mode, options)
        order = "in order" if options.ordered else "as they come"
        bound = "" if options.max_errors is None else f", max_errors={options.max_errors:g}"
        return f"{where}, {order}, on_error={options.on_error}{bound}"

    # --- from options to a run -----------------------------------------------------------------------

    def check(self, items: Any) -> None:
        """Refuse what is no input.

        Raises:
            OperoUsageError: A text, something that is not iterable, or an asynchronous iterator for a synchronous map.
        """
        name, kind = self.pipeline.info.name, type(items).__name__
        if isinstance(items, str | bytes | bytearray):
            raise OperoUsageError(
                f"{name}() maps over items, and a {kind} would be taken apart: write {name}([…]) for "
                f"a single one, {name}.one(…) for a single call, list(…) if its parts are meant."
            )
        if hasattr(items, "__aiter__"):
            if not self.awaits:
                raise OperoUsageError(
                    f"{name}() is synchronous and cannot wait for an asynchronous iterator: "
                    "make it an `async def`, or collect the items first."
                )
        elif not hasattr(items, "__iter__") and not hasattr(items, "__getitem__"):
            raise OperoUsageError(
                f"{name}() maps over items, and {kind} is not iterable: write "
                f"{name}([…]), or {name}.one(…) for a single call."
            )

    def begin(
        self,
        items: Any,
        returns: Returns = "list",
        *,
        before: tuple[Any, ...] = (),
        after: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        on_loop: bool = False,
    ) -> MapRun:
        """Begin a run of the map.

        Args:
            items: The input.
            returns: What the caller gets.
            before: The instance or class of a method.
            after: Further positional arguments, the same for all items.
            kwargs: The same by keyword.
            on_loop: Whether it runs on an event loop, as a synchronous function may too.
        """
        self.check(items)
        options, context, cache = self.options, copy_context(), self.pipeline.cache
        collects = returns != "stream"
        mode, enter = self.mode, None
        recorders: tuple[ItemRecorder, ...] = ()
        if (make := recording.get()) is not None:
            recorder = make(self.pipeline.info.qualname)
            if recorder is not None:
                recorders, enter = (recorder,), recorder.enter
                mode = choose_mode(options, awaits=self.awaits, recorded=True)
        if mode in ("process", "async_process"):
            from opero.concurrency.executors.process.start import begin_early

            begin_early(options.start_method)
        # Loaded with the first map, while its fork server begins.
        from opero.concurrency.loop import MapRun
        from opero.concurrency.report import Progress, make_bar
        from opero.concurrency.scheduler import ChunkSize, ErrorPolicy, Scheduler

        # A call with a deadline of its own, and one that is being debugged, sleeps where it is.
        stays = options.deadline is not None or mode == "sequential"
        ordered = options.ordered and not collects
        raises = returns != "report" and options.on_error == "raise"
        # An ordered stream first hands out what comes before the item whose error it raises.
        ends_on = (BaseException,) if raises and not ordered else options.stop_on
        if cache is not None and cache.freshness is not None:
            ends_on = ()  # an expired result may take the place of an error
        job = self._job(
            before=before,
            after=after,
            kwargs=kwargs or {},
            target_s=_TARGETS[mode],
            parks=inf if stays else 0.05,
            deadline=current_deadline() if switch.on else None,
            in_flight={"async": options.workers, "async_process": IN_FLIGHT}.get(mode, 1),
            leads=collects and cache is not None and cache.leases is not None,
            ends_on=ends_on,
            enter=enter,
        )
        if self._open_checkpoint is not None:
            recorders = (*recorders, self._open_checkpoint(job))
        scheduler = Scheduler(
            size=ChunkSize(job.target_s, _fixed_size(options, job, mode), job.in_flight),
            ordered=ordered,
            errors=ErrorPolicy(
                raises=raises, max_errors=options.max_errors, stop_on=options.stop_on
            ),
            recover=partial(judge_lost, job),
        )
        executor = _make_executor(mode, options, context, on_loop=on_loop)
        lookup = None
        if cache is not None and not cache.off and not ambient.disabled():
            # Loaded with the first cache.
            from opero.concurrency.lookup import CacheLookup

            lookup = CacheLookup(
                cache,
                job,
                shares=collects,
                compute=scheduler.enqueue,
                wake=executor.wake,
                context=context,
            )
        try:
            total: int | None = len(items)
        except Exception:  # noqa: BLE001 - items without a length are no error
            total = None
        name, wanted = self.pipeline.info.name, options.progress
        bar = None if wanted is False else make_bar(name, total, rich=wanted == "rich")
        progress = Progress(
            self.pipeline.emitter,
            total,
            on_result=options.on_result,
            bar=bar,
            keeps=collects,
            waits_for=partial(self._waits_for, scheduler),
            # A list is never slow. A program that is forked should have no thread more.
            watched=total is None and not _forks(mode, options),
        )
        return MapRun(
            items, job, options, executor, scheduler, progress, recorders, returns, lookup
        )

    def _waits_for(self, scheduler: Scheduler) -> tuple[str, float] | None:
        """Return what all items wait for now, and for how many seconds; None for nothing that is known."""
        limiter = None if self._worker.rate_limit is None else self._worker.rate_limit.limiter
        if limiter is not None and (paused := limiter.paused):
            return f"paused by the service: {_coarsely(paused)}", paused
        if scheduler.in_flight:
            wait = 0.0 if limiter is None else limiter.next_free
            return (f"limit: next in {_coarsely(wait)}", wait) if wait >= 1 else None
        due = scheduler.next_due()
        left = 0.0 if due is None else due - ambient.clock().monotonic()
        return (f"retry: next in {_coarsely(left)}", left) if left > 0 else None


def _coarsely(seconds: float) -> str:
    """Return a duration in one rounded unit: "23 h", "5 min", "42 s"."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _fixed_size(options: MapOptions, job: MapJob, mode: Mode) -> int | None:
    """Return the size of all chunks, None if it is to be measured."""
    if options.chunksize != "auto":
        return options.chunksize
    if mode == "sequential":
        return 1
    if mode in ("async", "async_process"):
        # Its items wait side by side, so none of them keeps another one from a free worker.
        return None
    waits = options.rate_limit is not None or (
        job.item_timeout is not None and job.item_timeout < job.target_s
    )
    return 1 if waits else None


# --- where items run ------------------------------------------------------------------------------


def choose_mode(options: MapOptions, *, awaits: bool, recorded: bool = False) -> Mode:
    """Choose where items run.

    Args:
        options: The map's options.
        awaits: Whether its function is a coroutine function.
        recorded: Whether a recorder takes part, which needs the items in this process.

    Example:
        >>> from opero.core.options import MapOptions
        >>> choose_mode(MapOptions(), awaits=True), choose_mode(MapOptions(mode="async"), awaits=False)
        ('async', 'thread')
    """
    if options.sequential:
        return "sequential"
    here: Mode = "async" if awaits else "thread"
    if options.executor is not None and not recorded:
        return "executor"
    if recorded or options.mode == "async":
        # A synchronous function would block the loop.
        return here
    if options.mode == "thread":
        return "thread"
    if options.mode == "auto" and (awaits or not _FORKS):
        return here
    # Without coroutines there is nothing to have in flight.
    return "async_process" if options.mode == "async_process" and awaits else "process"


def _check_mode(options: MapOptions, mode: Mode, name: str) -> None:
    """Refuse options that have no meaning where items run.

    Raises:
        OperoUsageError: One of them; the message names it and the fix.
    """
    if mode in ("process", "async_process"):
        if not _FORKS:
            raise OperoUsageError(
                f'mode={options.mode!r} needs a system that can fork: write mode="thread" for {name}().'
            )
        return
    if mode == "sequential":
        return
    for option in _OF_PROCESSES:
        value = getattr(options, option)
        if value is not None:
            where = {"thread": "threads", "async": "an event loop"}.get(mode, "your executor")
            raise OperoUsageError(
                f"{option}={value!r} is about worker processes, and {name}() runs in {where}: "
                'write mode="process" or mode="async_process", or leave it out.'
            )


def _describe_mode(mode: Mode, options: MapOptions) -> str:
    """Return how items run, in a few words."""
    workers = options.workers
    several = "es" * (workers != 1)
    return {
        "executor": f"in {_name_executor(options.executor)}",
        "async": f"{workers} at once on the event loop",
        "thread": f"{workers} thread{'s' * (workers != 1)}",
        "process": f"{workers} process{several}",
        "async_process": f"{workers} process{several} with {IN_FLIGHT} at once on the event loop of each",
        "sequential": "one after the other, in the caller's thread",
    }[mode]


def _name_executor(executor: Any) -> str:
    if hasattr(executor, "submit") or not callable(executor):
        return f"a {type(executor).__name__}"
    return f"an executor that {getattr(executor, '__name__', type(executor).__name__)}() makes"


def _forks(mode: Mode, options: MapOptions) -> bool:
    """Return whether the workers of a map are forked from this program."""
    if mode not in ("process", "async_process"):
        return False
    from opero.concurrency.executors.process.start import choose_method

    return choose_method(options.start_method) == "fork"


def _make_executor(mode: Mode, options: MapOptions, context: Context, *, on_loop: bool) -> Any:
    """Return the executor for a map that may block, or for one on an event loop."""
    if on_loop:
        from opero.concurrency.executors.event_loop import (
            AsyncInlineExecutor,
            EventLoopExecutor,
            ExecutorBridge,
        )

        if mode == "sequential":
            return AsyncInlineExecutor()
        if mode == "async":
            return EventLoopExecutor(options.workers, context)
        return ExecutorBridge(_make_executor(mode, options, context, on_loop=False))
    if mode in ("sequential", "thread"):
        from opero.concurrency.executors.in_process import InlineExecutor, ThreadExecutor

        return (
            InlineExecutor() if mode == "sequential" else ThreadExecutor(options.workers, context)
        )
    if options.executor is not None and mode == "executor":
        from opero.concurrency.executors.futures import executor_for

        # Unless `workers` was given, the executor says how many it has.
        workers = options.workers if "workers" in options.given else None
        return executor_for(options.executor, workers, context)
    from opero.concurrency.executors.process.worker_pool import ProcessEngine

    return ProcessEngine(options.workers, method=options.start_method)


# --- the function ---------------------------------------------------------------------------------


def build_map_function(pipeline: Pipeline, by: str) -> Any:
    """Build the function that maps, with its attributes."""
    mapper = Mapper(pipeline)
    one = build_function(pipeline, by)
    first, name = pipeline.info.bound, pipeline.info.name

    def begin(returns: Returns, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Begin a run for the arguments of a call; return what begins it where the function is asynchronous."""
        if len(args) <= first:
            raise TypeError(f"{name}() maps over items and got none: write {name}([…])")
        now = mapper if ambient.tape() is None else _under_replay(mapper)
        given: dict[str, Any] = {
            "before": args[:first],
            "after": args[first + 1 :],
            "kwargs": kwargs,
        }
        start = partial(now.begin, args[first], returns, on_loop=mapper.awaits, **given)
        return start if mapper.awaits else start()

    def collected(*args: Any, **kwargs: Any) -> Any:
        run = begin("list", args, kwargs)
        from opero.concurrency.loop import run_map

        return run_map(run)

    async def acollected(*args: Any, **kwargs: Any) -> Any:
        from opero.concurrency.loop import run_map_async

        return await run_map_async(begin("list", args, kwargs))

    def report(*args: Any, **kwargs: Any) -> Any:
        """Run all items and return a `MapResult`: what succeeded, what failed, and whether that is all."""
        run = begin("report", args, kwargs)
        from opero.concurrency.loop import run_map, run_map_async

        return run_map_async(run) if mapper.awaits else run_map(run)

    def stream(*args: Any, **kwargs: Any) -> Any:
        """Return a lazy, closable iterator of results; it reads the input only as far as it must."""
        run = begin("stream", args, kwargs)
        from opero.concurrency.loop import stream_map, stream_map_async

        return stream_map_async(run) if mapper.awaits else stream_map(run)

    def explain_map() -> Explanation:
        """Describe what happens to each item, stage by stage."""
        return explain(pipeline, outside=(("map", mapper.describe()),))

    def with_options(**changes: Any) -> Any:
        """Return the same map with other options.

        Limiter, cache entries and counters are shared with the original, unless that very option
        changes.
        """
        return place_in_class(with_changes(pipeline, by, changes), by, build_map_function)

    report.__name__ = "map"
    wrapper: Any = acollected if mapper.awaits else collected
    functools.update_wrapper(wrapper, one)
    vars(wrapper).update(vars(one))
    wrapper.__signature__ = _signature(pipeline)
    # Also how a copy is made in another process.
    wrapper.__opero_map__ = rebuild_map
    wrapper.explain = explain_map
    wrapper.with_options = with_options
    wrapper.one, wrapper.stream, wrapper.map = one, stream, report
    return wrapper


def rebuild_map(fn: Callable[..., Any], options: MapOptions) -> Any:
    """Build the map of a function again, in the process that it was sent to."""
    return decorate(fn, options, by="operomap", build=build_map_function)


def _under_replay(mapper: Mapper) -> Mapper:
    """Return the mapper for calls that are recorded or replayed: inline, so that all items pass the tape."""
    # A process of its own would have no tape, and what a map finds in a cache it does not call.
    pipeline = mapper.pipeline
    changes: dict[str, Any] = {"sequential": True, "cache_backend": "memory"}
    if pipeline.options.cache_backend == "memory":
        del changes["cache_backend"]
    options = pipeline.options.replace("operomap", **changes)
    replaced = frozenset({"sequential", "cache_backend"})
    return Mapper(Pipeline(pipeline.info, options, origin=pipeline, changed=replaced))


def _signature(pipeline: Pipeline) -> inspect.Signature:
    """The function's own signature, with the items in the item's place."""
    info = pipeline.info
    found = list(info.declared.parameters.values())
    place = info.bound
    fits = len(found) > place and found[place].kind <= inspect.Parameter.POSITIONAL_OR_KEYWORD
    name = "items" if "items" not in info.declared.parameters else "_items"
    items = inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY)
    before = [p.replace(kind=inspect.Parameter.POSITIONAL_ONLY) for p in found[:place]]
    others = found[place + 1 :] if fits else found[place:]
    return info.declared.replace(
        parameters=[*before, items, *others], return_annotation=inspect.Signature.empty
    )
