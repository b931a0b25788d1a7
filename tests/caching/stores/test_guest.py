# this_file: tests/caching/stores/test_guest.py
"""twat-cache is imported without the host program noticing."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("name", ["engines.diskcache", "engines.redis", "config"])
def test_importing_leaves_no_trace(name: str, tmp_path: Path) -> None:
    run_guarded(
        f"""
        from opero.caching.stores.guest import unnoticed
        with unnoticed():
            import twat_cache.{name}
        """,
        tmp_path,
    )
    assert not (tmp_path / "home").exists()


def test_a_host_that_has_imported_it_before_keeps_its_own() -> None:
    """Then the harm is done, and the host's own doing."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            """if True:
            import twat_cache.logging as theirs, sys
            from opero.caching.stores.guest import unnoticed
            with unnoticed():
                import twat_cache.config
            assert sys.modules['twat_cache.logging'] is theirs
            """,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_only_what_is_used_is_imported_and_stays_our_own(tmp_path: Path) -> None:
    run_guarded(
        """
        from opero.caching.stores import database, redis_engine
        heavy = {"joblib", "klepto", "numpy", "dill", "aiocache"} & sys.modules.keys()
        assert not heavy, heavy
        assert not any(name.partition(".")[0] == "twat_cache" for name in sys.modules)
        assert database.BaseCacheEngine is redis_engine.BaseCacheEngine
        """,
        tmp_path,
    )


def test_a_host_that_imports_it_later_gets_it_as_it_is() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            """if True:
            from opero.caching.stores.database import DiskCacheEngine as ours
            from twat_cache.engines.diskcache import DiskCacheEngine as theirs
            from twat_cache.engines import joblib
            import twat_cache.logging
            assert ours is not theirs
            assert joblib.__file__ and twat_cache.logging.__file__
            from opero.caching.stores.redis_engine import BaseCacheEngine
            import twat_cache.engines.base
            assert BaseCacheEngine is twat_cache.engines.base.BaseCacheEngine
            """,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
