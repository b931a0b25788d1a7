# this_file: tests/concurrency/test_map_options.py
"""Every option of a map: what it refuses and what it takes."""

from __future__ import annotations

import asyncio
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.tables import rows

from opero import operomap
from opero.core.options import MapOptions, Options
from opero.errors import OperoUsageError

pytestmark = pytest.mark.internal

NAMES = [name for name in MapOptions.declared if name not in Options.declared]


EXECUTOR = ThreadPoolExecutor(1)


async def later(*given: object) -> None: ...


WRONG: dict[str, list[Any]] = {
    "mode": ["proces", "", None, 1],
    "workers": [0, -1, 1.5, "4", True, None],
    "ordered": [None, 1],
    "progress": [None, 1, "tqdm"],
    "on_error": ["ignore", None, True],
    "max_errors": [0, -1, 1.0, 1.5, 0.0, math.nan, True, "5"],
    "chunksize": [0, None, "big", 1.5, True],
    "executor": [5, "thread", ThreadPoolExecutor],
    "sequential": [None, 1],
    "item_key": [5, "id", later],
    "checkpoint": [5, "", "folder/", True, b"run.db"],
    "worker_init": [5, "x", later],
    "max_tasks_per_worker": [0, -1, 1.5, "5", True],
    "start_method": ["thread", "", 1, True],
    "memory_limit": [0, -1, 1.5, "big", True],
    "on_result": [5, later],
    "stop_token": [5, True, "x", threading.Event],
    "stop_on": [5, "OSError", (OSError, 5), None],
}

RIGHT: dict[str, list[Any]] = {
    "mode": ["auto", "process", "thread", "async", "async_process"],
    "workers": [1, 10_000],
    "ordered": [True, False],
    "progress": [True, False, "rich"],
    "on_error": ["raise", "return", "skip"],
    "max_errors": [None, 1, 100, 0.1, 0.999],
    "chunksize": ["auto", 1, 5000],
    "executor": [None, EXECUTOR],
    "sequential": [True, False],
    "item_key": [None],
    "checkpoint": [None, "run.db", Path("run.db")],
    "worker_init": [None, print],
    "max_tasks_per_worker": [None, 1, 10**6],
    "start_method": [None, "fork", "forkserver", "spawn"],
    "memory_limit": [None, 2**30, "500MB", "2GiB"],
    "on_result": [None, print],
    "stop_token": [None, threading.Event(), asyncio.Event()],
    "stop_on": [(), OSError, (OSError, KeyError)],
}


def each(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in table.items() for value in values]


def test_the_tables_leave_no_option_out() -> None:
    assert set(WRONG) == set(RIGHT) == set(NAMES)


@rows(("name", "value"), each(WRONG))
def test_a_wrong_value_is_refused_before_there_is_a_function(name: str, value: Any) -> None:
    with pytest.raises(OperoUsageError) as raised:
        operomap(**{name: value})
    message = str(raised.value)
    assert message.startswith(f"{name}={value!r}")
    assert len(message) > len(f"{name}={value!r}") + 15, "it tells the fix"


@rows(("name", "value"), each(RIGHT))
def test_a_right_value_is_taken_as_it_is(name: str, value: Any) -> None:
    @operomap(**{name: value})
    def fetch(x: int) -> int:
        return x

    assert getattr(fetch.options, name) is value


def test_all_options_of_opero_come_first() -> None:
    assert list(MapOptions.declared)[: len(Options.declared)] == list(Options.declared)


def test_every_option_has_a_meaning_and_a_check() -> None:
    for name, option in MapOptions.declared.items():
        assert f"{name}: " in (MapOptions.__doc__ or "") + (Options.__doc__ or "")
        option.check(name, option.default)


@pytest.mark.parametrize(
    ("wrong", "meant"), [("worker", "workers"), ("on_eror", "on_error"), ("retires", "retries")]
)
def test_an_unknown_option_is_met_with_the_nearest_known_one(wrong: str, meant: str) -> None:
    with pytest.raises(TypeError, match=rf"operomap\(\) has no option '{wrong}'.*'{meant}'"):
        operomap(**{wrong: 1})


def test_a_mistyped_mode_is_met_with_the_nearest() -> None:
    with pytest.raises(OperoUsageError, match="Did you mean 'thread'"):
        operomap(mode="threads")  # type: ignore[arg-type]


def test_two_answers_to_one_question_are_refused() -> None:
    with pytest.raises(OperoUsageError, match=r"executor=.* and so does mode='thread'"):
        operomap(mode="thread", executor=EXECUTOR)
    with pytest.raises(OperoUsageError, match=r'item_key=.*give checkpoint="run.db"'):
        operomap(item_key=str)
