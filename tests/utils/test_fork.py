# this_file: tests/utils/test_fork.py
"""State is reset in forked children, once, in order, and whatever one of the functions raises."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import pytest

from opero.utils import fork

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is needed")


def in_child(report: Callable[[], str]) -> str:
    """Return what a forked child reports."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(writing, report().encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading) as stream:
        return stream.read()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(fork, "_functions", [])
    return []


def test_functions_run_in_the_child_only_and_in_order(calls: list[str]) -> None:
    for name in "abc":
        fork.run_after_fork(lambda name=name: calls.append(name))  # type: ignore[misc]
    assert in_child(lambda: "".join(calls)) == "abc"
    assert calls == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_failing_function_does_not_keep_the_others_from_running(calls: list[str]) -> None:
    fork.run_after_fork(lambda: 1 / 0)
    fork.run_after_fork(lambda: calls.append("after"))
    assert in_child(lambda: "".join(calls)) == "after"


def test_object_is_reset_while_it_lives_and_is_not_kept_alive(calls: list[str]) -> None:
    class Thing:
        def after_fork(self) -> None:
            calls.append("reset")

    thing = Thing()
    fork.reset_after_fork(thing)
    assert in_child(lambda: "".join(calls)) == "reset"
    del thing
    gc.collect()
    assert in_child(lambda: "".join(calls)) == ""
