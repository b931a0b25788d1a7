# this_file: tests/concurrency/executors/test_programs.py
"""Whole programs that map on processes: without a guard, interrupted, killed, with what only they know."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

posix = pytest.mark.skipif(os.name != "posix", reason="needs signals")
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

FORK = "import multiprocessing; multiprocessing.set_start_method('fork')\n"
SPAWN = FORK.replace("fork", "spawn")
ways = pytest.mark.parametrize("before", ["", FORK], ids=["forkserver", "fork"])
every_way = pytest.mark.parametrize(
    "before", ["", FORK, SPAWN], ids=["forkserver", "fork", "spawn"]
)


class Program:
    """A script in a folder of its own, and the process group that runs it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: list[subprocess.Popen[str]] = []

    def start(self, text: str, before: str = "") -> subprocess.Popen[str]:
        """Start a script."""
        script = self.folder / "program.py"
        script.write_text(before + textwrap.dedent(text))
        source = Path(__file__).resolve().parents[3] / "src"
        process = subprocess.Popen(
            [sys.executable, "-W", "error", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            cwd=self.folder,
            env={
                **os.environ,
                "PYTHONPATH": f"{source}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            },
            start_new_session=True,
        )
        self.running.append(process)
        return process

    def run(self, text: str, before: str = "") -> str:
        """Run a script to its end and return what it says."""
        said, errors = self.start(text, before).communicate(timeout=100)
        assert not errors, errors
        return said

    def begun(self, *names: str) -> None:
        """Wait until the script has made these files."""
        self.until(lambda: all((self.folder / name).exists() for name in names))

    @staticmethod
    def until(reached: Callable[[], object], seconds: float = 100) -> None:
        end = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < end
            time.sleep(0.01)

    @staticmethod
    def group(process: subprocess.Popen[str]) -> list[int]:
        """Return the processes of its session that live."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(session) == process.pid and state != "Z":
                found.append(int(stat.parent.name))
        return found

    def close(self) -> None:
        """End what is left."""
        for process in self.running:
            for pid in self.group(process):
                with suppress(ProcessLookupError):  # it has just ended by itself
                    os.kill(pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    program = Program(tmp_path)
    yield program
    try:
        # A fork server ends after its program.
        program.until(lambda: not any(map(program.group, program.running)))
    finally:
        program.close()
    # Other programs have files there too.
    assert not list(Path("/dev/shm").glob("*opero*"))


# --- what only the program knows ------------------------------------------------------------------


@every_way
def test_a_script_needs_no_guard(program: Program, before: str) -> None:
    text = """
    from opero import operomap
    print("once")

    @operomap(mode="process", cache=False)
    def double(x):
        return 2 * x

    print(double([1, 2, 3]))
    """
    assert program.run(text, before) == "once\n[2, 4, 6]\n"


@ways
def test_everything_of_a_script_travels(program: Program, before: str) -> None:
    text = """
    import functools
    from dataclasses import dataclass
    from opero import opero, operomap

    process = operomap(mode="process", cache=False)
    base = 10

    @opero(cache=False, retries=1)
    def inner(x):
        return base + x

    @dataclass
    class Point:
        x: int

        @operomap(mode="process", cache=False)
        def plus(self, y):
            return Point(self.x + y)

        @classmethod
        @operomap(mode="process", cache=False)
        def made(cls, x):
            return cls(x)

        @staticmethod
        @operomap(mode="process", cache=False)
        def free(x):
            return -x

    class Adder:
        def __init__(self, n):
            self.n = n
        def __call__(self, x):
            return self.n + x

    def closure(n):
        def add(x):
            return inner(x) + n
        return add

    print(process(lambda x: x + base)([1]))
    print(process(closure(100))([1]))
    print(process(inner)([1]))
    print(process(functools.partial(max, 5))([1, 9]))
    print(process(Adder(7))([1]))
    print(Point(1).plus([1, 2]))
    print(Point.made([3]))
    print(Point.free([4]))
    print(process(lambda p: p.x)([Point(5)]))
    print(process(str.upper)(["a"]))
    """
    assert program.run(text, before).splitlines() == [
        "[11]",
        "[111]",
        "[11]",
        "[5, 9]",
        "[8]",
        "[Point(x=2), Point(x=3)]",
        "[Point(x=3)]",
        "[-4]",
        "[5]",
        "['A']",
    ]


@ways
def test_a_class_stays_what_it_is_when_its_instances_come_back(
    program: Program, before: str
) -> None:
    text = """
    from opero import opero, operomap

    class Point:
        @opero
        def far(self):
            return 1

    plain = vars(Point)["far"]
    (found,) = operomap(mode="process", cache=False)(lambda point: point)([Point()])
    print(type(found) is Point, vars(Point)["far"] is plain)
    """
    assert program.run(text, before) == "True True\n"


@every_way
def test_a_redefined_function_is_the_new_one(program: Program, before: str) -> None:
    text = """
    from opero import operomap
    process = operomap(mode="process", cache=False)

    @process
    def f(x):
        return helper(x)

    def helper(x):
        return "old"

    first = f([1])

    def helper(x):
        return "new"

    print(first, f([1]))

    @process
    def f(x):
        return "newer"

    print(f([1]))
    """
    assert program.run(text, before) == "['old'] ['new']\n['newer']\n"


def test_functions_of_a_notebook_travel(program: Program) -> None:
    text = """
    # As a kernel does it: cells run in a namespace that is `__main__`, inside of a running event loop, beside threads.
    import asyncio, threading
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    cells = [
        "from opero import operomap",
        "seen = []\\n@operomap(mode='process', cache=False)\\ndef f(x):\\n    return (x, y)",
        "y = 1; seen.append(f([1]))",
        "y = 2; seen.append(f([1]))",
    ]

    async def kernel():
        for cell in cells:
            exec(compile(cell, "<cell>", "exec"), globals())

    asyncio.run(kernel())
    print(seen)
    """
    assert program.run(text) == "[[(1, 1)], [(1, 2)]]\n"


def test_a_program_whose_thread_holds_a_lock_is_not_forked(program: Program) -> None:
    (program.folder / "locked.py").write_text(
        "import threading\nlock = threading.Lock()\ndef work(x):\n    with lock:\n        return x\n"
    )
    text = """
    import threading
    import locked
    from opero import operomap

    begun, over = threading.Event(), threading.Event()

    def hold():
        with locked.lock:
            begun.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    begun.wait()
    print(operomap(mode="process", cache=False)(locked.work)([1, 2]))
    over.set()
    thread.join()
    """
    assert program.run(text) == "[1, 2]\n"


def test_threads_map_at_once(program: Program) -> None:
    text = """
    import threading
    from opero import operomap

    @operomap(mode="process", cache=False, workers=2)
    def times(x, n):
        return x * n

    found = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: times(range(50), n)})) for n in range(4)
    ]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print(found == {n: [x * n for x in range(50)] for n in range(4)})
    """
    assert program.run(text) == "True\n"


def test_maps_within_maps_work(program: Program) -> None:
    text = """
    from opero import operomap

    @operomap(mode="process", cache=False, workers=2)
    def inner(x, n):
        return x + n

    @operomap(mode="process", cache=False, workers=2)
    def outer(n):
        return inner([1, 2], n)

    print(outer([10, 20]))
    """
    assert program.run(text) == "[[11, 12], [21, 22]]\n"


@ways
def test_a_broken_input_and_an_early_break_leave_nothing(program: Program, before: str) -> None:
    text = """
    import os, time
    from pathlib import Path
    from opero import operomap

    @operomap(mode="process", cache=False, workers=2)
    def f(x):
        if x == 9:
            time.sleep(60)
        return x

    def broken():
        yield from range(5)
        raise ValueError("no more")

    def children():
        return Path(f"/proc/self/task/{os.getpid()}/children").read_text()

    try:
        f(broken())
    except ValueError as error:
        print(error, repr(children()))

    def endless():
        n = 0
        while True:
            yield n
            n += 1

    for value in f.stream(endless()):
        if value == 3:
            break
    import gc; gc.collect()
    print(repr(children()))
    """
    assert program.run(text, before) == "no more ''\n''\n"


@ways
def test_workers_find_what_the_script_has_cached(program: Program, before: str) -> None:
    text = """
        from pathlib import Path
        from opero import opero, operomap

        @opero(cache_backend="disk:cache", retries=0)
        def price(n):
            with open("calls", "a") as calls:
                calls.write(f"{n} ")
            return n * 10

        @operomap(mode="process", workers=1, cache=False, progress=False)
        def total(n):
            return price(n)

        price(1)
        print(total([1, 2]), price(2), Path("calls").read_text())
        """
    assert program.run(text, before) == "[10, 20] 20 1 2 \n"


@ways
def test_limits_of_a_script_are_one_in_all_its_workers(program: Program, before: str) -> None:
    text = """
    import os, time
    from opero import ConcurrencyLimit, RateLimiter, operomap

    limiter, limit = RateLimiter("10/hour"), ConcurrencyLimit(1)

    @operomap(mode="process", cache=False, workers=4)
    def f(x):
        with limit:
            began = time.monotonic()
            time.sleep(0.01)
            return limiter.try_acquire(), began, time.monotonic()

    found = sorted(f(range(20)), key=lambda one: one[1])
    # A quota has room for one call of catch-up.
    print(sum(started for started, _, _ in found) in (10, 11), limiter.try_acquire())
    print(all(a[2] <= b[1] for a, b in zip(found, found[1:])))
    """
    assert program.run(text, before) == "True False\nTrue\n"


@ways
def test_nothing_stays_open_after_many_maps(program: Program, before: str) -> None:
    text = """
    import gc, os
    from pathlib import Path
    from opero import operomap

    @operomap(mode="process", cache=False, workers=2, retries=0, on_error="return")
    def f(x):
        if x == 3:
            os._exit(1)
        return bytes(200_000)

    def left():
        gc.collect()
        threads, fds = os.listdir("/proc/self/task"), os.listdir("/proc/self/fd")
        return len(threads), len(fds), Path(f"/proc/self/task/{os.getpid()}/children").read_text()

    f(range(5))
    first = left()
    for _ in range(5):
        f(range(5))
        next(f.stream(range(100)))
    print(left() == first, repr(first[2]))
    """
    assert program.run(text, before) == "True ''\n"


def test_a_stream_that_is_under_way_when_the_interpreter_ends_is_closed(program: Program) -> None:
    text = """
    import time
    from opero import operomap

    @operomap(mode="process", cache=False, workers=2)
    def work(n):
        time.sleep(100 * n)

    stream = work.stream(range(9))
    print(next(stream))
    """
    assert program.run(text) == "None\n"


@ways
def test_nothing_stays_open_after_maps_that_cannot_begin(program: Program, before: str) -> None:
    text = """
    import asyncio, gc, os, resource
    from opero import operomap

    class Stays:
        def __reduce__(self):
            raise TypeError

    @operomap(mode="process", cache=False, workers=2)
    def f(x):
        return x

    @operomap(mode="async_process", cache=False, workers=2)
    async def g(x, extra=Stays()):
        return extra

    def use(room=None):
        most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if room is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (room, hard))
        try:
            f([1])
        except Exception as error:
            return error
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))

    def left():
        use()  # with the fork server that it had
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    first = left()
    print(all([use(first + more) for more in range(6)]), left() - first)
    for _ in range(3):
        try:
            asyncio.run(g([1], Stays()))
        except Exception as error:
            print(type(error).__name__, left() - first)
    """
    assert program.run(text, before) == "True 0\n" + 3 * "ShippingError 0\n"


# --- ends -----------------------------------------------------------------------------------------

LONG = """
import time
from pathlib import Path
from opero import operomap

@operomap(mode="process", cache=False, workers=2)
def wait(x):
    Path(f"begun{x}").touch()
    time.sleep(120)

try:
    wait(range(4))
except KeyboardInterrupt:
    print("interrupted")
"""


@every_way
@posix
@pytest.mark.parametrize("to", ["process", "group"])
def test_ctrl_c_ends_a_map_at_once(program: Program, before: str, to: str) -> None:
    process = program.start(LONG, before)
    program.begun("begun0", "begun1")
    began = time.monotonic()
    if to == "group":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=100)
    assert (said, errors, process.returncode) == ("interrupted\n", "", 0)
    assert time.monotonic() - began < 60, "half as long as an item"


@posix
def test_ctrl_c_that_an_import_would_swallow_ends_a_map(program: Program) -> None:
    # It is found before the installed one, and imported while the workers start.
    (program.folder / "twat_mp.py").write_text(
        "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\nexcept:\n    pass\n"
    )
    assert program.run(LONG) == "interrupted\n"


@every_way
@linux
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_program(program: Program, before: str, how: int) -> None:
    process = program.start(LONG, before)
    program.begun("begun0", "begun1")
    # The program, the fork server, two workers, and the process that the server may keep ready for another one.
    assert len(program.group(process)) in (4, 5)
    process.send_signal(how)
    process.wait(timeout=100)
    program.until(lambda: not program.group(process))


@ways
@linux
def test_workers_end_with_their_program_also_in_native_code(program: Program, before: str) -> None:
    text = LONG.replace(
        "time.sleep(120)", "(1 << 400_000_000).bit_count() and pow(7, 1 << 400_000)"
    )
    process = program.start(text, before)
    program.begun("begun0", "begun1")
    process.kill()
    process.wait(timeout=100)
    program.until(lambda: not program.group(process))


@ways
@posix
def test_a_second_ctrl_c_does_no_harm(program: Program, before: str) -> None:
    process = program.start(LONG, before)
    program.begun("begun0", "begun1")
    process.send_signal(signal.SIGINT)
    time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=100)
    program.until(lambda: not program.group(process))


@ways
def test_a_program_can_map_again_after_it_was_interrupted(program: Program, before: str) -> None:
    text = (
        LONG
        + """
print(operomap(mode="process", cache=False)(abs)([-1]))
"""
    )
    process = program.start(text, before)
    program.begun("begun0", "begun1")
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=100)
    assert (said, errors) == ("interrupted\n[1]\n", "")


def test_a_program_that_has_no_interpreter_forks_and_a_wrong_one_is_named(
    program: Program,
) -> None:
    text = """\
        import sys
        from opero import operomap
        from opero.errors import WorkerStartError

        def double(x):
            return 2 * x

        def run(method=None):
            work = operomap(mode="process", workers=2, cache=False, start_method=method)(double)
            print(work([1, 2]))

        interpreter = sys.executable
        for sys.executable in ("/nowhere/python", "/usr/bin/false", "/usr/bin/true"):
            for method in ("forkserver", "spawn"):
                try:
                    run(method)
                except WorkerStartError as error:
                    print(str(error).splitlines()[1].partition(":")[0])
        sys.executable = None
        run()
        sys.executable = interpreter
        sys.frozen = True
        run()
        del sys.frozen
        run()
        """
    wrong = {"/nowhere/python": "No such file or directory"}
    wrong |= dict.fromkeys(("/usr/bin/false", "/usr/bin/true"), "it ended before it ran any code")
    named = [2 * f"sys.executable is {name!r} ({why})\n" for name, why in wrong.items()]
    assert program.run(text) == "".join(named) + 3 * "[2, 4]\n"


def test_a_fork_server_that_ends_before_it_is_used_costs_nothing(program: Program) -> None:
    text = """\
        from opero import operomap
        from json import dumps
        from opero.concurrency.executors.process.start import ForkServer

        def broken(server, message, fds=()):
            if message[0] == "preload":
                ForkServer.request = request
                server.channel._sock.shutdown(2)
            return request(server, message, fds)

        def double(x):
            return 2 * int(dumps(x))

        request, ForkServer.request = ForkServer.request, broken
        print(operomap(mode="process", workers=2, cache=False)(double)([1, 2]))
        """
    assert program.run(text) == "[2, 4]\n"


@posix
@pytest.mark.parametrize("mode", ["thread", "process"])
def test_a_fork_within_a_stream_leaves_it_to_the_parent(program: Program, mode: str) -> None:
    text = f"""\
        import os, sys, warnings
        from opero import operomap

        def double(x):
            return 2 * x

        warnings.simplefilter("ignore", DeprecationWarning)
        stream = operomap(mode={mode!r}, workers=2, cache=False)(double).stream(range(30))
        print(next(stream), flush=True)
        child = os.fork()
        try:
            print(sum(stream), flush=True)
        except Exception as error:
            print(type(error).__name__, flush=True)
        if child:
            assert os.waitpid(child, 0)[1] == 0
        """.replace(
        "            print(sum(stream), flush=True)",
        """\
            if child:
                os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
            print(sum(stream), flush=True)""",
    )
    assert program.run(text) == "0\nOperoUsageError\n870\n"


# --- memory ---------------------------------------------------------------------------------------


@linux
@every_way
def test_a_limit_of_memory_counts_what_the_worker_itself_uses(
    program: Program, before: str
) -> None:
    text = """
        import mmap, time
        from opero import operomap

        held = b"x" * 300_000_000

        @operomap(mode="process", workers=2, memory_limit="200MB", cache=False, retries=0)
        def work(n):
            if n == 1:
                return len(b"y" * 400_000_000)
            if n == 2:
                # Shared memory is no data of the process, so the kernel's limit does not count it.
                shared = mmap.mmap(-1, 300_000_000)
                for _ in range(299):
                    shared.write(bytes(1_000_000))
                time.sleep(60)
            return n

        result = work.map(range(8))
        print(result.values, [type(one.error).__name__ for one in result.failures], len(held))
        print(result.failures[1].error)
    """
    said = program.run(text, before)
    assert "[0, 3, 4, 5, 6, 7] ['MemoryError', 'WorkerLostError'] 300000000" in said
    assert "took more than memory_limit" in said
