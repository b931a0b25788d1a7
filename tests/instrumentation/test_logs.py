# this_file: tests/instrumentation/test_logs.py
"""Events as log lines, in loguru and in the standard library."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from loguru import logger as loguru_logger

from opero import opero
from opero.errors import OperoUsageError
from opero.events import CallEnded, EventBus, RetryScheduled, event_bus
from opero.instrumentation import log_events
from opero.testing import flaky
from opero.utils import configure_logging


@pytest.fixture
def received() -> Iterator[list[Any]]:
    """What a sink of the program gets."""
    lines: list[Any] = []
    sink = loguru_logger.add(lines.append, level="DEBUG", format="{level}|{name}|{message}")
    yield lines
    loguru_logger.remove(sink)
    configure_logging(None)


def call() -> None:
    opero(cache=False, min_delay=0, jitter=False)(flaky("ok", failures=1))()


def test_opero_logs_nothing_by_default(received: list[Any]) -> None:
    call()
    assert received == []


def test_configure_logging_writes_to_loguru(received: list[Any]) -> None:
    configure_logging("INFO")
    call()
    (failed, retry) = received
    assert failed.startswith("WARNING|opero.instrumentation.logs|flaky: attempt 1 failed with Conn")
    assert retry == "INFO|opero.instrumentation.logs|flaky: attempt 2 in 0 s\n"
    assert isinstance(retry.record["extra"]["event"], RetryScheduled)


def test_configure_logging_replaces_and_none_silences(received: list[Any]) -> None:
    configure_logging("DEBUG")
    configure_logging("WARNING")
    call()
    assert [line.split("|")[0] for line in received] == ["WARNING"]
    configure_logging(None)
    call()
    assert len(received) == 1
    assert not event_bus.active


def test_loguru_can_disable_opero_and_configure_logging_enables_it(received: list[Any]) -> None:
    with log_events(level="INFO"):
        loguru_logger.disable("opero")
        call()
    assert received == []
    with log_events(level="INFO"):
        call()
    assert len(received) == 2


def test_sinks_are_neither_added_nor_removed(received: list[Any]) -> None:
    before = repr(loguru_logger)
    configure_logging("DEBUG")
    call()
    configure_logging(None)
    assert repr(loguru_logger) == before


@pytest.mark.parametrize("by_name", [True, False])
def test_a_logger_of_the_standard_library_will_do(
    by_name: bool, caplog: pytest.LogCaptureFixture
) -> None:
    to: Any = "shop" if by_name else logging.getLogger("shop")
    with caplog.at_level(logging.DEBUG, "shop"), log_events(to, level=logging.INFO):
        call()
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"]
    assert caplog.records[1].getMessage() == "flaky: attempt 2 in 0 s"


def test_a_bus_and_types_can_be_chosen(caplog: pytest.LogCaptureFixture) -> None:
    bus = EventBus()
    with caplog.at_level(logging.DEBUG), log_events("shop", types=[RetryScheduled], bus=bus):
        bus.emit(RetryScheduled(function="f", attempt=2, delay=1.0))
        bus.emit({"type": "other"})
        call()
    assert [r.getMessage() for r in caplog.records] == ["f: attempt 2 in 1 s"]


def test_messages_of_errors_are_shown_on_request_only(caplog: pytest.LogCaptureFixture) -> None:
    fetch = opero(cache=False, retries=0)(flaky("ok", failures=9, error=ValueError("hunter2")))
    with (
        caplog.at_level(logging.DEBUG),
        log_events("shop", types=[CallEnded]),
        pytest.raises(ValueError, match="hunter2"),
    ):
        fetch()
    assert "hunter2" not in caplog.text
    with (
        caplog.at_level(logging.DEBUG),
        log_events("shop", messages=True),
        pytest.raises(ValueError, match="hunter2"),
    ):
        fetch()
    assert "ValueError: hunter2" in caplog.text


def test_an_unknown_level_is_met_with_the_nearest() -> None:
    with pytest.raises(OperoUsageError, match=r"level='warn' is no level\. Did you mean 'WARNING'"):
        configure_logging("warn")
    assert not event_bus.active


def test_importing_opero_does_not_load_loguru() -> None:
    code = (
        "import sys, opero; opero.opero(lambda: 1)(); from opero.utils import configure_logging; "
        "import opero.instrumentation.logs; assert 'loguru' not in sys.modules; "
        "configure_logging(); assert 'loguru' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
