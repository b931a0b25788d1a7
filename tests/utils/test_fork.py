# this_file: tests/utils/test_fork.py
"""Functions and objects that are reset in forked child processes."""

from __future__ import annotations

import os
import sys

import pytest

from opero.utils import fork

pytestmark = [
    pytest.mark.internal,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system"),
]


class Thing:
    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def after_fork(self) -> None:
        self.calls.append("object")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(fork, "_functions", [])
    return []


def test_functions_run_in_order_then_objects(calls: list[str]) -> None:
    fork.run_after_fork(lambda: calls.append("first"))
    fork.run_after_fork(lambda: calls.append("second"))
    thing = Thing(calls)
    fork.reset_after_fork(thing)
    fork._in_child()
    assert calls == ["first", "second", "object"]


def test_an_object_is_held_weakly(calls: list[str]) -> None:
    thing = Thing(calls)
    fork.reset_after_fork(thing)
    del thing
    fork._in_child()
    assert calls == []


def test_an_error_is_reported_and_the_others_run(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)

    @fork.run_after_fork
    def broken() -> None:
        raise OSError("broken")

    fork.run_after_fork(lambda: calls.append("next"))
    fork._in_child()
    assert calls == ["next"]
    assert [(type(one.exc_value), one.object) for one in seen] == [(OSError, broken)]


def test_a_forked_child_runs_the_functions(calls: list[str]) -> None:
    reading, writing = os.pipe()
    fork.run_after_fork(lambda: os.write(writing, b"child"))
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b"child"
