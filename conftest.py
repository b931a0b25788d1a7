# this_file: conftest.py
"""README and docs are executed: Python blocks run, a block marked `output` is what the one before has printed."""

from __future__ import annotations

import gc
import io
import os
import re
import tempfile
from contextlib import redirect_stdout

import pytest
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

# Neither a test nor a document writes into the developer's own cache or configuration.
_home = tempfile.TemporaryDirectory(prefix="opero-tests-")
os.environ["OPERO_CACHE_DIR"] = os.path.join(_home.name, "cache")  # noqa: PTH118 - text
os.environ["XDG_CONFIG_HOME"] = os.path.join(_home.name, "config")  # noqa: PTH118 - text

_run = PythonEvaluator()


def run_python(example: Example) -> None:
    """Run a block in the document's namespace and keep what it prints."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        _run(example)
    example.namespace["__printed__"] = printed.getvalue()


def compare_output(example: Example) -> None:
    """Compare with what the block before has printed; times and drawn pauses may differ."""

    def without_times(text: str) -> str:
        # A pause of 9.8 s is written "10 s" where nothing went by between failure and call.
        return re.sub(r"\d+(\.\d+|(?= (m?s|min|h)\b))", "#", text).strip()

    printed, written = example.namespace["__printed__"], str(example.parsed)
    if without_times(printed) != without_times(written):
        raise AssertionError(f"printed:\n{printed}\nwritten:\n{written}")


pytest_collect_file = Sybil(
    parsers=[
        CodeBlockParser(language="python", evaluator=run_python),
        CodeBlockParser(language="output", evaluator=compare_output),
    ],
    patterns=["README.md", "docs/*.md"],
).pytest()


_LONG = (
    *("test_map_leases.py", "test_lease.py", "test_examples.py", "test_processes.py"),
    *("test_recover.py", "test_disk.py", "test_checkpoint.py"),
)
"""Files whose tests wait for processes, leases and examples. They begin first: none is left for the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse names with addresses: every worker must find the same tests, in the same order."""
    items.sort(key=lambda item: item.path.name not in _LONG)
    drifting = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if drifting:
        raise pytest.UsageError(f"give these tests names (ids=) without addresses: {drifting}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One worker more than processors: many tests wait for processes and servers."""
    return (os.cpu_count() or 1) + 1


def pytest_collection() -> None:
    """Collect no garbage while modules and thousands of tests are made, which all stay."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Let the collections that tests ask for pass over what is there before the first of them."""
    gc.enable()
    gc.collect()
    gc.freeze()
