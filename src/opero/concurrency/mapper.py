# this_file: src/opero/concurrency/mapper.py
"""Maps of one function: from its options and some items to a run, and to what the caller gets."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import aclosing, closing
from contextvars import Context, copy_context
from math import inf
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from opero import events
from opero.concurrency.chunks import ChunkSize
from opero.concurrency.engine import Job
from opero.concurrency.modes import (
    IN_FLIGHT,
    Mode,
    check_mode,
    choose_mode,
    describe_mode,
    make_async_engine,
    make_engine,
)
from opero.concurrency.recorder import ItemRecorder, recording
from opero.concurrency.recover import Recovery
from opero.concurrency.run import Plan, Run, raise_failed
from opero.concurrency.shells import abatches, batches
from opero.core.deadline import in_force
from opero.core.options import Options
from opero.core.pipeline import Pipeline
from opero.errors import MapError, MapStopped, OperoUsageError
from opero.utils.units import parse_seconds, parse_size

if TYPE_CHECKING:
    from opero.concurrency.checkpoint import MakeKey
    from opero.concurrency.engine import Engine
    from opero.concurrency.order import Batch
    from opero.concurrency.result import MapResult
    from opero.concurrency.shells import AsyncEngine
    from opero.concurrency.watch import Bar
    from opero.core.options import MapOptions

__all__ = ["Arguments", "Mapper"]

_TARGETS: Final[dict[Mode, float]] = {
    "sequential": 0.0,
    "thread": 0.002,
    "async": 0.001,
    "process": 0.03,
    "async_process": 0.1,
    "executor": 0.05,
}
"""Seconds of work in a chunk, by mode: so long that handing it over costs next to nothing."""


class Arguments(NamedTuple):
    """What the function gets beside each item.

    Attributes:
        before: The instance or class of a method.
        after, kwargs: Further arguments, the same for all items.
    """

    before: tuple[Any, ...] = ()
    after: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012 - a default that nobody changes


class _Setting(NamedTuple):
    """Where a map was called: its context, the mode that fits, and who records it."""

    context: Context
    mode: Mode
    recorder: ItemRecorder | None


class Mapper:
    """Maps one function, by its pipeline's options.

    Args:
        pipeline: The function's pipeline, with the cache.
        tells_all: Whether its listeners hear also, from worker processes, what the function calls.

    Raises:
        OperoUsageError: The function cannot be mapped.
    """

    def __init__(self, pipeline: Pipeline, *, tells_all: bool = False) -> None:
        info = pipeline.info
        if info.kind in ("generator", "async_generator"):
            raise OperoUsageError(
                f"{info.name}() is a generator, and a map wants one result for each item: "
                "return a list, or use @opero."
            )
        self.pipeline = pipeline
        self._tells_all = tells_all
        self.options: MapOptions = cast("MapOptions", pipeline.options)
        self.awaits: bool = info.kind == "async"
        self.mode: Mode = choose_mode(self.options, awaits=self.awaits)
        check_mode(self.options, self.mode, info.name)
        bare = _of_the_worker(self.options)
        self._make_key: MakeKey | None = None
        if self.options.checkpoint is not None:
            from opero.concurrency.checkpoint import key_maker

            self._make_key = key_maker(info, self.options)
        self._worker = Pipeline(info, bare, origin=pipeline, changed=frozenset({"cache"}))

    def describe(self) -> str:
        """One line for `explain()`."""
        options = self.options
        where = describe_mode(self.mode, options)
        order = "in order" if options.ordered else "as they come"
        bound = "" if options.max_errors is None else f", max_errors={options.max_errors:g}"
        return f"{where}, {order}, on_error={options.on_error}{bound}"

    # --- synchronous ---------------------------------------------------------------------------------

    def collect(self, items: Any, arguments: Arguments) -> list[Any]:
        """Return all results.

        Raises:
            Exception: The error of the first item that failed.
            MapStopped: The map did not run to its end.
        """
        run, kept = self._drive(items, arguments, raises=self.options.on_error == "raise")
        return run.values(kept)

    def report(self, items: Any, arguments: Arguments) -> MapResult[Any]:
        """Return what succeeded and what failed."""
        run, kept = self._drive(items, arguments, raises=False)
        return run.result(kept)

    def _drive(self, items: Any, arguments: Arguments, *, raises: bool) -> tuple[Run, list[Batch]]:
        run, engine = self._begin(items, arguments, collects=True, raises=raises)
        kept: list[Batch] = []
        try:
            with closing(cast("Any", batches(run, engine, items))) as finished:
                for batch in finished:
                    kept.append(batch)
                    if run.driver.failed is not None:
                        raise_failed(run.driver.failed, run.plan.function)
        except MapError as error:
            error.result = run.result(kept)
            raise
        return run, kept

    def stream(self, items: Any, arguments: Arguments) -> Iterator[Any]:
        """Return an iterator of results that runs the map as it is consumed."""
        raises = self.options.on_error == "raise"
        run, engine = self._begin(items, arguments, collects=False, raises=raises)
        return _iterate(run, batches(run, engine, items))

    def _begin(
        self, items: Any, arguments: Arguments, *, collects: bool, raises: bool
    ) -> tuple[Run, Engine]:
        self._check(items)
        setting = self._setting()
        engine = make_engine(setting.mode, self.options, setting.context)
        run = self._run(engine, setting, items, arguments, collects=collects, raises=raises)
        return run, engine

    # --- asynchronous --------------------------------------------------------------------------------

    async def acollect(self, items: Any, arguments: Arguments) -> list[Any]:
        """Do what `collect` does, in an event loop."""
        run, kept = await self._adrive(items, arguments, raises=self.options.on_error == "raise")
        return run.values(kept)

    async def areport(self, items: Any, arguments: Arguments) -> MapResult[Any]:
        """Do what `report` does, in an event loop."""
        run, kept = await self._adrive(items, arguments, raises=False)
        return run.result(kept)

    async def _adrive(
        self, items: Any, arguments: Arguments, *, raises: bool
    ) -> tuple[Run, list[Batch]]:
        run, engine = self._abegin(items, arguments, collects=True, raises=raises)
        kept: list[Batch] = []
        try:
            async with aclosing(cast("Any", abatches(run, engine, items))) as finished:
                async for batch in finished:
                    kept.append(batch)
                    if run.driver.failed is not None:
                        raise_failed(run.driver.failed, run.plan.function)
        except MapError as error:
            error.result = run.result(kept)
            raise
        return run, kept

    async def astream(self, items: Any, arguments: Arguments) -> AsyncIterator[Any]:
        """Yield results, running the map as they are consumed."""
        raises = self.options.on_error == "raise"
        run, engine = self._abegin(items, arguments, collects=False, raises=raises)
        async with aclosing(cast("Any", abatches(run, engine, items))) as finished:
            async for batch in finished:
                for value in run.each(batch) if batch.odd else batch.values:
                    yield value
        _ended(run)

    def _abegin(
        self, items: Any, arguments: Arguments, *, collects: bool, raises: bool
    ) -> tuple[Run, AsyncEngine]:
        self._check(items)
        setting = self._setting()
        engine = make_async_engine(setting.mode, self.options, setting.context)
        run = self._run(engine, setting, items, arguments, collects=collects, raises=raises)
        return run, engine

    # --- both ----------------------------------------------------------------------------------------

    def _check(self, items: Any) -> None:
        name = self.pipeline.info.name
        if isinstance(items, str | bytes | bytearray):
            kind = type(items).__name__
            raise OperoUsageError(
                f"{name}() maps over items, and a {kind} would be taken apart: write {name}([…]) for "
                f"a single one, {name}.one(…) for a single call, list(…) if its parts are meant."
            )
        if hasattr(items, "__aiter__"):
            if self.awaits:
                return
            raise OperoUsageError(
                f"{name}() is synchronous and cannot wait for an asynchronous iterator: "
                "make it an `async def`, or collect the items first."
            )
        if not isinstance(items, Iterable) and not hasattr(items, "__getitem__"):
            raise OperoUsageError(
                f"{name}() maps over items, and {type(items).__name__} is not iterable: write "
                f"{name}([…]), or {name}.one(…) for a single call."
            )

    def _setting(self) -> _Setting:
        """See where this map is called."""
        make = recording.get()
        recorder = None if make is None else make(self.pipeline.info.qualname)
        mode = self.mode
        if recorder is not None:
            mode = choose_mode(self.options, awaits=self.awaits, recorded=True)
        return _Setting(copy_context(), mode, recorder)

    def _run(
        self,
        engine: Engine | AsyncEngine,
        setting: _Setting,
        items: Any,
        arguments: Arguments,
        *,
        collects: bool,
        raises: bool,
    ) -> Run:
        options = self.options
        job = self._job(arguments, setting, collects=collects)
        token = options.stop_token
        plan = Plan(
            job=job,
            cache=self.pipeline.cache,
            size=ChunkSize(
                target_s=job.target_s, fixed=self._fixed(job, setting.mode), least=job.in_flight
            ),
            slots=engine.slots,
            submit=engine.submit,
            wake=engine.wake,
            context=setting.context,
            recover=Recovery(job),
            collects=collects,
            ordered=options.ordered,
            raises=raises,
            skips=options.on_error == "skip",
            max_errors=options.max_errors,
            stop_set=None if token is None else token.is_set,
            on_result=options.on_result,
            bar=self._bar(items),
            function=self.pipeline.info.name,
            recorders=self._recorders(arguments, setting),
            awaits=self.awaits,
        )
        return Run(plan)

    def _recorders(self, arguments: Arguments, setting: _Setting) -> tuple[ItemRecorder, ...]:
        recorders = [] if setting.recorder is None else [setting.recorder]
        path, make_key = self.options.checkpoint, self._make_key
        if path is not None and make_key is not None:
            from opero.concurrency.checkpoint import Checkpoint
            from opero.concurrency.journal import Journal

            key = functools.partial(make_key, arguments)
            recorders.append(Checkpoint(self.pipeline.info.name, Journal(path), key))
        return tuple(recorders)

    def _job(self, arguments: Arguments, setting: _Setting, *, collects: bool) -> Job:
        options, worker, mode = self.options, self._worker, setting.mode
        cache = self.pipeline.cache
        limit = None if options.timeout is None else parse_seconds(options.timeout, "timeout")
        memory = options.memory_limit
        # A call with a deadline of its own, and one that is being debugged, sleeps where it is.
        stays = options.deadline is not None or mode == "sequential"
        return Job(
            function=self.pipeline.info.fn,
            options=worker.options,
            pipeline=worker,
            before=arguments.before,
            after=arguments.after,
            kwargs=arguments.kwargs,
            item_timeout=limit,
            target_s=_TARGETS[mode],
            parks=inf if stays else 0.05,
            details=options.cache_if is not None and worker.fallback is not None,
            worker_init=options.worker_init,
            memory_limit=None if memory is None else parse_size(memory, "memory_limit"),
            max_tasks_per_worker=options.max_tasks_per_worker,
            deadline=in_force(),
            in_flight=IN_FLIGHT if mode == "async_process" else 1,
            tells_all=self._tells_all,
            leads=collects and cache is not None and cache.leases is not None,
            enter=None if setting.recorder is None else setting.recorder.enter,
        )

    def _fixed(self, job: Job, mode: Mode) -> int | None:
        options = self.options
        if options.chunksize != "auto":
            return options.chunksize
        if mode == "sequential":
            return 1
        if mode == "async_process":
            # Its items wait side by side, so none of them keeps another one from a free worker.
            return None
        waits = options.rate_limit is not None or (
            job.item_timeout is not None and job.item_timeout < job.target_s
        )
        return 1 if waits else None

    def _bar(self, items: Any) -> Bar | None:
        wanted, emitter = self.options.progress, self.pipeline.emitter
        bar: Bar | None = None
        if wanted is not False:
            from opero.concurrency.progress import make_bar

            bar = make_bar(self.pipeline.info.name, _total(items), rich=wanted == "rich")
        if emitter.active and emitter.hears(events.MapProgress):
            from opero.concurrency.news import News

            return News(emitter, _total(items), bar)
        return bar


def _of_the_worker(options: MapOptions) -> Options:
    """Return the options of the pipeline beside the function: no cache, and nothing of the map's."""
    names = {name for name in Options.names() if not name.startswith("cache")}
    kept = {name: getattr(options, name) for name in options.given & names}
    return Options.of("operomap", cache=False, **kept)


def _total(items: Any) -> int | None:
    try:
        return len(items)
    except Exception:  # noqa: BLE001 - a length that cannot be told is no error
        return None


def _iterate(run: Run, finished: Iterator[Batch]) -> Iterator[Any]:
    with closing(cast("Any", finished)):
        for batch in finished:
            if batch.odd:
                yield from run.each(batch)
            else:
                yield from batch.values
    _ended(run)


def _ended(run: Run) -> None:
    """Raise what a stream ends with, if it did not reach the end of its input."""
    if run.driver.stopped is not None:
        raise MapStopped(run.driver.stopped, run.result([]))
