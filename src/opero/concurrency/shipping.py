# this_file: src/opero/concurrency/shipping.py
"""How functions and values travel to another process.

What can be imported travels by name. A decorated function hides the function inside under its name, so that one travels
as "what is inside of this name". Everything else (lambdas, closures, what was defined in `__main__` or a notebook)
travels by value, with cloudpickle.
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
from os.path import realpath
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final

from opero.core.function import ClassMethod, Method
from opero.errors import ShippingError

if TYPE_CHECKING:
    from cloudpickle import Pickler

    from opero.core.options import Options
    from opero.core.pipeline import Pipeline

__all__ = ["can_be_named", "dumps", "dumps_job", "import_paths", "shared_options"]

_PROTOCOL: Final = 5
Stays = Callable[[pickle.PickleBuffer], object]


def dumps(
    value: object,
    stays: Stays | None = None,
    again: Callable[[], object] = lambda: None,
    *,
    home: bool = False,
) -> bytes:
    """Pickle a value so that a process with another `__main__` can open it.

    Args:
        value: The value.
        stays: Told each large buffer; a false answer keeps it out of the pickle.
        again: Called if what `stays` was told is void, and it will be told anew.
        home: Whether this is a worker, and the value for the process that its job came from.

    Raises:
        Exception: It cannot be pickled.
    """
    try:
        data = pickle.dumps(value, _PROTOCOL, buffer_callback=stays)
    except Exception:  # noqa: BLE001, S110 - a class may refuse in any way; by value it may go
        pass
    else:
        # A name in such a module means nothing over there, or something else.
        if not any(name in data for name in _unknown):
            return data
    again()
    return dumps_job(value, stays, home=home)


def dumps_job(
    value: object, stays: Stays | None = None, *, nowhere: bool = False, home: bool = False
) -> bytes:
    """Pickle by value what cannot be imported by name; slower than `dumps`, and knows decorated functions.

    Args:
        value: The value.
        stays: As in `dumps`.
        nowhere: Whether the pickle is thrown away.
        home: As in `dumps`.
    """
    file = _Nowhere() if nowhere else io.BytesIO()
    pickler = _pickler()(file, _PROTOCOL, buffer_callback=stays)
    vars(pickler)["opero_home"] = home
    pickler.dump(value)
    return file.getvalue()


class _Nowhere(io.BytesIO):
    def write(self, data: Any) -> int:
        """Take no note of it."""
        return len(data)


_made: list[type[Pickler]] = []


def _pickler() -> type[Pickler]:
    """Return our kind of cloudpickle's pickler, which is loaded only where something travels by value."""
    if not _made:
        import cloudpickle

        # Whether cloudpickle has types depends on its release.
        class OperoPickler(cloudpickle.Pickler):  # type: ignore[misc,name-defined,unused-ignore]
            opero_home = False

            def reducer_override(self, obj: Any) -> Any:
                kind = type(obj)
                if kind is Method:
                    return _method, (obj.func,)
                if kind is ClassMethod:
                    return _class_method, (obj.__func__,)
                if self.opero_home and isinstance(obj, type):
                    number = _number_at_home(obj, cloudpickle.cloudpickle)
                    if number is not None:
                        return _class_at_home, (number,)
                if isinstance(obj, FunctionType | type):
                    if not can_import(obj.__module__):
                        _by_value(obj.__module__, cloudpickle)
                    if type(obj) is FunctionType and (reduced := _reduce_function(obj)) is not None:
                        return _with_names(*reduced)
                return super().reducer_override(obj)

        _made.append(OperoPickler)
    return _made[0]


def import_paths() -> list[str]:
    """Return where modules are looked for, so that another process finds the same ones."""
    return [os.getcwd() if path == "" else path for path in sys.path]  # noqa: PTH109 - pathlib is not loaded for it


# --- modules that exist here only -----------------------------------------------------------------

_unknown: Final = {b"__main__"}


@functools.lru_cache(maxsize=4096)
def can_import(name: str | None) -> bool:
    """Tell whether another process would find a module of this name, and the same one.

    What is loaded from a file by hand, as test runners do it, is in `sys.modules` and nowhere else.
    """
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


def _by_value(name: str, cloudpickle: Any) -> None:
    """Let everything of a module travel by value from now on; nobody can import it elsewhere anyway."""
    if name.encode() not in _unknown:
        _unknown.add(name.encode())
        cloudpickle.register_pickle_by_value(sys.modules[name])


# --- classes --------------------------------------------------------------------------------------

_numbered_here: weakref.WeakSet[type] = weakref.WeakSet()


def _number_at_home(kind: type, cloudpickle: Any) -> str | None:
    """Return the number under which the process knows a class that this worker got it from; None for all others.

    By value it would arrive as the same class, with attributes made anew: caches and counters of its decorated
    methods would be lost.
    """
    number: str | None = cloudpickle._DYNAMIC_CLASS_TRACKER_BY_CLASS.get(kind)  # noqa: SLF001 - there is no other way
    if number is None:
        _numbered_here.add(kind)
    return None if kind in _numbered_here else number


def _class_at_home(number: str) -> Any:
    from cloudpickle import cloudpickle

    found = vars(cloudpickle)["_DYNAMIC_CLASS_TRACKER_BY_ID"].get(number)
    if found is None:
        raise ShippingError("its class is no longer there")
    return found


# --- functions ------------------------------------------------------------------------------------


def can_be_named(function: Any) -> bool:
    """Tell whether a function can travel by name, its own or that of what is around it."""
    if type(function) is not FunctionType or not can_import(function.__module__):
        return False
    module: str | None = function.__module__
    if module is None or module.encode() in _unknown:
        return False
    named = _named(module, function.__qualname__) is function
    return named or _inside(function) is not None


def _reduce_function(function: FunctionType) -> Any:
    """Say how opero's functions, and those inside of them, are made again; None for all others."""
    # What was made by `exec` may say nothing of its module.
    module: str | None = function.__module__
    if module is None or module.encode() in _unknown:
        return _reduce_wrapper(function)
    if _named(function.__module__, function.__qualname__) is function:
        return None
    return _inside(function) or _reduce_wrapper(function)


def _reduce_wrapper(function: FunctionType) -> Any:
    pipeline: Pipeline | None = vars(function).get("__opero__")
    if pipeline is None:
        return None
    options = shared_options(pipeline)
    if "__opero_map__" in vars(function):
        from opero.concurrency.dress import map_again

        # What watches a map and stops it stays where that is; a copy elsewhere runs by itself.
        watching = dict.fromkeys({"on_result", "stop_token", "executor"} & options.given)
        return map_again, (pipeline.info.fn, options.replace("operomap", **watching))
    from opero.core.decorate import decorate

    return decorate, (pipeline.info.fn, options)


_NAMES: Final = ("__module__", "__qualname__", "__kwdefaults__", "__annotations__")


def _with_names(make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Let the function that is decorated again bring along what its decoration depends on.

    It may be in the middle of its own journey, when its class refers to it, and no more than code on arrival.
    """
    fn = arguments[0]
    if type(fn) is not FunctionType:
        return make, arguments
    return _make_again, (make, arguments, {name: getattr(fn, name) for name in _NAMES})


def _make_again(make: Callable[..., Any], arguments: tuple[Any, ...], names: dict[str, Any]) -> Any:
    for name, value in names.items():
        setattr(arguments[0], name, value)
    made = make(*arguments)
    # What stands in the class is made around it there.
    return made.func if type(made) is Method else made


def _method(function: Any) -> Method:
    return Method(function)


def _class_method(function: Any) -> ClassMethod:
    return ClassMethod(function)


def _inside(function: FunctionType) -> Any:
    """Return the way to a function that is hidden under its own name by decorators; None if it is not there."""
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
    """Return the function at some depth under a name, in the process that it has travelled to."""
    importlib.import_module(module)
    layers = _layers(_named(module, qualname))
    if depth >= len(layers):
        raise ShippingError(
            f"{module}.{qualname} is not the same here as in the process that sent it: "
            "is another version of the module installed, or is it changed at run time?"
        )
    return layers[depth]


def shared_options(pipeline: Pipeline) -> Options:
    """Return a pipeline's options with its own limiter, breaker and permits in them, for a twin in another process."""
    options = pipeline.options
    changes: dict[str, Any] = {}
    if options.on_event is not None:
        changes["on_event"] = None
    if pipeline.rate_limit is not None:
        changes["rate_limit"] = pipeline.rate_limit.limiter
    if pipeline.concurrency is not None:
        changes["concurrency"] = pipeline.concurrency.limit
    return options.replace("opero", **changes) if changes else options
