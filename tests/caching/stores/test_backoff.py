# this_file: tests/caching/stores/test_backoff.py
"""A server that does not answer is left alone, and asked again by one caller at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from opero.caching.stores.base import Backoff
from opero.errors import StoreError

if TYPE_CHECKING:
    from opero.testing import FakeClock

pytestmark = pytest.mark.internal


def pause_after(failures: int) -> float:
    rest = Backoff()
    rest.failures = failures
    return rest.pause


def refused(rest: Backoff) -> bool:
    try:
        rest.check()
    except StoreError as error:
        return str(error) == "down"
    return False


def test_one_caller_tries_when_the_pause_is_over(clock: FakeClock) -> None:
    rest = Backoff()
    assert not refused(rest)
    rest.failed("down")
    assert refused(rest)
    clock.sleep(1)
    assert [refused(rest) for _ in range(3)] == [False, True, True]


def test_a_caller_that_vanishes_does_not_keep_the_others_out(clock: FakeClock) -> None:
    rest = Backoff()
    rest.failed("down")
    clock.sleep(1)
    assert not refused(rest)
    clock.sleep(1)
    assert not refused(rest)


def test_pauses_grow_up_to_a_bound_and_end_with_an_answer(clock: FakeClock) -> None:
    rest = Backoff()
    for failures in range(1, 2000):
        rest.failed("down")
        pause = pause_after(failures)
        assert pause <= 15
        clock.sleep(pause - 0.001)
        assert refused(rest)
        clock.sleep(0.002)
        assert not refused(rest)
    rest.over()
    assert not refused(rest)
    rest.failed("down")
    clock.sleep(1)
    assert not refused(rest)


@pytest.mark.parametrize("failures", range(1, 12))
def test_pauses_never_shrink(failures: int) -> None:
    assert pause_after(failures + 1) >= pause_after(failures)
