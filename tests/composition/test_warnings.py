# this_file: tests/composition/test_warnings.py
"""Warnings point at the user's own line, whichever stage they come from."""

from __future__ import annotations

import math
from typing import Any

import pytest

from opero import opero
from opero.errors import OperoWarning
from opero.testing import flaky


def broken(*_: Any) -> bool:
    raise ZeroDivisionError


def test_a_broken_predicate_is_reported_at_the_call() -> None:
    fetch = opero(cache=False, retry_on=broken, min_delay=0)(flaky("ok", failures=1))
    with (
        pytest.warns(OperoWarning, match="broken raised ZeroDivisionError") as caught,
        pytest.raises(ConnectionError),
    ):
        fetch()
    assert caught[0].filename == __file__


def test_a_broken_wait_strategy_is_reported_at_the_call() -> None:
    fetch = opero(cache=False, wait=broken, min_delay=0)(flaky("ok", failures=1))
    with pytest.warns(OperoWarning, match="wait strategy raised ZeroDivisionError") as caught:
        assert fetch() == "ok"
    assert caught[0].filename == __file__


def test_a_wait_that_does_not_end_is_reported_and_replaced() -> None:
    fetch = opero(cache=False, wait=lambda state: math.inf, min_delay=0)(flaky("ok", failures=1))
    text = "the wait strategy raised ValueError: the usual pauses are used instead$"
    with pytest.warns(OperoWarning, match=text):
        assert fetch() == "ok"


def test_a_broken_stop_strategy_is_reported_and_ends_the_attempts() -> None:
    fetch = opero(cache=False, stop=broken, min_delay=0)(flaky("ok", failures=1))
    text = "the stop strategy raised ZeroDivisionError: no more attempts are made"
    with pytest.warns(OperoWarning, match=text), pytest.raises(ConnectionError):
        fetch()


def test_a_broken_cache_if_is_reported_and_stores_nothing() -> None:
    @opero(cache_if=lambda result: True)  # it takes the receipt, too
    def fetch() -> str:
        return "ok"

    for _ in range(2):
        with pytest.warns(OperoWarning, match="cache_if raised TypeError") as caught:
            assert fetch() == "ok"
        assert caught[0].filename == __file__
    assert fetch.stats.calls == 2
