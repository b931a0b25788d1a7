# this_file: tests/concurrency/test_mapper.py
"""Where items run: the choice, and what is refused there."""

from __future__ import annotations

from typing import Any

import pytest

from opero import operomap
from opero.concurrency.mapper import choose_mode
from opero.core.options import MODES, MapOptions
from opero.errors import OperoUsageError

pytestmark = pytest.mark.internal

HERE = {"sync": "thread", "async": "async"}


@pytest.mark.parametrize(
    ("mode", "of_sync", "of_async"),
    [
        ("auto", "process", "async"),
        ("process", "process", "process"),
        ("thread", "thread", "thread"),
        ("async", "thread", "async"),
        ("async_process", "process", "async_process"),
    ],
)
def test_each_mode_means_something_for_sync_and_async(
    mode: Any, of_sync: str, of_async: str
) -> None:
    options = MapOptions(mode=mode)
    assert choose_mode(options, awaits=False) == of_sync
    assert choose_mode(options, awaits=True) == of_async


@pytest.mark.parametrize("mode", MODES)
def test_debugging_wins_over_every_mode(mode: Any) -> None:
    options = MapOptions(mode=mode, sequential=True)
    assert choose_mode(options, awaits=False) == choose_mode(options, awaits=True) == "sequential"


@pytest.mark.parametrize("mode", MODES)
def test_recorded_maps_stay_in_this_process(mode: Any) -> None:
    options = MapOptions(mode=mode)
    assert choose_mode(options, awaits=False, recorded=True) == "thread"
    assert choose_mode(options, awaits=True, recorded=True) == "async"


CARE: list[tuple[str, Any]] = [
    ("worker_init", print),
    ("max_tasks_per_worker", 5),
    ("start_method", "spawn"),
    ("memory_limit", "1GB"),
]


@pytest.mark.parametrize(("option", "value"), CARE)
def test_care_of_processes_is_refused_where_there_are_none(option: str, value: Any) -> None:
    with pytest.raises(OperoUsageError, match=f'{option}=.*runs in threads.*mode="process"'):
        operomap(mode="thread", **{option: value})(lambda x: x)


@pytest.mark.parametrize(("option", "value"), CARE)
def test_options_of_workers_are_accepted_with_sequential(option: str, value: Any) -> None:
    double = operomap(sequential=True, mode="process", **{option: value})(lambda x: 2 * x)
    assert double([2]) == [4]


@pytest.mark.parametrize("mode", ["process", "async_process"])
def test_explain_names_where_items_run(mode: Any) -> None:
    async def fetch(x: int) -> int:
        return x

    assert "3 processes" in str(operomap(mode=mode, workers=3)(fetch).explain())
