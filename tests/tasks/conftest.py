# this_file: tests/tasks/conftest.py
"""What the tests of tasks share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from opero.events import Event, TaskChanged
from opero.testing import capture_events


class Received:
    """The task events of a block."""

    def __init__(self, events: list[Event]) -> None:
        self.events: list[Any] = events

    def states(self, name: str | None = None) -> list[str]:
        """Names of the states, in order; of one task if it is named."""
        return [e.state.name for e in self.events if name in (None, e.name)]

    def of(self, name: str) -> list[Any]:
        """Events of the task of that name."""
        return [e for e in self.events if e.name == name]


@pytest.fixture
def received() -> Iterator[Received]:
    """Listens for task events."""
    with capture_events(TaskChanged) as events:
        yield Received(events)


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until something is so."""
    while not condition():  # noqa: ASYNC110 - what is waited for sets no event
        await asyncio.sleep(0.001)
