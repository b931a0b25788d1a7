# this_file: src/opero/concurrency/executors/process/job_spec.py
"""Describe a job for worker processes, and rebuild it there."""

from __future__ import annotations

import functools
import os
import pickle
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from opero.concurrency.executors.base import MapJob
from opero.concurrency.executors.process.pickling import (
    dumps_job,
    shared_options,
)
from opero.concurrency.executors.process.protocol import DUE
from opero.concurrency.executors.process.start import import_paths
from opero.core.deadline import current_deadline
from opero.core.function import FunctionInfo
from opero.core.pipeline import Pipeline
from opero.errors import ShippingError
from opero.events import event_bus
from opero.limits.shared import attach_table, registry, share_all
from opero.utils import ambient

if TYPE_CHECKING:
    from opero.core.options import Options


LoggerLevels = dict[str, tuple[int, bool, bool]]
"""Of each logger with settings of its own: its level, whether it propagates, and whether it is disabled."""


class JobSpec(NamedTuple):
    """What a worker must know of a job; a fork inherits it, and others get it pickled.

    Attributes:
        fields: The job's fields, without what belongs to the map's process.
        options: Options of the pipeline, with the limiter and permits that all processes share.
        listens: Which events the map's process wants: "bus" (all), "function" or None.
        loggers: Settings of its loggers; None if it has not loaded `logging`.
        disabled: Whether retries, waits and caches are switched off.
        interpreter: The `registry.uid` of the map.
    """

    fields: dict[str, Any]
    options: Options
    listens: str | None
    loggers: LoggerLevels | None = None
    disabled: bool = False
    interpreter: str = ""

    @classmethod
    def of(cls, job: MapJob) -> JobSpec:
        """Describe a job."""
        emitter = job.pipeline.emitter
        fields = job._asdict()
        del fields["pipeline"], fields["stopped"]
        everything = event_bus.active or job.relays_all
        listens = "bus" if everything else "function" if emitter.active else None
        options = shared_options(job.pipeline)
        return cls(fields, options, listens, _levels(), ambient.disabled(), registry.uid)

    def pickled(self, way_out: str = 'mode="thread"') -> bytes:
        """Pickle for an interpreter that has nothing of this program.

        Args:
            way_out: Options with which it need not be pickled, for the message about one that cannot be.

        Raises:
            ShippingError: The function, or what it needs, cannot be pickled.
        """
        try:
            packed = dumps_job(self)
        except Exception as error:
            function = getattr(self.fields["function"], "__qualname__", "the function")
            raise ShippingError(
                f"{function} cannot travel to a worker process ({type(error).__name__}: {error}). "
                f"Make what it needs (a lock, a client, an open file) inside of it, or use {way_out}."
            ) from error
        return pickle.dumps((import_paths(), sys.argv, registry.uid, share_all(), packed), 5)

    def register_classes(self) -> None:
        """Give the classes that the job refers to their identity, before a fork that inherits it.

        A class of `__main__`, or of a function, is the same on both sides only if both know its number; cloudpickle
        gives it one when it is pickled first.
        """
        with suppress(Exception):  # a fork needs no pickle
            dumps_job(self, lambda _: False)

    @staticmethod
    def open(data: bytes) -> JobSpec:
        """Unpickle in a process with settings of its own."""
        *_, interpreter, table, packed = pickle.loads(data)  # noqa: S301 - from the map
        # Before anything of the user's is imported, which makes its limiters.
        attach_table(table, interpreter)
        spec: JobSpec = pickle.loads(packed)  # noqa: S301 - from the map
        return spec

    @staticmethod
    def open_in_worker(data: bytes, folder: str | None, environ: dict[str, str]) -> JobSpec:
        """Unpickle in a worker process, which gets the paths, folder and environment of the program first."""
        sys.path[:], sys.argv, *_ = pickle.loads(data)  # noqa: S301 - from the map
        if folder is not None:
            with suppress(OSError):  # it was removed meanwhile
                os.chdir(folder)
        if dict(os.environ) != environ:
            os.environ.clear()
            os.environ.update(environ)
        return JobSpec.open(data)

    def job(self, page: memoryview[int] | None, emit: Callable[[Any], object]) -> MapJob:
        """Make the worker's own job: the same function with a pipeline of this process.

        Args:
            page: Where calls are noted that may take too long; None where nothing can end them.
            emit: Takes the events of this function; those of all, if all are wanted and `page` is there.
        """
        options, fields = self.options, dict(self.fields)
        info = FunctionInfo(fields["function"])
        limit = fields["item_timeout"]
        if page is not None and limit is not None and info.kind == "sync":
            # The pool kills a worker whose call takes too long; a thread could only be left behind.
            options = options.with_values(timeout=None)
            fields["function"] = _timed(info.fn, page, limit)
            info.fn = fields["function"]
        if self.listens == "function":
            options = options.with_values(on_event=emit)
        elif self.listens == "bus" and page is not None:
            event_bus.subscribe(emit)
        return MapJob(pipeline=Pipeline(info, options), **fields)


def loaded_module(name: str) -> Any:
    """Return a module that is loaded; None for one that is missing, or still being imported by another thread."""
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    return None if getattr(spec, "_initializing", False) else module


def _levels() -> LoggerLevels | None:
    logging = loaded_module("logging")
    if logging is None:
        return None
    root = logging.getLogger()
    found: LoggerLevels = {"": (max(root.level, logging.root.manager.disable + 1), True, False)}
    for name, logger in list(root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and (
            logger.level or not logger.propagate or logger.disabled
        ):
            found[name] = logger.level, logger.propagate, logger.disabled
    return found


def _timed(fn: Callable[..., Any], page: memoryview[int], limit: float) -> Callable[..., Any]:
    """Return a function that notes when each call begins and by when it must end."""
    now = time.monotonic

    def call(*args: Any, **kwargs: Any) -> Any:
        due, end_of_all = now() + limit, current_deadline()
        page[DUE] = (
            int(due * 1e9) if end_of_all is None or due < end_of_all else -int(end_of_all * 1e9)
        )
        try:
            return fn(*args, **kwargs)
        finally:
            page[DUE] = 0

    return functools.update_wrapper(call, fn, updated=())
