# this_file: src/opero/core/cache/stores/guest.py
"""twat-cache, let in through a side door: importing it must not be noticed by the host program.

Its own module `twat_cache.logging` removes every sink of the program's loguru logger and adds one
of its own, its models warn about pydantic, and a missing platformdirs makes it write to stderr. So a
stub takes the place of that module, loguru is told to ignore the package, and warnings are held
back while it is imported.
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
_LOGGING: Final = "twat_cache.logging"
_lock = threading.RLock()


@contextmanager
def unnoticed() -> Iterator[None]:
    """Return a block in which twat-cache can be imported; do nothing else in it.

    Example:
        >>> with unnoticed():
        ...     from twat_cache.engines.diskcache import DiskCacheEngine
    """
    with _lock:
        if _NAME not in sys.modules:
            sys.modules[_LOGGING] = _silent_logging()
        # The filters belong to the whole process, so they are touched as briefly as can be.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield


def _silent_logging() -> ModuleType:
    """Return a module with the program's own loguru logger, which it leaves as it is."""
    logger = import_module("loguru").logger
    logger.disable(_NAME)
    stub = ModuleType(_LOGGING, "Logging as it should be: the program's own.")
    stub.__dict__["logger"] = logger
    return stub
