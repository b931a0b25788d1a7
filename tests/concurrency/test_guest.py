# this_file: tests/concurrency/test_guest.py
"""twat-mp's `MultiPool` and pathos' threads without the rest of these packages, or with it where that is needed."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from opero.concurrency import guest

SRC = Path(guest.__file__).resolve().parents[2]

MAPS = """
import json, sys
from pathlib import Path
before = set(sys.modules)
from opero import operomap
for mode in ("process", "thread"):
    assert operomap(mode=mode, cache=False)(abs)([-1, -2]) == [1, 2]
from opero.concurrency import guest
def told():
    tops = {name.partition(".")[0] for name in set(sys.modules) - before}
    where = [Path(c.__enter__.__code__.co_filename).as_posix() for c in (guest.multi_pool(), guest.thread_pool())]
    print(json.dumps([sorted(tops & {"dill", "multiprocess", "pathos", "ppft", "twat_mp"}), *where]))
"""


def run(text: str, *paths: Path) -> Any:
    """Run a program in an interpreter of its own; return what it prints."""
    places = os.pathsep.join([str(SRC), *map(str, paths), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(text)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": places},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_maps_use_the_installed_classes_and_import_none_of_their_packages() -> None:
    loaded, pool, threads = run(MAPS + "told()")
    assert loaded == []
    assert pool.endswith("twat_mp/mp.py")
    assert threads.endswith("pathos/abstract_launcher.py")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only there maps fork")
def test_a_map_that_forks_loads_only_what_it_uses() -> None:
    loaded = run(
        """
        import sys
        before = set(sys.modules)
        from opero import operomap
        from posixpath import basename
        assert operomap(mode="process", cache=False)(basename)(["a/b"]) == ["b"]
        loaded = sorted(set(sys.modules) - before)
        import json
        print(json.dumps(loaded))
        """
    )
    of_others = {"asyncio", "cloudpickle", "html", "logging", "multiprocessing", "numpy", "pathlib"}
    of_failures = {"subprocess", "tempfile", "traceback", "uuid"}
    tops = {name.partition(".")[0] for name in loaded}
    assert tops & (of_others | of_failures) == set()


def test_the_program_imports_them_afterwards_as_they_are() -> None:
    apart, same = run(
        MAPS
        + """
ours = guest.multi_pool(), guest.thread_pool()
import twat_mp, pathos.pools
hers = twat_mp.MultiPool, pathos.pools.ThreadPool
with twat_mp.ThreadPool(nodes=2) as pool:
    assert pool.map(abs, [-3]) == [3]
print(json.dumps([ours[0] is not hers[0], (guest.multi_pool(), guest.thread_pool()) == hers]))
"""
    )
    assert (apart, same) == (True, True)


def test_maps_of_a_program_that_has_imported_them_run_in_its_own_classes() -> None:
    assert run(
        """
        import json
        import twat_mp
        entered = []
        class Watched(twat_mp.MultiPool):
            def __enter__(self):
                entered.append(type(super().__enter__()).__name__)
                return self.pool
        twat_mp.MultiPool = Watched
        from opero import operomap
        for mode in ("process", "thread"):
            operomap(mode=mode, cache=False)(abs)([-1])
        print(json.dumps(entered))
        """
    ) == ["LanePool", "ThreadPool"]


OTHERS = {
    "made elsewhere": "from twat_mp.deeper import MultiPool",
    "with other parameters": """
        class MultiPool:
            def __init__(self, pool_class, nodes, **kwargs):
                self.make = lambda: pool_class(nodes=nodes)
            def __enter__(self):
                self.pool = self.make()
                return self.pool
            def __exit__(self, *_):
                self.pool.close()
                self.pool.join()
    """,
    "that looks at pathos' own pools": """
        from pathos.pools import ProcessPool, ThreadPool
        from twat_mp.deeper import MultiPool as Plain
        class MultiPool(Plain):
            def __init__(self, pool_class, nodes, debug):
                super().__init__(pool_class, nodes, debug)
            def __enter__(self):
                import functools
                assert hasattr(ThreadPool, "apipe")
                return super().__enter__()
            def __exit__(self, *error):
                return super().__exit__(*error)
    """,
    "that needs more of pathos": """
        from pathos.pools import ParallelPool
        from twat_mp.deeper import MultiPool
    """,
}
DEEPER = """
class MultiPool:
    def __init__(self, pool_class=None, nodes=None, debug=None):
        self.pool = pool_class(nodes=nodes)
    def __enter__(self):
        return self.pool
    def __exit__(self, *_):
        self.pool.close()
        self.pool.join()
"""


@pytest.mark.parametrize("text", OTHERS.values(), ids=OTHERS)
def test_another_release_is_used_too(tmp_path: Path, text: str) -> None:
    package = tmp_path / "twat_mp"
    package.mkdir()
    (package / "__init__.py").write_text("from twat_mp.mp import MultiPool\n")
    (package / "mp.py").write_text(textwrap.dedent(text))
    (package / "deeper.py").write_text(DEEPER)
    pool = run(
        """
        import json
        from opero import operomap
        for mode in ("process", "thread"):
            assert operomap(mode=mode, cache=False)(abs)([-1, -2]) == [1, 2]
        from opero.concurrency import guest
        print(json.dumps(guest.multi_pool().__init__.__code__.co_filename))
        """,
        tmp_path,
    )
    assert Path(pool).is_relative_to(package)


def test_what_is_not_installed_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest, "_ours", {})
    monkeypatch.setattr(sys, "path", [])
    for name in [name for name in sys.modules if name.partition(".")[0] in ("twat_mp", "pathos")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match="twat_mp"):
        guest.multi_pool()
    with pytest.raises(ModuleNotFoundError, match="pathos"):
        guest.thread_pool()


def test_what_stands_in_does_its_work_when_it_is_needed(caplog: pytest.LogCaptureFixture) -> None:
    pool = guest._part_of_twat()
    assert pool(pool_class=None).nodes == os.cpu_count()
    with (
        caplog.at_level(logging.ERROR, "twat_mp.mp"),
        pytest.raises(RuntimeError, match="Error creating pool: division by zero"),
    ):
        pool(pool_class=lambda nodes: nodes / 0, nodes=2, debug=False).__enter__()
    assert caplog.record_tuples == [
        ("twat_mp.mp", logging.ERROR, "Error creating pool: division by zero")
    ]


def test_threads_of_pathos_can_map_as_well() -> None:
    kind = guest._part_of_pathos()
    with guest._part_of_twat()(pool_class=kind, nodes=2, debug=False) as pool:
        assert pool.map(abs, [-1, -2]) == [1, 2]
    assert not kind.__state__
