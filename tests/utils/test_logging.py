# this_file: tests/utils/test_logging.py
"""Loggers with context: which lines have which context."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from opero import ContextAdapter, get_logger, log_context


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def reported(self) -> list[str]:
        return [record.getMessage() for record in self.records]


@pytest.fixture
def lines() -> Iterator[Lines]:
    lines = Lines()
    logger = logging.getLogger("my_app")
    logger.addHandler(lines)
    yield lines
    logger.removeHandler(lines)
    logger.filters.clear()
    logger.setLevel(logging.NOTSET)


def test_the_document_runs_as_written(lines: Lines) -> None:
    logger = ContextAdapter(get_logger("my_app", level=logging.DEBUG))
    logger.add_context(service="api_service", version="1.0.0")
    logger.info("Starting service")
    with log_context(logger, operation="batch_process", batch_id="123"):
        logger.info("Starting batch processing")
        logger.info("Completed batch processing")
    logger.info("Continuing with other operations")
    service = "service=api_service version=1.0.0"
    assert lines.reported == [
        f"Starting service [{service}]",
        f"Starting batch processing [{service} operation=batch_process batch_id=123]",
        f"Completed batch processing [{service} operation=batch_process batch_id=123]",
        f"Continuing with other operations [{service}]",
    ]


def test_a_logger_gets_a_level_and_no_handler() -> None:
    logger = get_logger("quiet_app", level="WARNING")
    assert logger is logging.getLogger("quiet_app")
    assert logger.level == logging.WARNING
    assert logger.handlers == []
    assert get_logger("quiet_app").level == logging.WARNING
    with pytest.raises(ValueError, match="LOUD"):
        get_logger("quiet_app", level="LOUD")


def test_context_reaches_a_plain_logger_and_the_record(lines: Lines) -> None:
    logger = get_logger("my_app", level=logging.DEBUG)
    with log_context(logger, batch=1):
        logger.info("works")
    logger.info("rests")
    assert lines.reported == ["works [batch=1]", "rests"]
    assert lines.records[0].context == {"batch": 1}  # type: ignore[attr-defined]


def test_an_adapters_context_can_be_changed_and_removed(lines: Lines) -> None:
    logger = ContextAdapter(get_logger("my_app", level=logging.DEBUG), {"a": 1})
    logger.add_context(b=2)
    logger.add_context(a=3)
    logger.info("three, two")
    logger.remove_context("a", "unknown")
    logger.info("two")
    assert logger.context == {"b": 2}
    assert repr(logger) == "<ContextAdapter my_app [b=2]>"
    logger.remove_context()
    logger.info("none")
    assert lines.reported == ["three, two [a=3 b=2]", "two [b=2]", "none"]
    assert repr(logger) == "<ContextAdapter my_app>"


def test_inner_context_takes_precedence(lines: Lines) -> None:
    logger = ContextAdapter(get_logger("my_app", level=logging.DEBUG), {"who": "adapter", "a": 1})
    with log_context(logger, who="outer", b=2):
        with log_context(logger, who="inner"):
            logger.info("1")
        logger.info("2")
    logger.info("3", extra={"context": {"who": "line"}, "other": 5})
    assert lines.reported == ["1 [who=inner a=1 b=2]", "2 [who=outer a=1 b=2]", "3 [who=line a=1]"]
    assert lines.records[2].other == 5  # type: ignore[attr-defined]


def test_arguments_and_percent_signs_are_no_trouble(lines: Lines) -> None:
    logger = ContextAdapter(get_logger("my_app", level=logging.DEBUG), {"done": "50%"})
    logger.info("%s of %d", "one", 2)
    logger.info("100%")
    assert lines.reported == ["one of 2 [done=50%]", "100% [done=50%]"]


def test_a_line_names_the_place_where_it_was_written(lines: Lines) -> None:
    ContextAdapter(get_logger("my_app", level=logging.DEBUG), {"a": 1}).warning("here")
    assert lines.records[0].funcName == "test_a_line_names_the_place_where_it_was_written"


def test_a_record_context_of_other_code_is_not_changed(lines: Lines) -> None:
    logger = get_logger("my_app", level=logging.DEBUG)
    with log_context(logger, a=1):
        logger.info("works", extra={"context": "theirs"})
    assert lines.reported == ["works"]


def test_work_at_the_same_time_does_not_see_the_context_of_others(lines: Lines) -> None:
    logger = get_logger("my_app", level=logging.DEBUG)

    async def work(n: int) -> None:
        with log_context(logger, n=n):
            await asyncio.sleep(0)
            logger.info("task")
            await asyncio.to_thread(logger.info, "thread")

    async def main() -> None:
        await asyncio.gather(work(1), work(2))
        logger.info("main")

    asyncio.run(main())
    assert sorted(lines.reported) == [
        "main",
        "task [n=1]",
        "task [n=2]",
        "thread [n=1]",
        "thread [n=2]",
    ]


def test_a_thread_with_a_copy_of_the_context_has_it_too(lines: Lines) -> None:
    logger = get_logger("my_app", level=logging.DEBUG)
    with log_context(logger, n=1):
        copied = contextvars.copy_context()
        thread = threading.Thread(target=copied.run, args=(logger.info, "copied"))
        thread.start()
        thread.join()
    assert lines.reported == ["copied [n=1]"]


def test_a_level_that_is_off_formats_nothing(lines: Lines) -> None:
    class Loud:
        def __str__(self) -> str:
            raise AssertionError("formatted")

    logger = ContextAdapter(get_logger("my_app", level=logging.WARNING), {"a": Loud()})
    logger.info("%s", Loud())
    assert lines.reported == []


def test_context_belongs_to_one_logger(lines: Lines) -> None:
    with log_context(get_logger("another_app"), a=1):
        get_logger("my_app", level=logging.DEBUG).info("mine")
    assert lines.reported == ["mine"]


def test_an_error_in_the_block_takes_the_context_away(lines: Lines) -> None:
    logger: Any = get_logger("my_app", level=logging.DEBUG)
    with pytest.raises(KeyError), log_context(logger, a=1):
        raise KeyError
    logger.info("after")
    assert lines.reported == ["after"]
