# this_file: src/opero/concurrency/guest.py
"""twat-mp and pathos, let in through a side door: what opero uses of them, without the rest.

`import twat_mp` brings all of pathos, multiprocess, dill and ppft, which take longer to import than opero and its first
map together. Of all that, a map uses two classes: `twat_mp.MultiPool` and, for threads, `pathos.threading.ThreadPool`.
So the two modules that define them run apart: the installed code, with light stand-ins for what these classes do not
reach. Nothing of it gets into `sys.modules`; a program that imports twat-mp gets it as it is, and so do its maps.

Another release may look different. Then it is imported like anything else.
"""

from __future__ import annotations

import builtins
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.machinery import PathFinder
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any, Final

__all__ = ["multi_pool", "thread_pool"]

_lock = threading.RLock()
_ours: Final[dict[str, Any]] = {}


def multi_pool() -> Any:
    """Return the class `twat_mp.MultiPool`.

    Example:
        >>> multi_pool().__module__
        'twat_mp.mp'
    """
    if "twat_mp" in sys.modules:
        return _whole("twat_mp", "MultiPool")
    return _once("twat_mp", "MultiPool", _part_of_twat)


def thread_pool() -> Any:
    """Return the class `pathos.threading.ThreadPool`.

    Example:
        >>> thread_pool().__module__
        'pathos.threading'
    """
    if "pathos" in sys.modules:
        return _whole("pathos.pools", "ThreadPool")
    return _once("pathos.pools", "ThreadPool", _part_of_pathos)


def _once(module: str, name: str, part: Callable[[], Any]) -> Any:
    with _lock:
        if name not in _ours:
            try:
                _ours[name] = part()
            except Exception:  # noqa: BLE001 - whatever another release has changed
                _ours[name] = _whole(module, name)
        return _ours[name]


def _whole(module: str, name: str) -> Any:
    # The filters belong to the whole process, and what guests say about the Python they meet is no news of the user's.
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(import_module(module), name)


# --- the two classes ------------------------------------------------------------------------------


def _part_of_twat() -> Any:
    process_pool, thread_pool = type("ProcessPool", (), {}), type("ThreadPool", (), {})
    logging = _Later(lambda: import_module("logging"))
    # A logger is made when the module begins, and used when something fails.
    vars(logging)["getLogger"] = lambda name: _Later(
        lambda: import_module("logging").getLogger(name)
    )
    module = _run_apart(
        "twat_mp.mp",
        {
            "logging": logging,
            "traceback": _Later(lambda: import_module("traceback")),
            "pathos.helpers": SimpleNamespace(mp=_Later(lambda: import_module("multiprocessing"))),
            "pathos.pools": SimpleNamespace(ProcessPool=process_pool, ThreadPool=thread_pool),
        },
    )
    found = module.MultiPool
    unreal = {name for name, held in vars(module).items() if held in (process_pool, thread_pool)}
    codes = [getattr(found, name).__code__ for name in ("__init__", "__enter__", "__exit__")]
    if any(_mentions(code, unreal) for code in codes):
        raise ImportError("it needs pathos' own pools")
    if not {"pool_class", "nodes", "debug"} <= {*codes[0].co_varnames}:
        raise ImportError("it is made in another way")
    return found


def _part_of_pathos() -> Any:
    import multiprocessing.dummy

    module = _run_apart(
        "pathos.threading",
        {
            "pathos.abstract_launcher": _run_apart("pathos.abstract_launcher", {}),
            # Only its `map` methods need it.
            "pathos.helpers.mp_helper": SimpleNamespace(
                starargs=_Later(lambda: import_module("pathos.helpers.mp_helper").starargs)
            ),
            # As pathos does where multiprocess is not installed.
            "pathos.helpers": SimpleNamespace(
                cpu_count=multiprocessing.cpu_count, ThreadPool=multiprocessing.dummy.Pool
            ),
        },
    )
    found = module.ThreadPool
    if "__state__" not in vars(found):
        raise ImportError("it keeps its pools elsewhere")
    return found


# --- the side door --------------------------------------------------------------------------------


def _run_apart(name: str, stand_ins: Mapping[str, object]) -> ModuleType:
    """Run the code of an installed module without its package, and with stand-ins for some of its imports."""
    package = PathFinder.find_spec(name.partition(".")[0])
    spec = package and PathFinder.find_spec(name, package.submodule_search_locations)
    # Loaders that have no `get_code` are no worse than a module that is not found.
    loader: Any = spec and spec.loader

    def take(wanted: str, *others: Any) -> object:
        return stand_ins[wanted] if wanted in stand_ins else __import__(wanted, *others)

    module = ModuleType(name)
    vars(module)["__builtins__"] = {**vars(builtins), "__import__": take}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code: CodeType = loader.get_code(name)
    exec(code, vars(module))  # noqa: S102 - what an import does
    return module


class _Later:
    """Something that is imported when it is used.

    Args:
        load: Imports and returns it.
    """

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load(), name)

    def __call__(self, *args: Any) -> Any:
        return self._load()(*args)


def _mentions(code: CodeType, names: set[str]) -> bool:
    """Tell whether a function or one within it uses a global of such a name."""
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return not names.isdisjoint(code.co_names) or any(_mentions(one, names) for one in inner)
