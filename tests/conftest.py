# this_file: tests/conftest.py
"""What the whole suite shares: a clean environment, `cleanup.py` as a module, sync and async functions, a clock."""

from __future__ import annotations

import asyncio
import functools
import gc
import importlib.util
import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from opero.testing import FakeClock

# A developer's own switch must not turn off what is under test.
os.environ.pop("OPERO_DISABLE", None)

# A shell that starts the suite in the background has it ignore Ctrl-C, which some tests send to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Shared machines stall: pytest-timeout guards against hangs, hypothesis need not judge speed. Everybody gets the same
# examples, so that a run fails only because of a change; `cleanup.py test --all` draws new and more ones.
_patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", _patient, derandomize=True, max_examples=60)
settings.register_profile("drawn", _patient, max_examples=200)
settings.load_profile("same")


_PROGRAMS = ("caching/stores", "concurrency", "durable")
"""Folders whose tests start programs, which takes its time on a busy machine."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Be patient with tests and documents that start programs."""
    here = Path(__file__).parent
    folders = tuple(f"{here / name}{os.sep}" for name in _PROGRAMS)
    for item in items:
        path = str(item.path)  # as text: there are ten thousand items
        patient = path.startswith(folders) or path.endswith(".md")
        if patient and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="module", autouse=True)
def _places() -> Iterator[None]:
    """Stores that a module has opened are closed and forgotten with it: their servers and folders may be gone.

    What is left then, mostly imported modules, stays: the collections that tests ask for need not look at it again.
    """
    yield
    stores = sys.modules.get("opero.caching.stores.base")
    if stores is not None:
        for store in stores.open_stores():
            store.close()
        stores._opened.clear()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def cleanup(root: Path) -> ModuleType:
    """`cleanup.py`, imported."""
    spec = importlib.util.spec_from_file_location("cleanup", root / "cleanup.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Face:
    """One of the two ways to define and to call a function."""

    def __init__(self, *, asynchronous: bool) -> None:
        self.asynchronous = asynchronous

    def of(self, body: Callable[..., Any]) -> Callable[..., Any]:
        """Return `body`, or a coroutine function with its signature that calls it."""
        if not self.asynchronous:
            return body

        @functools.wraps(body)
        async def twin(*args: Any, **kwargs: Any) -> Any:
            return body(*args, **kwargs)

        del twin.__wrapped__  # type: ignore[attr-defined]  # opero shall see the twin itself
        twin.__signature__ = inspect.signature(body)  # type: ignore[attr-defined]  # read by inspect
        return twin

    def run(self, begin: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call, and in the asynchronous face run the event loop until it is done."""
        begun = begin(*args, **kwargs)
        return asyncio.run(begun) if self.asynchronous else begun


@pytest.fixture(params=["sync", "async"])
def face(request: pytest.FixtureRequest) -> Face:
    """Both faces, one after the other."""
    return Face(asynchronous=request.param == "async")


@pytest.fixture
def clock() -> Iterator[FakeClock]:
    """A clock on which no pause takes time."""
    from opero.testing import fake_clock

    with fake_clock() as clock:
        yield clock
