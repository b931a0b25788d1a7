# this_file: tests/examples/test_examples.py
"""Every example runs, warns of nothing, and prints what its page promises."""

from __future__ import annotations

import doctest
import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Some start several interpreters, which takes its time on a busy machine.
pytestmark = pytest.mark.timeout(120)

KEY_LINES = {
    "01_first_call.py": [
        "without opero: ConnectionError",
        "with opero: Lisbon: 22 °C and sunny",
        "(from the cache)",
        "2 attempts, 2 calls",
        "one of 4 failures",
        "explain():",
    ],
    "02_async_twin.py": [
        "still a coroutine function: True",
        "came from 'small'; models asked: big, small",
        "10 equal questions at once: 1 answer, models asked: big, small",
        "cancelled during an hour's pause: gone after ",
    ],
    "03_shared_rate_limit.py": ["details(fox)", "search(fox)", "12 calls in "],
    "04_cache_rules.py": [
        "rate(1.0), rate(amount=1.0), rate(1.0, 'EUR'): rate(1.0, 'EUR')\n",
        "rate(1): 1 and 1.0 are equal but not the same rate(1, 'EUR')\n",
        "rate(1.0, 'XYZ') twice: None is a hit rate(1.0, 'XYZ')\n",
        "basket('ada') after appending to the last: ['apple'] basket('ada')\n",
        "gets another chance: live price('tea'), guess price('tea')\n",
        "fetch('/a', session) with two sessions: fetch('/a')\n",
        "after rate.cache.invalidate(1.0): rate(1.0, 'EUR')\n",
        "after rate.cache.clear(): rate(1.0, 'EUR'), rate(1, 'EUR')\n",
    ],
    "05_one_429.py": [
        "51 calls for 50 callers, 1 of them refused",
        "calls in the 0.6 s that the server asked for: 0",
    ],
    "06_breaker_strip.py": [
        "✗✗✗",
        "of 70 callers 4 met the dead backend",
        "closed → open, again in 0.2 s",
        "half-open → open, again in 0.4 s",
        "half-open → closed",
        "<CircuitBreaker 'price' closed>",
    ],
    "07_paid_batch.py": [
        "run 1: 0 documents found",
        "0 of them for finished documents; killed",
        "0 of them for finished documents; reached the end",
        "500 documents, 50",
        "Finished calls that were repeated: 0",
    ],
    "08_two_thousand_requests.py": [
        "✓ thread: no page was lost: 200 pages",
        "✓ async: at most what was on its way was asked for twice",
        "✓ process: the quota turned away",
        "9 of 9 claims hold",
    ],
    "09_crashing_item.py": [
        "57 of 60 counts arrived, the last is 1438\n",
        "item 7: WorkerLostError after 2 attempts\n",
        "item 19: CallTimeoutError after 2 attempts\n",
        "item 23: MemoryError after 2 attempts\n",
        "none of them was this one: True\n",
        "retries heard of here: 3\n",
        "TypeError in count_primes()",
    ],
    "11_recovery.py": [
        "the first program was killed: True",
        "it has called: fetch(shop), charge(tea), charge(cocoa)",
        "its workflow is still 'processing':",
        "step 3 charge done",
        "the second program has called: charge(cocoa)\n",
        "result: [('tea', 3), ('cocoa', 5)], tuples and all",
        "step 6 now done",
    ],
    "10_tasks.py": [
        "<Task Process1> SUCCEEDED 'DATA_1'",
        "['data_1', 'DATA_1', 'DATA_1 saved']",
        "['data_0', 'DATA_0'] ... ['data_49', 'DATA_49'] in ",
        "100 results",
        "<Task Flaky> RETRYING ConnectionError('no route')",
        "<Task Flaky> SUCCEEDED 'recovered'",
        "<Task Slow> CANCELLED",
        "<Parallel Both> FAILED ConnectionError('down')",
        "Both() ended with job 1 (broken)",
        "Shop: closed → open",
        "circuit 'Shop' is open: try again in ",
        "DATA_1 and data_2",
    ],
    "demo.py": [
        "httpx.RemoteProtocolError: ",
        "✓ 69 of 69 calls were answered; without opero ",
        "✓ 29 of 30 tiles came from worker processes",
        "11 of 11 claims hold",
    ],
    "openai_client.py": [
        "openai.RateLimitError: ",
        "✓ no key stands in explain()",
        "5 of 5 claims hold",
    ],
}


ARGUMENTS = {"08_two_thousand_requests.py": ["200"]}
"""What makes an example shorter than its readers see it."""


@functools.cache
def run(
    program: Path, encoding: str = "utf-8", disable: str = "0"
) -> subprocess.CompletedProcess[str]:
    """Run an example as a reader would, from another folder, with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", str(program), *ARGUMENTS.get(program.name, [])],
        capture_output=True,
        encoding="utf-8",
        check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding, "OPERO_DISABLE": disable},
        timeout=100,
    )


def test_every_example_is_tested(examples: Path) -> None:
    programs = {path.name for path in examples.glob("*.py")} - {"server.py", "terminal.py"}
    assert programs == set(KEY_LINES)


@pytest.mark.parametrize("name", KEY_LINES)
def test_the_example_runs_and_shows_what_it_promises(examples: Path, name: str) -> None:
    done = run(examples / name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    shown = "".join(f"{' '.join(line.split())}\n" for line in done.stdout.splitlines())
    missing = [line for line in KEY_LINES[name] if line not in shown]
    assert not missing, done.stdout


@pytest.mark.parametrize("name", KEY_LINES)
def test_the_example_fits_a_terminal_of_100_columns(examples: Path, name: str) -> None:
    wide = [line for line in run(examples / name).stdout.splitlines() if len(line) > 100]
    assert wide == []


def test_the_openai_example_shows_no_key_outside_its_script(examples: Path) -> None:
    _, _, after_script = run(examples / "openai_client.py").stdout.partition("explain()")
    assert "api_key[2]" in after_script
    assert "sk-" not in after_script


@pytest.mark.parametrize("name", ["demo.py", "openai_client.py"])
def test_claims_fail_when_opero_is_switched_off(examples: Path, name: str) -> None:
    done = run(examples / name, encoding="ascii", disable="1")
    assert done.returncode == 1
    assert "  ✗ " in done.stdout
    assert "claims hold" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("name", ["badday.script", "badday.ledger", "badday.wire", "terminal"])
def test_the_examples_in_docstrings_are_true(name: str) -> None:
    tried = doctest.testmod(importlib.import_module(name))
    assert tried.attempted > 0
    assert tried.failed == 0
