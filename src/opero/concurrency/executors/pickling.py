# this_file: src/opero/concurrency/executors/pickling.py
"""Pickle jobs, functions and values for another process.

What can be imported is pickled by name. A decorated function hides the function inside under its name, so that one is
pickled as "what is inside of this name". Everything else (lambdas, closures, what was defined in `__main__` or a
notebook) is pickled by value, with cloudpickle.
"""

from __future__ import annotations

import functools
import importlib
import io
import os
import pickle
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from os.path import realpath
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final

from opero.concurrency.executors.base import MapJob
from opero.concurrency.executors.process.start import import_paths
from opero.core.function import ClassMethod, FunctionInfo, Method
from opero.core.pipeline import Pipeline
from opero.errors import ShippingError
from opero.events import event_bus
from opero.limits.shared import attach_table, registry, share_all
from opero.utils import ambient
from opero.utils.lazy import NamedTuple

if TYPE_CHECKING:
    from opero.core.options import Options


PROTOCOL: Final = 5
Stays = Callable[[pickle.PickleBuffer], object]
"""Takes each large buffer; a true result keeps it in the pickle."""


def dumps(
    value: object, begin: Callable[[], Stays | None] = lambda: None, *, home: bool = False
) -> bytes:
    """Pickle a value so that a process with another `__main__` can open it.

    Args:
        value: The value.
        begin: Called when the pickle begins, and when it begins anew: what it returns takes all large buffers.
        home: Whether this is a worker, and the value for the process that its job came from.

    Raises:
        Exception: It cannot be pickled.
    """
    try:
        data = pickle.dumps(value, PROTOCOL, buffer_callback=begin())
    except Exception:  # noqa: BLE001, S110 - a class may refuse in any way; by value it may work
        pass
    else:
        # A name in such a module means nothing in the other process, or something else.
        if not any(name in data for name in _unknown):
            return data
    return dumps_by_value(value, begin(), home=home)


def dumps_by_value(value: object, stays: Stays | None = None, *, home: bool = False) -> bytes:
    """Pickle by value what cannot be imported by name; slower than `dumps`, and knows decorated functions.

    Args:
        value: The value.
        stays: Takes all large buffers.
        home: As in `dumps`.
    """
    file = io.BytesIO()
    pickler = _value_pickler()(file, PROTOCOL, buffer_callback=stays)
    pickler.home = home
    pickler.dump(value)
    return file.getvalue()


def dumps_job(job: JobSpec, stays: Stays | None = None) -> bytes:
    """Pickle a job: by name if that can be done, for which cloudpickle need not be loaded on either side.

    Args:
        job: The job.
        stays: As in `dumps_by_value`.
    """
    if getattr(job.fields["function"], "__module__", None) != "__main__":
        file = io.BytesIO()
        with suppress(Exception):  # by value it may work
            _NamePickler(file, PROTOCOL, buffer_callback=stays).dump(job)
            return file.getvalue()
    return dumps_by_value(job, stays)


class _NamePickler(pickle.Pickler):
    """Pickles by name; refuses what has no name that another process knows."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, FunctionType | type):
            # What was made by `exec` may have no module.
            module: str | None = obj.__module__
            if module is None or not can_import(module):
                raise pickle.PicklingError(f"{obj!r} has no name in another process")
        return _reduce(obj)


@functools.cache
def _value_pickler() -> Callable[..., Any]:
    """Return our subclass of cloudpickle's pickler, which is imported only if something is pickled by value."""
    import cloudpickle

    # Whether cloudpickle has types depends on its release.
    class ValuePickler(cloudpickle.Pickler):  # type: ignore[misc,name-defined,unused-ignore]
        home = False

        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, type) and self.home:
                number = _number_in_program(obj, cloudpickle.cloudpickle)
                if number is not None:
                    return _class_in_program, (number,)
            if isinstance(obj, FunctionType | type) and not can_import(module := obj.__module__):
                if module != "__main__":
                    cloudpickle.register_pickle_by_value(sys.modules[module])
                _unknown.add(module.encode())
            reduced = _reduce(obj)
            return super().reducer_override(obj) if reduced is NotImplemented else reduced

    return ValuePickler


# --- the job --------------------------------------------------------------------------------------

Timed = Callable[[Callable[..., Any], float], Callable[..., Any]]
"""Returns a function whose calls are ended after so many seconds."""


class JobSpec(NamedTuple):
    """What a worker must know of a job; a fork inherits it, and others get it pickled.

    Attributes:
        fields: The job's fields, without what belongs to the map's process.
        options: Options of the pipeline, with the limiter and permits that all processes share.
        listens: Which events the map's process wants: "bus" (all), "function" or None.
        levels: Levels of its loggers, by name; None if it has not loaded `logging`.
        disabled: Whether retries, waits and caches are switched off.
        interpreter: The `registry.uid` of the map.
        stops: Whether the map may be stopped by its user while it runs.
        script: The file of the program, None if it has none: `ambient.main_script` goes by it.
    """

    fields: dict[str, Any]
    options: Options
    listens: str | None
    levels: dict[str, int] | None = None
    disabled: bool = False
    interpreter: str = ""
    stops: bool = False
    script: str | None = None

    @classmethod
    def of(cls, job: MapJob) -> JobSpec:
        """Describe a job."""
        emitter = job.pipeline.emitter
        fields = job._asdict()
        del fields["pipeline"], fields["stopped"]
        everything = bool(event_bus.subscriptions) or job.relays_all
        listens = "bus" if everything else "function" if emitter.active else None
        options = shared_options(job.pipeline)
        stops = job.stopped is not None
        file = getattr(sys.modules["__main__"], "__file__", None)
        disabled, script = ambient.disabled(), next(iter(ambient.adopted_scripts), file)
        return cls(fields, options, listens, _levels(), disabled, registry.uid, stops, script)

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

    def job(self, timed: Timed | None, emit: Callable[[Any], object]) -> MapJob:
        """Make the worker's own job: the same function with a pipeline of this process.

        Args:
            timed: Lets the pool end calls that take too long; None where nothing can end them.
            emit: Takes the events of this function; those of all, if all are wanted and this is a worker process.
        """
        options, fields = self.options, dict(self.fields)
        info = FunctionInfo(fields["function"])
        limit = fields["item_timeout"]
        if timed is not None and limit is not None and info.kind == "sync":
            # The pool kills a worker whose call takes too long; a thread could only be left behind.
            options = options.with_values(timeout=None)
            info.fn = fields["function"] = timed(info.fn, limit)
        if self.listens == "function":
            options = options.with_values(on_event=emit)
        elif self.listens == "bus" and timed is not None:
            event_bus.subscribe(emit)
        return MapJob(pipeline=Pipeline(info, options), **fields)


def loaded_module(name: str) -> Any:
    """Return a module that is loaded; None for one that is missing, or still being imported by another thread."""
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    return None if getattr(spec, "_initializing", False) else module


def _levels() -> dict[str, int] | None:
    logging = loaded_module("logging")
    if logging is None:
        return None
    manager = logging.root.manager
    found = {"": max(logging.root.level, manager.disable + 1)}
    for name, logger in list(manager.loggerDict.items()):
        # Of a name without a logger a placeholder stands there.
        if level := getattr(logger, "level", 0):
            found[name] = level
    return found


# --- modules that exist in this process only -----------------------------------------------------------------

_unknown: Final = {b"__main__"}


@functools.lru_cache(maxsize=4096)
def can_import(name: str | None) -> bool:
    """Return whether another process would find a module of this name, and the same one.

    What is loaded from a file by hand, as test runners do it, is in `sys.modules` and nowhere else.
    """
    if name == "__main__":
        return False
    file = getattr(sys.modules.get(name or ""), "__file__", None)
    if name is None or file is None:
        return True
    top = name.partition(".")[0]
    for finder in sys.meta_path:
        spec = finder.find_spec(top, None)
        if spec is not None:
            break
    else:
        return False
    here: str = realpath(file)
    if top == name:
        # What is built in, or frozen into the interpreter, has no place.
        return not spec.has_location or realpath(spec.origin or "") == here
    folders = [realpath(place) + os.sep for place in spec.submodule_search_locations or ()]
    return here.startswith((*folders,))


# --- classes --------------------------------------------------------------------------------------

_defined_here: weakref.WeakSet[type] = weakref.WeakSet()


def _number_in_program(kind: type, cloudpickle: Any) -> str | None:
    """Return the number of a class that this worker got from the program; None for all others.

    By value it would arrive as the same class with new attributes: caches and counters of its decorated methods
    would be lost.
    """
    number: str | None = cloudpickle._DYNAMIC_CLASS_TRACKER_BY_CLASS.get(kind)  # noqa: SLF001 - there is no other way
    if number is None:
        _defined_here.add(kind)
    return None if kind in _defined_here else number


def _class_in_program(number: str) -> Any:
    from cloudpickle import cloudpickle

    found = vars(cloudpickle)["_DYNAMIC_CLASS_TRACKER_BY_ID"].get(number)
    if found is None:
        raise ShippingError("its class is no longer there")
    return found


# --- functions ------------------------------------------------------------------------------------


def _reduce(obj: Any) -> Any:
    """Return how a function of opero's, or one inside of it, is rebuilt; `NotImplemented` for all others."""
    kind = type(obj)
    if kind is Method or kind is ClassMethod:
        return _descriptor, (obj.__func__ if kind is ClassMethod else obj.func, kind is ClassMethod)
    if kind is not FunctionType:
        return NotImplemented
    if can_import(obj.__module__):
        if _named(obj.__module__, obj.__qualname__) is obj:
            return NotImplemented
        if (inside := _inside(obj)) is not None:
            return inside
    pipeline: Pipeline | None = vars(obj).get("__opero__")
    if pipeline is None:
        return NotImplemented
    fn, options = pipeline.info.fn, shared_options(pipeline)
    make = vars(obj).get("__opero_map__")
    if make is not None:
        # Objects that watch a map and stop it stay in their process.
        watching = dict.fromkeys({"on_result", "stop_token", "executor"} & options.given)
        options = options.replace("operomap", **watching)
    else:
        from opero.core.decorate import decorate as make
    # While its class is being unpickled, the function may be there as no more than code, and its decoration depends
    # on its names.
    names = {name: getattr(fn, name) for name in _NAMES} if type(fn) is FunctionType else {}
    return _make_again, (make, fn, options, names)


_NAMES: Final = ("__module__", "__qualname__", "__kwdefaults__", "__annotations__")


def _make_again(make: Callable[..., Any], fn: Any, options: Options, names: dict[str, Any]) -> Any:
    for name, value in names.items():
        setattr(fn, name, value)
    made = make(fn, options)
    # A class holds the function below the descriptor, which is rebuilt there.
    return made.func if type(made) is Method else made


def _descriptor(function: Any, is_class_method: bool) -> Method | ClassMethod:
    # The classes themselves have no name for pickle: their modules are those of an instance's function.
    return ClassMethod(function) if is_class_method else Method(function)


def _inside(function: FunctionType) -> Any:
    """Return the path to a function that is hidden under its own name by decorators; None if it is not there."""
    found = _named(function.__module__, function.__qualname__)
    for depth, one in enumerate(_layers(found)):
        if one is function:
            return _take_inside, (function.__module__, function.__qualname__, depth)
    return None


def _layers(found: Any) -> list[Any]:
    """Return what is decorated by `found`, from the outside in."""
    layers: list[Any] = []
    while found is not None and len(layers) < 50:
        layers.append(found)
        pipeline = getattr(found, "__opero__", None)
        inner = pipeline.info.fn if pipeline is not None else getattr(found, "__wrapped__", None)
        found = getattr(found, "__func__", None) if inner is None else inner
    return layers


def _named(module: str | None, qualname: str) -> Any:
    """Return what has this name now, None if nothing has."""
    found: Any = sys.modules.get(module or "")
    for part in qualname.split("."):
        try:
            # Past descriptors: a class's function, not what it is bound to.
            found = vars(found)[part]
        except (KeyError, TypeError):
            return None
    return found


def _take_inside(module: str, qualname: str, depth: int) -> Any:
    """Return the function at some depth under a name, in the process that unpickles it."""
    importlib.import_module(module)
    layers = _layers(_named(module, qualname))
    if depth >= len(layers):
        raise ShippingError(
            f"{module}.{qualname} is not the same here as in the process that sent it: "
            "is another version of the module installed, or is it changed at run time?"
        )
    return layers[depth]


def shared_options(pipeline: Pipeline) -> Options:
    """Return a pipeline's options with its own limiter and permits in them, for a copy in another process."""
    options = pipeline.options
    changes: dict[str, Any] = {}
    if options.on_event is not None:
        changes["on_event"] = None
    if pipeline.rate_limit is not None:
        changes["rate_limit"] = pipeline.rate_limit.limiter
    if pipeline.concurrency is not None:
        changes["concurrency"] = pipeline.concurrency.limit
    return options.replace("opero", **changes) if changes else options
