# this_file: tests/caching/stores/host.py
"""A host program with loguru sinks, handlers and warnings as errors, in which nothing may leave a trace."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

SETUP = """
import logging, os, sys, warnings
from pathlib import Path
from loguru import logger
logger.remove()
logger.add("LOG/host.log", format="{message}")
records = []
class Keep(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())
logging.getLogger().addHandler(Keep(1))
"""

CHECK = """
logger.info("the sink lives")
logger.remove()
assert Path("LOG/host.log").read_text() == "the sink lives\\n"
assert records == [], records
assert os.listdir(".") == [], os.listdir(".")
"""


def run_guarded(body: str, folder: Path, **environment: str) -> None:
    """Run a program that holds sinks and handlers of its own, with warnings as errors."""
    log, cwd = folder / "log", folder / "cwd"
    log.mkdir()
    cwd.mkdir()
    source = (SETUP + textwrap.dedent(body) + CHECK).replace("LOG", str(log))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", source],
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HOME": str(folder / "home"),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
