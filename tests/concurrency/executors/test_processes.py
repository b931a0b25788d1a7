# this_file: tests/concurrency/executors/test_processes.py
"""Worker processes: what runs in them, what comes back, what a death costs."""

from __future__ import annotations

import gc
import os
import random
import re
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from opero.concurrency.executors.base import Chunk, Done, ItemOutcome, Lost
from opero.errors import RemoteError, ShippingError, WorkerStartError

if TYPE_CHECKING:
    from tests.concurrency.conftest import Maps

pytestmark = pytest.mark.internal

both = pytest.mark.parametrize("maps", ["fork", "forkserver"], indirect=True)
every = pytest.mark.parametrize("maps", ["fork", "forkserver", "spawn"], indirect=True)
posix = pytest.mark.skipif(os.name != "posix", reason="needs signals")


# --- what runs ------------------------------------------------------------------------------------


@every
def test_items_come_back_in_their_places(maps: Maps) -> None:
    assert maps(lambda x: 2 * x, range(100), chunk=7).items == [2 * x for x in range(100)]


@every
def test_garbage_is_collected_in_workers(maps: Maps) -> None:
    assert maps(lambda _: gc.isenabled(), [1]).items == [True]


def test_it_runs_elsewhere_and_in_several_processes(maps: Maps, tmp_path: Path) -> None:
    def pid(_: int) -> int:
        (tmp_path / str(os.getpid())).touch()
        assert maps.until(lambda: len(list(tmp_path.iterdir())) == 2, 20)
        return os.getpid()

    pids = set(maps(pid, range(8), workers=2).items)
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_more_workers_than_chunks_are_not_begun(maps: Maps) -> None:
    ran = maps(lambda _: maps.children(os.getppid()), [1], workers=8)
    assert len(ran.items[0]) == 1


@both
def test_closures_lambdas_and_methods_run(maps: Maps) -> None:
    class Adder:
        def __init__(self, n: int) -> None:
            self.n = n

        def add(self, x: int) -> int:
            return self.n + x

    assert maps(Adder(3).add, [1, 2]).items == [4, 5]


@every
def test_instances_of_local_classes_are_themselves_again(maps: Maps) -> None:
    class Point:
        def __init__(self, x: int) -> None:
            self.x = x

    def moved(point: Point) -> Point:
        assert type(point) is Point
        return Point(point.x + 1)

    (found,) = maps(moved, [Point(1)]).items
    assert type(found) is Point
    assert found.x == 2


def test_further_arguments_stand_around_the_item(maps: Maps) -> None:
    ran = maps(lambda a, x, b, c: (a, x, b, c), [1], before=("a",), after=("b",), kwargs={"c": 4})
    assert ran.items == [("a", 1, "b", 4)]


def test_each_worker_is_initialised_once(maps: Maps) -> None:
    def begin() -> None:
        sys.opero_begun = getattr(sys, "opero_begun", 0) + 1  # type: ignore[attr-defined]

    assert set(maps(lambda _: sys.opero_begun, range(6), worker_init=begin).items) == {1}  # type: ignore[attr-defined]


def test_a_worker_is_replaced_after_its_share(maps: Maps) -> None:
    ran = maps(lambda _: os.getpid(), range(9), chunk=2, workers=1, max_tasks_per_worker=3)
    assert [ran.items.count(pid) for pid in dict.fromkeys(ran.items)] == [3, 3, 3]


def test_a_long_chunk_gives_the_rest_back(maps: Maps) -> None:
    ran = maps(lambda _: time.sleep(0.02), range(10), chunk=10, target_s=0.005)
    assert ran.items == [None] * 10
    assert any(isinstance(report, Lost) and report.why == "slow" for report in ran.reports)


def test_what_is_finished_is_reported_before_the_chunk_is(maps: Maps) -> None:
    ran = maps(lambda x: time.sleep(0.02) or x, range(4), chunk=4)
    assert [report.values for report in ran.reports if isinstance(report, Done)] == [
        [n] for n in range(4)
    ]


def test_retries_happen_in_the_worker_and_are_counted(maps: Maps) -> None:
    tried: dict[int, int] = {}

    def flaky(x: int) -> int:
        tried[x] = tried.get(x, 0) + 1
        if tried[x] < 3:
            raise ValueError(x)
        return x

    ran = maps(flaky, [7], retries=3, min_delay=0)
    (outcome,) = ran.items
    assert isinstance(outcome, ItemOutcome)
    assert (outcome.value, outcome.attempts, outcome.calls) == (7, 3, 3)
    (done,) = ran.reports
    assert isinstance(done, Done)
    assert done.facts
    assert done.facts.stats["failures"] == 2


def test_a_long_pause_is_not_slept_in_the_worker(maps: Maps) -> None:
    def fail(x: int) -> None:
        raise ValueError(x)

    (outcome,) = maps(fail, [7], retries=1, min_delay=5, parks=0.1).items
    assert outcome.retry_in >= 5
    ((_, error),) = outcome.parked.failures
    assert repr(error) == "ValueError(7)"


@every
def test_listeners_hear_what_happens_in_workers(maps: Maps) -> None:
    def fail(x: int) -> None:
        raise ValueError(x)

    ran = maps(fail, [7], on_event=lambda _: None)
    (done,) = ran.reports
    assert isinstance(done, Done)
    assert done.facts
    assert [type(event).__name__ for event in done.facts.events] == ["AttemptFailed", "CallGaveUp"]
    assert repr(done.facts.events[0].error) == "ValueError(7)"  # type: ignore[attr-defined]


def test_random_numbers_differ_between_workers(maps: Maps) -> None:
    def draw(_: int) -> tuple[float, float]:
        time.sleep(0.05)
        return random.random(), float(np.random.rand())

    drawn = maps(draw, range(2), workers=2).items
    assert len(set(drawn)) == 2
    assert len({b for _, b in drawn}) == 2


def test_a_worker_has_no_input(maps: Maps) -> None:
    assert maps(lambda _: sys.stdin.read(), [1]).items == [""]


@posix
def test_programs_that_a_worker_starts_obey_ctrl_c(maps: Maps) -> None:
    def handled(_: int) -> str:
        import subprocess

        code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
        return subprocess.check_output([sys.executable, "-c", code], text=True)

    assert maps(handled, [1]).items == ["True\n"]


@both
def test_programs_that_a_worker_starts_inherit_nothing_of_the_map(maps: Maps) -> None:
    def inherited(_: int) -> list[str]:
        fds = [fd for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
        return [str(fd.readlink()) for fd in fds if os.get_inheritable(int(fd.name))]

    [found] = maps(inherited, [1]).items
    assert not [fd for fd in found if "socket" in fd or "opero" in fd]


# --- large things ---------------------------------------------------------------------------------


def test_large_bytes_go_both_ways_at_once(maps: Maps) -> None:
    items = [bytes([n]) * 5_000_000 for n in range(6)]
    assert maps(lambda data: data[::-1], items, chunk=2).items == items


@every
def test_large_arrays_go_both_ways_and_can_be_written_to(maps: Maps) -> None:
    def doubled(array: Any) -> Any:
        array *= 2
        return array

    items = [np.full(131_072, n, dtype=np.float64) for n in range(6)]
    found = maps(doubled, items, chunk=2).items
    for n, array in enumerate(found):
        assert (array == 2 * n).all()
        array += 1
    assert (items[1] == 1).all()


@both
def test_no_array_changes_when_others_come_after_it(maps: Maps) -> None:
    kept: list[Any] = []

    def keeps(array: Any) -> Any:
        kept.append(array)
        # Whatever came before is still as it was.
        return array + 1, [one[-1] - one[0] for one in kept], len({one[0] for one in kept})

    items = [np.full(size, n) for n in range(60) for size in (10_000, 150_000)]
    for ran in (maps(keeps, items), maps(keeps, items, chunk=7)):
        for item, (array, spread, distinct) in zip(items, ran.items, strict=True):
            assert (array == item + 1).all()
            assert not any(spread)
            assert 2 * distinct >= len(spread)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_memory_of_a_map_is_that_of_what_is_under_way(maps: Maps) -> None:
    """However many large items and results have passed through it."""
    resident: list[int] = []

    def look() -> None:
        found = re.findall(
            r"memfd:opero-.*\n(?:.*\n)*?Rss: +(\d+)", Path("/proc/self/smaps").read_text()
        )
        resident.append(sum(map(int, found)))

    maps(lambda x: x + 1, [np.zeros(100_000)] * 100, seen=look)
    # A chunk at work and one at hand for each of two workers, and two buffers of each for its results, in KB.
    assert 0 < max(resident) <= 8 * 800 + 100


def test_arrays_inside_other_things_survive(maps: Maps) -> None:
    (found,) = maps(lambda x: {"a": [x["a"] + 1]}, [{"a": np.zeros((300, 300), order="F")}]).items
    assert (found["a"][0] == 1).all()


def test_arrays_around_what_travels_by_value_are_not_mixed_up(maps: Maps) -> None:
    # Plain pickling gives up after the first one.
    item = [np.zeros(100_000), lambda: 7, np.ones(100_000)]
    (found,) = maps(lambda x: [*x, np.full(100_000, 2.0)], [item]).items
    assert [found[n].sum() for n in (0, 2, 3)] == [0, 100_000, 200_000]
    assert found[1]() == 7


def test_a_readonly_array_stays_readonly(maps: Maps) -> None:
    array = np.zeros(100_000)
    array.flags.writeable = False
    assert maps(lambda x: x.flags.writeable, [array]).items == [False]


# --- errors ---------------------------------------------------------------------------------------


class OddError(Exception):
    def __init__(self, code: int, *, hint: str) -> None:
        super().__init__(f"{code}: {hint}")
        self.code = code


@both
def test_an_exception_with_an_odd_constructor_is_itself(maps: Maps) -> None:
    def fail(x: int) -> None:
        raise OddError(x, hint="no")

    error = maps(fail, [7]).errors()[0]
    assert type(error) is OddError
    assert (error.code, str(error)) == (7, "7: no")


def test_a_local_exception_is_of_the_same_class(maps: Maps) -> None:
    class LocalError(Exception):
        pass

    def fail(x: int) -> None:
        raise LocalError(x)

    assert type(maps(fail, [7]).errors()[0]) is LocalError


def test_causes_and_groups_come_along(maps: Maps) -> None:
    def fail(x: int) -> None:
        try:
            raise OddError(x, hint="inner")
        except OddError as error:
            raise ExceptionGroup("several", [KeyError("k"), OddError(2, hint="b")]) from error

    group = maps(fail, [7]).errors()[0]
    assert isinstance(group, ExceptionGroup)
    assert [type(e) for e in group.exceptions] == [KeyError, OddError]
    assert isinstance(group.__cause__, OddError)
    assert group.__cause__.code == 7


def test_the_traceback_of_the_worker_comes_as_text(maps: Maps) -> None:
    def fail_deep_inside(x: int) -> float:
        return 1 / x

    (outcome,) = maps(fail_deep_inside, [0]).items
    assert "fail_deep_inside" in outcome.trace


def test_an_exception_that_holds_a_lock_comes_without_it(maps: Maps) -> None:
    class HeldError(Exception):
        pass

    def fail(_: int) -> None:
        error = HeldError("held", threading.Lock())
        error.lock, error.code = threading.Lock(), 7  # type: ignore[attr-defined]
        raise error

    error = maps(fail, [1]).errors()[0]
    assert type(error) is HeldError
    assert error.code == 7  # type: ignore[attr-defined]
    assert error.args[0] == "held"


def test_an_exception_that_refuses_to_be_made_again_is_described(maps: Maps) -> None:
    def fail(_: int) -> None:
        class StubbornError(Exception):
            def __new__(cls, *args: Any) -> Any:
                if args != (1, 2):
                    raise TypeError("never")
                return super().__new__(cls, *args)

            def __init__(self, *_: Any) -> None:
                super().__init__("stubborn")

        raise StubbornError(1, 2)

    error = maps(fail, [1]).errors()[0]
    assert isinstance(error, RemoteError)
    assert "StubbornError: stubborn" in str(error)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, BaseException])
def test_what_would_end_the_worker_belongs_to_the_item(maps: Maps, kind: Any) -> None:
    def leave(x: int) -> int:
        if x == 1:
            raise kind(3)
        return x

    ran = maps(leave, range(4), chunk=4)
    assert [type(e) for e in ran.errors()] == [type(None), kind, type(None), type(None)]
    assert [ran.items[n] for n in (0, 2, 3)] == [0, 2, 3]


def test_a_result_that_cannot_be_pickled_costs_its_item(maps: Maps) -> None:
    ran = maps(lambda x: threading.Lock() if x == 1 else [x], range(3), chunk=3)
    assert [ran.items[0], ran.items[2]] == [[0], [2]]
    assert isinstance(ran.errors()[1], ShippingError)
    assert "the result, a _thread.lock" in str(ran.errors()[1])


def test_an_item_that_cannot_be_pickled_costs_itself(maps: Maps) -> None:
    ran = maps(lambda x: x, [0, threading.Lock(), 2], chunk=3)
    assert [ran.items[0], ran.items[2]] == [0, 2]
    assert isinstance(ran.errors()[1], ShippingError)
    assert "the item, a _thread.lock" in str(ran.errors()[1])


class Fragile:
    """Pickles, but cannot be unpickled."""

    def __reduce__(self) -> Any:
        return _break, ()


def _break() -> None:
    raise RuntimeError("broken on the way")


@pytest.mark.parametrize("way", ["in", "out"])
def test_what_cannot_be_unpickled_costs_its_item(maps: Maps, way: str) -> None:
    if way == "in":
        ran = maps(lambda x: x, [0, Fragile(), 2], chunk=3)
    else:
        ran = maps(lambda x: Fragile() if x == 1 else x, range(3), chunk=3)
    assert [ran.items[0], ran.items[2]] == [0, 2]
    assert isinstance(ran.errors()[1], ShippingError)
    assert "broken on the way" in str(ran.errors()[1])


# --- deaths ---------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize(
    ("maps", "way"),
    [
        *(("forkserver", way) for way in ("kill", "exit", "abort")),
        ("fork", "kill"),
        ("spawn", "exit"),
    ],
    indirect=["maps"],
)
def test_a_crash_costs_exactly_its_item(maps: Maps, way: str) -> None:
    def work(x: int) -> int:
        time.sleep(0.005)
        if x == 3:
            if way == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif way == "exit":
                os._exit(7)
            os.abort()
        return x

    ran = maps(work, range(8), chunk=4)
    lost = ran.items.pop(3)
    assert ran.items == [0, 1, 2, 4, 5, 6, 7]
    assert isinstance(lost, Lost)
    assert (lost.why, lost.exitcode) == ("crash", {"kill": -9, "exit": 7, "abort": -6}[way])
    assert lost.pid


@posix
def test_what_crashes_while_it_is_unpickled_is_named(maps: Maps) -> None:
    class Deadly:
        def __reduce__(self) -> Any:
            return os._exit, (9,)

    ran = maps(lambda x: x, [0, 1, Deadly(), 3], chunk=4)
    assert isinstance(ran.items[2], Lost)
    assert [ran.items[n] for n in (0, 1, 3)] == [0, 1, 3]


@posix
@pytest.mark.parametrize(
    ("how", "after"),
    [("bytes", 0.0), ("array", 0.001), ("array", 0.003), ("bytes", 0.01), ("array", 0.03)],
)
def test_a_kill_at_any_moment_of_a_large_message_is_no_hang(
    maps: Maps, how: str, after: float
) -> None:
    """Of the first chunks on their way in, of the item, or of its result on its way out."""
    items = [np.zeros(600_000) if how == "array" else bytes(5_000_000) for _ in range(4)]
    killed: list[int] = []

    def kill() -> None:
        while not killed:
            workers = maps.workers()
            if workers:
                time.sleep(after)
                killed.append(workers[0])
                with suppress(ProcessLookupError):  # a quick machine is done by then
                    os.kill(workers[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    ran = maps(lambda x: x, items)
    killed.append(0)
    thread.join()
    assert sum(isinstance(one, Lost) for one in ran.items) <= 1
    for one in ran.items:
        assert isinstance(one, Lost) or len(one) == len(items[0])


@both
@posix
def test_a_storm_of_kills_loses_nothing(maps: Maps) -> None:
    chance = random.Random(3)
    seen = kills = 0

    def storm() -> None:
        # By what has arrived and not by the clock, so that a slow machine comes forward too.
        nonlocal seen, kills
        seen += 1
        workers = maps.workers()
        if seen % 4 == 0 and workers:
            with suppress(ProcessLookupError):  # the last blow may have hit it already
                os.kill(chance.choice(workers), signal.SIGKILL)
                kills += 1

    def work(x: int) -> bytes:
        time.sleep(0.002)
        return bytes([x % 256]) * 100_000

    ran = maps(work, range(400), chunk=5, workers=3, seen=storm)
    assert kills > 10
    for n, one in enumerate(ran.items):
        assert isinstance(one, Lost) or one == bytes([n % 256]) * 100_000
    assert sum(isinstance(one, Lost) for one in ran.items) <= kills


@both
@posix
def test_the_death_of_the_fork_server_is_survived(maps: Maps) -> None:
    killed = []

    def work(x: int) -> int:
        time.sleep(0.02)
        return x

    def seen() -> None:
        if not killed:
            killed.extend(maps.servers())
            for server in killed:
                os.kill(server, signal.SIGKILL)

    assert maps(work, range(30), seen=seen, max_tasks_per_worker=3).items == list(range(30))
    assert killed


@posix
def test_ctrl_c_while_the_fork_server_begins_leaves_no_process(
    maps: Maps, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork, begun = os.fork, []

    def interrupted() -> int:
        if (pid := fork()) and not begun:
            begun.append(pid)
            signal.raise_signal(signal.SIGINT)
        return pid

    monkeypatch.setattr(os, "fork", interrupted)
    with pytest.raises(KeyboardInterrupt):
        maps(abs, [1])
    assert begun
    assert begun[0] not in maps.children()


@pytest.mark.parametrize("maps", ["forkserver"], indirect=True)
@posix
def test_a_fork_server_that_was_killed_between_two_maps_is_begun_anew(maps: Maps) -> None:
    (server,) = maps(lambda _: os.getppid(), [1]).items
    os.kill(server, signal.SIGKILL)
    assert maps.until(lambda: not maps.alive(server))
    assert maps(abs, [-1]).items == [1]


@pytest.mark.parametrize("maps", ["forkserver"], indirect=True)
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_process_that_the_fork_server_keeps_ready_may_be_killed(maps: Maps) -> None:
    (server,) = maps(lambda _: os.getppid(), [1]).items
    assert maps.until(lambda: any(map(maps.alive, maps.children(server))))
    for ready in maps.children(server):
        with suppress(ProcessLookupError):  # a worker that has just ended
            os.kill(ready, signal.SIGKILL)
    assert maps(abs, [-1, -2, -3]).items == [1, 2, 3]


@every
@posix
def test_an_item_without_end_costs_itself_in_time(maps: Maps) -> None:
    def work(x: int) -> int:
        if x == 3:
            time.sleep(60)
        return x

    began = time.monotonic()
    ran = maps(work, range(8), chunk=4, item_timeout=2, timeout=2)
    lost = ran.items.pop(3)
    assert isinstance(lost, Lost)
    assert lost.why == "timeout"
    assert ran.items == [0, 1, 2, 4, 5, 6, 7]
    assert time.monotonic() - began < 50


@posix
def test_time_between_calls_does_not_count(maps: Maps) -> None:
    tried: list[int] = []

    def work(x: int) -> int:
        tried.append(x)
        if len(tried) < 3:
            raise ValueError(x)
        return x

    (outcome,) = maps(
        work, [1], item_timeout=0.5, timeout=0.5, retries=3, min_delay=0.6, parks=9, jitter=False
    ).items
    assert outcome.value == 1


@pytest.mark.skipif(sys.platform != "linux", reason="needs limits that the kernel keeps")
def test_too_much_memory_is_an_error_of_the_item(maps: Maps) -> None:
    def work(x: int) -> int:
        return len(bytes(1_000_000_000 if x == 1 else 10))

    ran = maps(work, range(3), memory_limit=600_000_000)
    assert [ran.items[0], ran.items[2]] == [10, 10]
    assert isinstance(ran.errors()[1], MemoryError)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_that_no_limit_sees_is_seen_by_the_map(maps: Maps) -> None:
    def work(x: int) -> int:
        if x == 1:
            import mmap

            # Shared memory is no data of the process, so the kernel's limit does not count it.
            shared = mmap.mmap(-1, 500_000_000)
            for _ in range(480):
                shared.write(bytes(1_000_000))
            time.sleep(60)
        return x

    ran = maps(work, range(3), memory_limit=450_000_000)
    assert isinstance(ran.items[1], Lost)
    assert ran.items[1].why == "memory"
    assert [ran.items[0], ran.items[2]] == [0, 2]


# --- beginnings that fail -------------------------------------------------------------------------


@both
def test_an_initialiser_that_raises_is_reported(maps: Maps) -> None:
    def begin() -> None:
        raise ValueError("no licence")

    with pytest.raises(WorkerStartError, match=r"(?s)cannot start.*no licence"):
        maps(abs, range(9), worker_init=begin)


@every
@posix
def test_a_worker_that_dies_at_start_is_not_replaced_for_ever(maps: Maps) -> None:
    def begin() -> None:
        os.write(2, b"last words")
        os._exit(3)

    with pytest.raises(WorkerStartError, match=r"(?s)exit code 3.*last words"):
        maps(abs, range(9), worker_init=begin)


POOL = "opero.concurrency.executors.process.worker_pool"


@both
@posix
def test_workers_that_are_killed_while_they_start_are_replaced(
    maps: Maps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{POOL}._PAUSE", 0)
    monkeypatch.setattr(f"{POOL}._FAILED_STARTS", 2)
    monkeypatch.setattr(f"{POOL}._APART", 1000)

    def begin() -> None:
        with (tmp_path / "starts").open("a+") as file:
            file.write("x")
            if file.tell() <= 24:
                os.kill(os.getpid(), signal.SIGKILL)

    assert maps(abs, range(9), worker_init=begin).items == [*range(9)]


@posix
def test_workers_that_are_always_killed_while_they_start_end_the_map(
    maps: Maps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{POOL}._APART", 0)

    def begin() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerStartError, match="exit code -9"):
        maps(abs, range(9), worker_init=begin)


@both
def test_what_a_worker_says_while_it_starts_is_passed_on(maps: Maps, capfd: Any) -> None:
    maps(abs, [1], worker_init=lambda: os.write(2, b"loading\n"))
    assert capfd.readouterr().err == "loading\n"


@both
def test_what_cannot_travel_is_refused_at_once_but_needs_not_in_a_fork(maps: Maps) -> None:
    lock = threading.Lock()

    def guarded(_: int) -> bool:
        return lock.locked()

    if maps.method == "fork":
        assert maps(guarded, [1]).items == [False]
        return
    with pytest.raises(ShippingError, match=r"guarded cannot travel.*lock"):
        maps(guarded, [1])


# --- ends -----------------------------------------------------------------------------------------


@both
def test_closing_at_once_stops_what_runs(maps: Maps) -> None:
    engine = maps.engine(2)
    engine.open(maps.job_of(time.sleep))
    for n in range(4):
        engine.submit(Chunk(n, [n], [60]))
    workers: list[int] = []

    def both_there() -> bool:
        engine.poll(0.02)
        workers[:] = maps.workers()
        return len(workers) == 2

    assert maps.until(both_there)
    began = time.monotonic()
    engine.close(graceful=False, timeout=50)
    engine.close(graceful=False, timeout=50)
    assert time.monotonic() - began < 40
    assert not any(map(maps.alive, workers))


def test_wake_ends_a_poll(maps: Maps) -> None:
    engine = maps.engine(1)
    engine.open(maps.job_of(abs))
    try:
        engine.wake()
        assert engine.poll(20) == []
        timer = threading.Timer(0.05, engine.wake)
        timer.start()
        assert engine.poll(20) == []
        timer.join()
        assert engine.poll(0) == []
    finally:
        engine.close(graceful=True, timeout=1)
    engine.wake()


@pytest.mark.parametrize("maps", ["forkserver"], indirect=True)
def test_four_threads_map_at_once(maps: Maps) -> None:
    found: dict[int, list[int]] = {}

    def one(n: int) -> None:
        found[n] = maps(lambda x: x * n, range(20), chunk=3).items

    threads = [threading.Thread(target=one, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: [x * n for x in range(20)] for n in range(4)}


@both
def test_a_worker_may_map_itself(maps: Maps) -> None:
    def outer(n: int) -> list[int]:
        return maps(lambda x: x + n, range(3)).items

    assert maps(outer, [10, 20]).items == [[10, 11, 12], [20, 21, 22]]


@both
def test_a_default_timeout_of_sockets_does_not_concern_the_workers(maps: Maps) -> None:
    socket.setdefaulttimeout(0.05)
    try:
        assert maps(time.sleep, [0.3, 0.3, 0.3]).items == [None, None, None]
    finally:
        socket.setdefaulttimeout(None)
