# this_file: tests/core/conftest.py
"""What the tests of the stages share: one body for plain and for coroutine functions."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from opero.testing import FakeClock, fake_clock


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
    with fake_clock() as clock:
        yield clock
