# this_file: tests/composition/test_switched_off.py
"""`opero.testing` and `OPERO_DISABLE=1`: one call, no waits, no caches."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from opero import opero
from opero.testing import FakeClock, flaky, is_disabled, set_disabled

SCRIPT = """
import time
from opero import opero
from opero.testing import flaky, is_disabled, set_disabled

def calls_of(body, **options):
    fetch = opero(min_delay=0, **options)(body)
    for _ in range(2):
        try:
            fetch()
        except ConnectionError:
            pass
    return body.calls

print(is_disabled(), calls_of(flaky("never", failures=9)), calls_of(flaky("fine", failures=0)))
with set_disabled(False):
    print(is_disabled(), calls_of(flaky("never", failures=9)), calls_of(flaky("fine", failures=0)))
"""


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("1", ["True", "2", "2", "False", "8", "1"]),
        ("true", ["True", "2", "2", "False", "8", "1"]),
        ("0", ["False", "8", "1", "False", "8", "1"]),
        ("", ["False", "8", "1", "False", "8", "1"]),
    ],
)
def test_the_environment_switches_off(value: str, said: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "OPERO_DISABLE": value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == said


def test_nothing_waits_and_nothing_is_cached(face: Any, clock: FakeClock) -> None:
    body = flaky("fine", failures=0)
    fetch = opero(rate_limit="1/minute")(face.of(lambda x: body()))
    with set_disabled():
        for _ in range(4):
            assert face.run(fetch, 1) == "fine"
    assert (body.calls, clock.sleeps, clock.elapsed) == (4, [], 0)


def test_what_was_cached_before_is_there_again_afterwards(face: Any) -> None:
    body = flaky("fine", failures=0)
    fetch = opero(face.of(lambda x: body()))
    face.run(fetch, 1)
    with set_disabled():
        face.run(fetch, 1)
    face.run(fetch, 1)
    assert body.calls == 2


def test_a_rejected_result_is_returned_at_once(face: Any) -> None:
    body = flaky("fine", failures=0)
    fetch = opero(cache=False, retry_if_result=lambda r: True)(face.of(body))
    with set_disabled():
        receipt = face.run(fetch.call)
    assert (receipt.value, receipt.rejected, body.calls) == ("fine", True, 1)


def test_blocks_may_be_nested() -> None:
    with set_disabled():
        with set_disabled(False):
            assert not is_disabled()
        assert is_disabled()
    assert not is_disabled()
