# this_file: tests/durable/conftest.py
"""What the tests of workflows share."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import opero
from opero.durable import Orchestrator, get_registry


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """Each test has names of its own."""
    workflows = get_registry().workflows
    before = dict(workflows)
    workflows.clear()
    yield
    workflows.clear()
    workflows.update(before)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


@pytest.fixture
def orchestrator(journal: Path) -> Iterator[Orchestrator]:
    with Orchestrator(journal) as made:
        yield made


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a program in a process of its own; it is killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(source: str, *args: Any) -> subprocess.Popen[str]:
        path = tmp_path / "program.py"
        text = textwrap.dedent(source)
        # One that runs may just be reading it.
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        command = [sys.executable, "-W", "error", str(path), *map(str, args)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(opero.__file__).parents[1])},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def until() -> Callable[..., None]:
    """Wait until something holds."""

    def wait(holds: Callable[[], object], seconds: float = 100) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.01)

    return wait
