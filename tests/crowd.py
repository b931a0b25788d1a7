# this_file: tests/crowd.py
"""Real processes that run one program side by side, on one store."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

PROGRAM = """
import asyncio, os, sys, time
from pathlib import Path
sys.modules["opentelemetry"] = None  # redis-py imports its SDK where there is one: a fifth of what that costs
from opero import opero

place, folder, turn = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
options = dict(cache_backend=place, cache_namespace="lease", retries=0)
if place.startswith("redis"):
    # All the time that a busy machine needs to answer: a call that goes without the server computes for itself.
    from opero.caching.stores import redis_connections
    redis_connections._CONNECT = redis_connections._ANSWER = 20.0

def note(what):
    with (folder / "calls").open("a") as file:
        file.write(f"{what} {os.getpid()}\\n")

def short_leases():
    '''Let what a killed process held fall free sooner than the five seconds of a program.'''
    from opero.caching import lease
    lease.SECONDS, lease._RENEW_AFTER = 1.0, 0.2

def ready():
    (folder / f"ready {turn}").touch()
    while not (folder / "go").exists():
        time.sleep(0.005)
"""


class Crowd:
    """Processes that run one program side by side."""

    def __init__(self, place: str, folder: Path) -> None:
        self._place = place
        self._folder = folder
        self._started: list[subprocess.Popen[str]] = []

    def start(self, body: str, count: int = 1) -> list[subprocess.Popen[str]]:
        source = PROGRAM + textwrap.dedent(body)
        begun = len(self._started)
        for turn in range(begun, begun + count):
            self._started.append(
                subprocess.Popen(
                    [sys.executable, "-c", source, self._place, str(self._folder), str(turn)],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        self.wait_for(lambda: len(list(self._folder.glob("ready *"))) == begun + count)
        return self._started[begun:]

    def go(self) -> None:
        (self._folder / "go").touch()

    @staticmethod
    def wait_for(condition: Any) -> None:
        end = time.monotonic() + 100
        while not condition():
            assert time.monotonic() < end, "it did not come to that"
            time.sleep(0.005)

    def calls(self, what: str = "") -> int:
        path = self._folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return sum(line.startswith(what) for line in lines)

    def kinds(self, what: str = "") -> int:
        """How many different things were noted, by whichever process."""
        lines = (self._folder / "calls").read_text().splitlines()
        return len({line.rpartition(" ")[0] for line in lines if line.startswith(what)})

    def outputs(self) -> list[str]:
        ended = [process.communicate(timeout=100) for process in self._started]
        assert [errors for _, errors in ended] == [""] * len(ended)
        return [output.strip() for output, _ in ended]

    def end(self) -> None:
        for process in self._started:
            process.kill()
            process.communicate()
