# this_file: src/opero/concurrency/shipment.py
"""A job on its way to worker processes, and what a worker makes of it."""

from __future__ import annotations

import dataclasses
import functools
import os
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opero.concurrency.executors.base import MapJob
from opero.concurrency.shipping import can_be_named, dumps_job, import_paths, shared_options
from opero.core.function import describe_function
from opero.core.options import Options
from opero.core.pipeline import Pipeline
from opero.errors import ShippingError
from opero.events import event_bus
from opero.limits.shareable import births, inherit
from opero.utils import ambient

if TYPE_CHECKING:
    from opero.concurrency.slate import Slate

__all__ = ["Shipment"]

_OF_THE_PROCESS = frozenset({"pipeline", "options"})


@dataclass(frozen=True, slots=True)
class Shipment:
    """What a worker must know of a job; it is inherited by a fork, and pickled for others.

    Attributes:
        fields: The job's fields, without what belongs to the map's process.
        options: Options of the pipeline, with the limiter and permits that all processes share.
        heard: Who listens in the map's process: "bus" (all events are wanted), "function" or None.
        disabled: Whether retries, waits and caches are switched off.
        home: The map's process.
    """

    fields: dict[str, Any]
    options: Options
    heard: str | None
    disabled: bool = False
    home: int = 0

    @classmethod
    def of(cls, job: MapJob) -> Shipment:
        """Pack a job."""
        emitter = job.pipeline.emitter
        fields = {
            f.name: getattr(job, f.name)
            for f in dataclasses.fields(job)
            if f.name not in _OF_THE_PROCESS
        }
        everything = event_bus.active or job.relays_all
        heard = "bus" if everything else "function" if emitter.active else None
        options = shared_options(job.pipeline)
        return cls(fields, options, heard, ambient.disabled(), os.getpid())

    def pickled(self) -> bytes:
        """Pickle for an interpreter that has nothing of this program.

        Raises:
            ShippingError: The function, or what it needs, cannot be pickled.
        """
        try:
            packed = dumps_job(self)
        except Exception as error:
            function = getattr(self.fields["function"], "__qualname__", "the function")
            raise ShippingError(
                f"{function} cannot travel to a worker process ({type(error).__name__}: {error}). "
                "Make what it needs (a lock, a client, an open file) inside of it, or use "
                'mode="thread".'
            ) from error
        return pickle.dumps((import_paths(), sys.argv, births(), packed))

    def introduce(self) -> None:
        """Make the classes known that the job refers to, before a fork that inherits it.

        A class of `__main__`, or of a function, is the same on both sides only if both know its number; cloudpickle
        gives it one when it is pickled first.
        """
        if can_be_named(self.fields["function"]) and not any(
            self.fields[name] for name in ("before", "after", "kwargs", "worker_init")
        ):
            # What an importable function makes can be imported too.
            return
        try:
            dumps_job(self, lambda _: False, nowhere=True)
        except Exception:  # noqa: BLE001, S110 - a fork needs no pickle
            pass

    @staticmethod
    def open(data: bytes | memoryview) -> Shipment:
        """Make this process like the map's as far as the function can see, and unpack."""
        paths, sys.argv, _, _ = pickle.loads(data)  # noqa: S301 - from the map
        sys.path[:] = paths
        return Shipment.open_here(data)

    @staticmethod
    def open_here(data: bytes | memoryview) -> Shipment:
        """Unpack in a process that has a life of its own."""
        _, _, born, packed = pickle.loads(data)  # noqa: S301 - from the map
        # Before anything of the user's is imported, which makes its limiters.
        inherit(born)
        shipment: Shipment = pickle.loads(packed)  # noqa: S301 - from the map
        return shipment

    def job(self, slate: Slate | None, hear: Callable[[Any], object]) -> MapJob:
        """Make the worker's own job: the same function with a pipeline of this process.

        Args:
            slate: Where calls are noted that may take too long; None where nobody could do anything about them.
            hear: Takes the events of this function; those of all, if the bus is heard and `slate` is there.
        """
        options, fields = self.options, dict(self.fields)
        info = describe_function(fields["function"])
        if slate is not None and fields["item_timeout"] is not None and info.kind == "sync":
            # The map kills a worker whose call takes too long; a thread could only be left behind.
            options = _changed(options, timeout=None)
            fields["function"] = _timed(info.fn, slate)
            info = dataclasses.replace(info, fn=fields["function"])
        if self.heard == "function":
            options = _changed(options, on_event=hear)
        elif self.heard == "bus" and slate is not None:
            event_bus.subscribe(hear)
        pipeline = Pipeline(info, options)
        return MapJob(pipeline=pipeline, options=options, **fields)


def _changed(options: Options, **changes: Any) -> Options:
    changed = dataclasses.replace(options, **changes)
    object.__setattr__(changed, "given", options.given)
    return changed


def _timed(fn: Callable[..., Any], slate: Slate) -> Callable[..., Any]:
    """Return a function that notes on the slate when a call begins and ends."""
    begin, end, now = slate.begin_call, slate.end_call, time.monotonic_ns

    def call(*args: Any, **kwargs: Any) -> Any:
        begin(now())
        try:
            return fn(*args, **kwargs)
        finally:
            end()

    return functools.update_wrapper(call, fn, updated=())
