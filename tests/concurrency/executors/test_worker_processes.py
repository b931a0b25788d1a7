# this_file: tests/concurrency/executors/test_worker_processes.py
"""How worker processes begin, what they take over from the program, and what of them reaches it."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from opero.concurrency.executors.process.start import choose_method
from opero.concurrency.executors.process.worker_pool import modules_to_preload

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.internal

posix = pytest.mark.skipif(os.name != "posix", reason="needs signals and limits")


def run(folder: Path, text: str, *, before: Sequence[str] = (), **environ: str) -> str:
    """Run a program in a folder, and return what it prints."""
    script = folder / "program.py"
    script.write_text(textwrap.dedent(text))
    source = Path(__file__).resolve().parents[3] / "src"
    ran = subprocess.run(
        [*before, sys.executable, "-W", "error", str(script)],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=100,
        check=False,
        env={**os.environ, "PYTHONPATH": str(source), **environ},
    )
    assert not ran.stderr, ran.stderr
    return ran.stdout


# --- the start method -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_option_decides_before_all_else(method: Any) -> None:
    assert choose_method(method) == method


def test_fork_server_is_the_default(tmp_path: Path) -> None:
    text = """
    from opero.concurrency.executors.process.start import choose_method
    print(choose_method(None))
    """
    assert run(tmp_path, text) == "forkserver\n"


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_method_that_the_program_has_set_is_used(tmp_path: Path, method: str) -> None:
    text = f"""
    import multiprocessing, sys
    from opero import operomap

    multiprocessing.set_start_method({method!r})
    sys.inherited = True

    @operomap(mode="process", cache=False)
    def inherits(_):
        return hasattr(sys, "inherited")

    print(inherits([1, 2]))
    """
    forked = method == "fork"
    assert run(tmp_path, text) == f"{[forked, forked]}\n"


def test_method_that_a_pool_has_set_by_its_use_is_not(tmp_path: Path) -> None:
    text = """
    import multiprocessing.pool, os
    from opero.concurrency.executors.process.start import choose_method
    with multiprocessing.get_context().Pool(1) as pool:
        pool.map(abs, [1])
    print(choose_method(None) == "fork")
    """
    assert run(tmp_path, text) == "False\n"


def test_packages_of_functions_are_preloaded_and_modules_of_the_program_are_not() -> None:
    found = modules_to_preload(run)
    assert "pytest" in found
    assert "tests" not in found
    assert "opero" not in found


@pytest.mark.parametrize("seed", ["1", "2", "5", "7"])
def test_workers_have_asyncio_whole_though_functions_refer_to_its_parts(
    tmp_path: Path, seed: str
) -> None:
    text = """
    import asyncio
    from asyncio import Future, current_task, get_running_loop
    from opero import operomap

    @operomap(mode="async_process", workers=1, cache=False, retries=0, progress=False)
    async def within_time(x):
        async with asyncio.timeout(60):
            return x

    print(asyncio.run(within_time([1, 2])))
    """
    # Names in sets have another order with each seed.
    assert run(tmp_path, text, PYTHONHASHSEED=seed) == "[1, 2]\n"


# --- what workers take over -----------------------------------------------------------------------


def test_folder_environment_and_changed_modules_reach_the_next_map(tmp_path: Path) -> None:
    text = """
    import importlib, os
    from pathlib import Path
    from opero import operomap

    Path("changing.py").write_text("def f(x): return 'old'")
    import changing

    @operomap(mode="process", cache=False)
    def seen(_):
        return os.getcwd(), os.environ.get("ANSWER")

    print(seen([1])[0][1], operomap(mode="process", cache=False)(changing.f)([1]))
    os.environ["ANSWER"] = "42"
    Path("inner").mkdir()
    os.chdir("inner")
    Path("../changing.py").write_text("def f(x): return 'newer'")
    importlib.reload(changing)
    (folder, answer), = seen([1])
    print(Path(folder).name, answer, operomap(mode="process", cache=False)(changing.f)([1]))
    """
    assert run(tmp_path, text) == "None ['old']\ninner 42 ['newer']\n"


@posix
def test_a_daemonic_process_maps(tmp_path: Path) -> None:
    text = """
    import multiprocessing
    from opero import operomap

    @operomap(mode="process", cache=False)
    def double(x):
        return 2 * x

    def work():
        print(double([1, 2]), flush=True)

    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    process.join()
    """
    assert run(tmp_path, text) == "[2, 4]\n"


@posix
def test_a_child_of_a_program_that_has_mapped_maps_too(tmp_path: Path) -> None:
    text = """
    import os
    from opero import operomap

    @operomap(mode="process", cache=False)
    def double(x):
        return 2 * x

    print(double([1]), flush=True)
    if os.fork():
        os.wait()
        print(double([3]))
    else:
        print(double([2]), flush=True)
        os._exit(0)
    """
    assert run(tmp_path, text) == "[2]\n[4]\n[6]\n"


@posix
@pytest.mark.parametrize(
    "limit", ["ulimit -n 48", "ulimit -f 8", "ulimit -c 0; ulimit -s 1024"], ids=["n", "f", "s"]
)
def test_limits_of_the_shell_are_survived(tmp_path: Path, limit: str) -> None:
    text = """
    import sys
    sys.dont_write_bytecode = True
    from opero import operomap

    @operomap(mode="process", cache=False, workers=4)
    def reverse(x):
        return x[::-1]

    items = [bytes([n]) * 200_000 for n in range(20)]
    print(reverse(items) == items)
    """
    before = ["sh", "-c", f'{limit}; exec "$@"', "sh"]
    assert run(tmp_path, text, before=before) == "True\n"


def test_no_folder_for_temporary_files_is_needed(tmp_path: Path) -> None:
    text = """
    import tempfile
    from opero import operomap

    def refuse(*_, **__):
        raise FileNotFoundError("no usable temporary directory")

    tempfile.gettempdir = tempfile.mkdtemp = tempfile.TemporaryFile = refuse
    print(operomap(mode="process", cache=False)(abs)([-1]))
    """
    assert run(tmp_path, text) == "[1]\n"


FROZEN = """
import sys
sys.frozen = True
from opero import operomap
from opero.concurrency.executors.process.start import choose_method
from opero.errors import WorkerStartError
print(choose_method(None))
try:
    operomap(mode="process", cache=False, start_method="spawn")(abs)([1])
except WorkerStartError as error:
    print("frozen" in str(error))
"""


def test_a_frozen_program_is_forked_and_never_run_again(tmp_path: Path) -> None:
    # In a program of its own: another test may have chosen a start method for this one.
    assert run(tmp_path, FROZEN) == "fork\nTrue\n"


# --- log records ----------------------------------------------------------------------------------

LOGS = """
import logging, multiprocessing, sys
from opero import operomap

@operomap(mode="process", cache=False, retries=0, workers=2, start_method={method!r})
def work(n):
    logging.getLogger("app").info("item %d", n, extra={{"place": n}})
    logging.getLogger("quiet").info("not wanted")
    logging.getLogger("apart").warning("apart")
    logging.getLogger("app").log(25, "told")
    try:
        raise ValueError(n)
    except ValueError:
        logging.getLogger("app").exception("failed")

class Keep(logging.Handler):
    kept = []
    def emit(self, record):
        self.kept.append(record)

logging.addLevelName(25, "NOTICE")
logging.basicConfig(level=logging.INFO, handlers=[Keep()])
logging.getLogger("quiet").setLevel(logging.ERROR)
logging.getLogger("apart").propagate = False
logging.getLogger("apart").addHandler(Keep())
work([0, 1])
for record in sorted(Keep.kept, key=lambda r: (r.name, r.levelno, r.getMessage())):
    text = logging.Formatter("%(message)s").format(record).splitlines()
    print(record.name, record.levelname, text[0], getattr(record, "place", ""), "ValueError" in text[-1])
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_log_records_of_workers_reach_the_loggers_of_the_program(
    tmp_path: Path, method: str
) -> None:
    assert run(tmp_path, LOGS.format(method=method)).splitlines() == [
        "apart WARNING apart  False",
        "apart WARNING apart  False",
        "app INFO item 0 0 False",
        "app INFO item 1 1 False",
        "app NOTICE told  False",
        "app NOTICE told  False",
        "app ERROR failed  True",
        "app ERROR failed  True",
    ]


# --- deadlines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["option", "block"])
def test_a_deadline_ends_the_calls_that_are_under_way(tmp_path: Path, way: str) -> None:
    text = f"""
    import time
    from opero import deadline, operomap
    from opero.errors import DeadlineError

    @operomap(mode="process", cache=False, retries=0, workers=2, timeout=60)
    def slow(seconds):
        time.sleep(seconds)

    slow([0])
    began = time.monotonic()
    try:
        if {way!r} == "option":
            slow.with_options(deadline=0.5)([20, 20])
        else:
            with deadline(0.5):
                slow([20, 20])
    except DeadlineError as error:
        print(error)
    print(time.monotonic() - began < 10)
    """
    said, quick = run(tmp_path, text).splitlines()
    assert "ran out of time" in said
    assert quick == "True"
