# this_file: src/opero/caching/stores/guest.py
"""twat-cache, let in through a side door: importing it must not be noticed by the host program.

Its own module `twat_cache.logging` removes every sink of the program's loguru logger and adds one
of its own, its models warn about pydantic, and a missing platformdirs makes it write to stderr. So a
stub takes the place of that module, loguru is told to ignore the package, and warnings are held
back while it is imported.

It also imports all its engines, and with them joblib, numpy, klepto and dill: half a second for
nothing. Stubs take the place of the engines that opero does not use. Because of the stubs, the
modules stay opero's own: a host program that imports twat-cache gets another copy, as it is.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Final

__all__ = ["unnoticed"]

_NAME: Final = "twat_cache"
_UNUSED: Final = {
    "aiocache": "AioCacheEngine",
    "cachebox": "CacheBoxEngine",
    "cachetools": "CacheToolsEngine",
    "functools": "FunctoolsCacheEngine",
    "joblib": "JoblibEngine",
    "klepto": "KleptoEngine",
}
"""Engines that are not imported: module and class."""

_lock = threading.RLock()
_ours: Final[dict[str, ModuleType]] = {}


@contextmanager
def unnoticed() -> Iterator[None]:
    """Return a block in which twat-cache can be imported; do nothing else in it.

    Example:
        >>> with unnoticed():
        ...     from twat_cache.engines.diskcache import DiskCacheEngine
    """
    with _lock:
        apart = _NAME not in sys.modules
        if apart:
            sys.modules.update(_ours or _stubs())
        try:
            # The filters belong to the whole process, so they are touched as briefly as can be.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            if apart:
                for name in [*sys.modules]:
                    if name.partition(".")[0] == _NAME:
                        _ours[name] = sys.modules.pop(name)


def _stubs() -> dict[str, ModuleType]:
    """Return modules that take the place of the real ones."""
    logger = import_module("loguru").logger
    logger.disable(_NAME)
    made = [_stub("logging", "Logging as it should be: the program's own.", logger=logger)]
    made += [
        _stub(f"engines.{module}", "Nothing of it is used.", **{engine: type(engine, (), {})})
        for module, engine in _UNUSED.items()
    ]
    return {stub.__name__: stub for stub in made}


def _stub(name: str, about: str, **holds: object) -> ModuleType:
    stub = ModuleType(f"{_NAME}.{name}", about)
    vars(stub).update(holds)
    return stub
