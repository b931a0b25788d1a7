# this_file: tests/caching/stores/test_map_leases.py
"""What is computed once by maps and single calls of several processes. Real ones, really killed, on each store."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
from tests.crowd import Crowd

from opero import deadline, operomap
from opero.caching import lease
from opero.errors import DeadlineError, StoreError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Face

pytestmark = pytest.mark.internal

MAPS = """
from opero import operomap

MODE, ORDER = {mode!r}, slice(None, None, -1 if int(turn) % 2 else 1)

def body(x):
    note(f"call {{x}}")
    time.sleep(0.03)
    return [x]

async def abody(x):
    return body(x)

options |= dict(mode=MODE, workers=2, chunksize=1)
f = operomap(**options)(abody if "async" in MODE else body)

def run(*given):
    value = f(*given)
    return asyncio.run(held(value)) if "async" in MODE else value

async def held(value):
    return await value
"""
MODES = ["thread", "process", "async", "async_process"]


# --- processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "mode"),
    list(zip(["redis", "disk", "disk", "redis"], MODES, strict=True)),
    indirect=["place"],
)
def test_maps_over_the_same_items_in_opposite_order_compute_each_once(
    crowd: Crowd, mode: str
) -> None:
    body = MAPS.format(mode=mode) + "\nready()\nprint(run(list(range(30))[ORDER])[ORDER])"
    crowd.start(body, 2)
    crowd.go()
    assert crowd.outputs() == [str([[x] for x in range(30)])] * 2
    assert (crowd.calls(), crowd.kinds()) == (30, 30)


@pytest.mark.parametrize(
    ("place", "mode"), [("disk", "thread"), ("redis", "async")], indirect=["place"]
)
def test_a_single_call_waits_for_an_item_of_a_map(crowd: Crowd, mode: str) -> None:
    slow = MAPS.format(mode=mode).replace("0.03", "0.6")
    crowd.start(f"{slow}\nready()\nprint(run([1, 2]))")
    crowd.start(
        f"""{slow}
        ready()
        while not (folder / "calls").exists() or "call 2" not in (folder / "calls").read_text():
            time.sleep(0.01)
        one = f.one(2)
        print(asyncio.run(held(one)) if "async" in MODE else one)
        """.replace("\n        ", "\n")
    )
    crowd.go()
    assert crowd.outputs() == ["[[1], [2]]", "[2]"]
    assert crowd.calls() == 2


def test_a_map_works_on_other_items_while_another_computes_one(crowd: Crowd) -> None:
    program = MAPS.format(mode="thread")
    until = 'while "call 4" not in (folder / "calls").read_text(): time.sleep(0.01)'
    crowd.start(program.replace("time.sleep(0.03)", until) + "\nready()\nprint(f.one(1))")
    crowd.start(
        f"""{program}
        ready()
        while not (folder / "calls").exists():
            time.sleep(0.01)
        done = []
        f = f.with_options(workers=1, on_result=lambda one: done.append(one.index))
        print(f.map([1, 2, 3, 4]).values, done[:2])
        """.replace("\n        ", "\n")
    )
    crowd.go()
    assert crowd.outputs() == ["[1]", "[[1], [2], [3], [4]] [1, 2]"]
    assert crowd.calls() == 4


@pytest.mark.parametrize(
    ("place", "mode"), [("disk", "process"), ("redis", "thread")], indirect=["place"]
)
def test_a_killed_map_delays_others_by_seconds_at_most(crowd: Crowd, mode: str) -> None:
    forever = MAPS.format(mode=mode).replace("0.03", "600")
    (holder,) = crowd.start(f"short_leases()\n{forever}\nready()\nrun([1])")
    crowd.go()
    crowd.wait_for(lambda: crowd.calls("call 1") == 1)
    (waiting,) = crowd.start(f"{MAPS.format(mode='thread')}\nready()\nprint(run([1, 2]))")
    crowd.wait_for(lambda: crowd.calls("call 2") == 1)
    holder.kill()
    assert waiting.communicate(timeout=lease.SECONDS + 100)[0].strip() == "[[1], [2]]"
    assert crowd.calls("call 1") == 2


@pytest.mark.parametrize(
    ("place", "mode"),
    list(zip(["disk", "redis", "redis", "disk"], MODES, strict=True)),
    indirect=["place"],
)
def test_a_killed_run_resumes_and_pays_for_nothing_twice(
    crowd: Crowd, mode: str, store: Any, tmp_path: Path
) -> None:
    program = f"""
        from opero import operomap
        from pathlib import Path

        short_leases()

        def body(x):
            if x == 30 and not (folder / "again").exists():
                note("begin 30")
                time.sleep(600)
            note(f"call {{x}}")
            return [x]

        async def abody(x):
            return body(x)

        f = operomap(**options, mode={mode!r}, workers=1, chunksize=1)(
            abody if "async" in {mode!r} else body
        )
        ready()
        if "async" in {mode!r}:
            async def main():
                return await f.map(range(60))
            result = asyncio.run(main())
        else:
            result = f.map(range(60))
        print(result.values == [[x] for x in range(60)], result.hits)
        """.replace("\n        ", "\n")
    (first,) = crowd.start(program)
    crowd.go()
    crowd.wait_for(lambda: crowd.calls("begin 30") == 1)
    # What is finished is stored at once, and not when the map has nothing better to do.
    crowd.wait_for(lambda: len(list(store.scan("lease:"))) == 30)
    first.kill()
    (tmp_path / "crowd" / "again").touch()
    (second,) = crowd.start(program)
    assert second.communicate(timeout=100) == ("True 30\n", "")
    calls = Counter(
        line.rpartition(" ")[0] for line in (tmp_path / "crowd" / "calls").read_text().splitlines()
    )
    assert {calls[f"call {x}"] for x in range(60)} == {1}


def test_ctrl_c_ends_the_wait_for_another_process(crowd: Crowd) -> None:
    (holder,) = crowd.start(
        MAPS.format(mode="thread").replace("0.03", "600") + "\nready()\nf.one(1)"
    )
    (waiting,) = crowd.start(
        f"""{MAPS.format(mode="thread")}
        ready()
        while not (folder / "calls").exists():
            time.sleep(0.01)
        try:
            f.with_options(on_result=lambda one: note("done"))([1, 2])
        except KeyboardInterrupt:
            print("interrupted")
        """.replace("\n        ", "\n")
    )
    crowd.go()
    crowd.wait_for(lambda: crowd.calls("done"))
    waiting.send_signal(signal.SIGINT)
    assert waiting.communicate(timeout=100) == ("interrupted\n", "")
    assert holder.poll() is None
    assert crowd.calls("call 1") == 1


# --- in one process, where another process has the lease -------------------------------------------------


class World:
    """What the functions below do; they close over nothing, because that would be part of their names."""

    body: Callable[[int], Any] | None = None
    calls: list[int] = []  # noqa: RUF012 - made anew for each test


@pytest.fixture(autouse=True)
def world() -> None:
    World.body, World.calls = None, []


def work(x: int) -> Any:
    World.calls.append(x)
    return [x] if World.body is None else World.body(x)


class Stranger:
    """Another process that has leases."""

    def __init__(self, store: Any, f: Any) -> None:
        self._store = store
        self._f = f

    def acquire(self, item: int, seconds: float = 9) -> bool:
        return all(self._store.acquire([(self._f.cache.key(item).key, "another process")], seconds))

    def release(self, item: int) -> None:
        self._store.release([(self._f.cache.key(item).key, "another process")])


@pytest.fixture
def options(place: str, face: Face) -> dict[str, Any]:
    mode = "async" if face.asynchronous else "thread"
    return {"cache_backend": place, "retries": 0, "mode": mode, "workers": 1, "chunksize": 1}


@pytest.fixture
def f(options: dict[str, Any], face: Face) -> Any:
    return operomap(**options)(face.of(work))


@pytest.fixture
def other_process(store: Any, f: Any) -> Stranger:
    return Stranger(store, f)


def test_items_that_wait_take_no_place_from_others(
    f: Any, face: Face, other_process: Stranger
) -> None:
    for item in range(20):
        assert other_process.acquire(item)

    def saw(one: Any) -> None:
        if len(World.calls) == 20 and max(World.calls) == 39:
            for item in range(20):
                other_process.release(item)

    done = face.run(f.with_options(on_result=saw), range(40))
    assert done == [[x] for x in range(40)]
    assert (World.calls[:20], sorted(World.calls)) == (list(range(20, 40)), list(range(40)))


def test_equal_items_wait_together(f: Any, face: Face, other_process: Stranger) -> None:
    other_process.acquire(1)
    threading.Timer(0.3, other_process.release, [1]).start()
    result = face.run(f.map, [1, 1, 2, 1])
    assert (result.values, result.shared, World.calls) == ([[1], [1], [2], [1]], 2, [2, 1])


def test_what_was_computed_elsewhere_is_found(f: Any, face: Face, other_process: Stranger) -> None:
    other_process.acquire(1)

    def saw(one: Any) -> None:
        if one.item == 2:
            key = f.cache.key(1)
            cache = f.cache._cache
            cache.store.put(key.key, cache.entries.entry(key.key, ["theirs"], 60))

    result = face.run(f.with_options(on_result=saw).map, [1, 1, 2])
    assert (result.values, result.hits, World.calls) == ([["theirs"], ["theirs"], [2]], 2, [2])


@pytest.mark.parametrize("around", [True, False], ids=["around the map", "of each item"])
def test_a_deadline_ends_the_wait(
    options: dict[str, Any], face: Face, other_process: Stranger, around: bool
) -> None:
    other_process.acquire(1)
    f = operomap(**options, **({} if around else {"deadline": 1.0}))(face.of(work))
    face.run(f, [3])  # what is slow for the first time
    with deadline(1.0) if around else nullcontext():
        result = face.run(f.map, [1, 1, 2])
    assert [type(failure.error) for failure in result.failures] == [DeadlineError] * 2
    assert "another caller's result" in str(result.failures[0].error)
    assert (result.values, World.calls) == ([[2]], [3, 2])


def test_an_old_result_stands_in_when_the_deadline_ends_the_wait(
    options: dict[str, Any], face: Face, other_process: Stranger
) -> None:
    options |= {"cache_ttl": 0.05, "cache_stale_ttl": 60}
    f = operomap(**options)(face.of(work))
    face.run(f, [1])
    time.sleep(0.06)
    stranger = Stranger(f.cache._cache.store.backend, f)
    Crowd.wait_for(lambda: stranger.acquire(1))  # the map's own lease may still be on its way back
    result = face.run(f.with_options(deadline=1).map, [1])
    assert (result.values, result.stale, World.calls) == ([[1]], 1, [1])


def test_a_stop_token_ends_the_wait(f: Any, face: Face, other_process: Stranger) -> None:
    other_process.acquire(1)
    token = threading.Event()
    result = face.run(
        f.with_options(stop_token=token, on_result=lambda one: token.set()).map, [1, 2]
    )
    assert (result.status, result.values) == ("cancelled", [[2]])


def test_a_failing_item_ends_the_wait(f: Any, face: Face, other_process: Stranger) -> None:
    other_process.acquire(1)

    def body(x: int) -> Any:
        raise KeyError(x)

    World.body = body
    with pytest.raises(KeyError):
        face.run(f, [1, 2])
    assert World.calls == [2]


def test_a_cancelled_map_gives_its_leases_back(
    options: dict[str, Any], store: Any, place: str
) -> None:
    f = operomap(**options | {"mode": "async", "workers": 2})(asleep)
    other_process = Stranger(store, f)
    other_process.acquire(1)

    async def main() -> None:
        mapping = asyncio.ensure_future(f([1, 2]))
        while not World.calls:  # noqa: ASYNC110 - a global tells, not an event
            await asyncio.sleep(0.01)
        assert not other_process.acquire(2)
        mapping.cancel()
        await asyncio.gather(mapping, return_exceptions=True)

    asyncio.run(main())
    Crowd.wait_for(lambda: other_process.acquire(2))
    assert World.calls == [2]


async def asleep(x: int) -> Any:
    World.calls.append(x)
    await asyncio.sleep(60)


def test_an_item_that_failed_keeps_no_other_waiting(
    f: Any, face: Face, other_process: Stranger
) -> None:
    def body(x: int) -> Any:
        assert not other_process.acquire(x)
        raise KeyError(x)

    World.body = body
    assert len(face.run(f.map, [1, 2]).failures) == 2
    Crowd.wait_for(lambda: other_process.acquire(1))


def test_a_stopped_server_of_leases_keeps_no_caller_waiting(
    f: Any, face: Face, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(*owners: Any) -> Any:
        raise StoreError("down")

    monkeypatch.setattr(store, "acquire", down)
    if hasattr(store, "aacquire"):
        monkeypatch.setattr(store, "aacquire", down)
    assert face.run(f, [1, 2]) == [[1], [2]]


def test_leases_of_a_long_map_are_renewed_together(
    f: Any, face: Face, other_process: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SECONDS", 2.0)
    monkeypatch.setattr(lease, "_RENEW_AFTER", 0.1)
    taken: list[bool] = []

    def body(x: int) -> Any:
        time.sleep(2.5)
        taken.append(other_process.acquire(x))

    World.body = body
    face.run(f, [1])
    assert taken == [False]


def test_hits_need_no_lease(f: Any, face: Face, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    leases = f.cache._cache.leases
    acquire = leases.acquire

    def reported(wanted: Any, **how: Any) -> Any:
        asked.append(len(wanted))
        return acquire(wanted, **how)

    monkeypatch.setattr(leases, "acquire", reported)
    face.run(f, range(50))
    assert sum(asked) == 50
    face.run(f, range(50))
    assert sum(asked) == 50


def test_a_map_that_takes_over_from_a_cancelled_call_takes_a_lease_too(
    options: dict[str, Any], store: Any
) -> None:
    f = operomap(**options | {"mode": "async"})(nap)
    other_process = Stranger(store, f)

    async def main() -> Any:
        single = asyncio.ensure_future(f.one(1))
        while not World.calls:  # noqa: ASYNC110 - a global tells, not an event
            await asyncio.sleep(0.01)
        mapping = asyncio.ensure_future(f([1]))
        await asyncio.sleep(0.1)
        single.cancel()
        return await mapping

    taken: list[bool] = []
    World.body = lambda x: taken.append(other_process.acquire(x))
    assert asyncio.run(main()) == [1]
    assert (World.calls, taken) == ([1, 1], [False])


async def nap(x: int) -> int:
    World.calls.append(x)
    if len(World.calls) == 1:
        await asyncio.sleep(60)
    await asyncio.sleep(0.1)
    if World.body is not None:
        World.body(x)
    return x


def test_a_stream_waits_for_no_other_and_keeps_no_other_waiting(
    options: dict[str, Any], place: str
) -> None:
    """It stands still when its consumer does."""
    f = operomap(**options | {"mode": "thread"})(work)
    other_process = Stranger(f.cache._cache.store.backend, f)
    assert other_process.acquire(1)
    stream = f.stream([1, 2, 3])
    assert next(stream) == [1]
    assert other_process.acquire(2)
    assert list(stream) == [[2], [3]]


# --- maps that wait for themselves ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "mode"), [("redis", "thread"), ("disk", "process")], indirect=["place"]
)
def test_a_function_may_map_over_the_items_of_its_own_map(crowd: Crowd, mode: str) -> None:
    """Whoever computes already never waits: else each of these two would wait for the other one."""
    crowd.start(
        f"""
        from opero import operomap
        import threading
        inside = set()  # threads; travels to a worker process

        @operomap(**options, mode={mode!r}, workers=2, chunksize=1)
        def f(x):
            me = threading.get_ident()
            if me in inside:
                return x
            inside.add(me)
            try:
                time.sleep(0.3)
                f.one(3 - x)
                f.with_options(mode="thread")([1, 2])
                return x
            finally:
                inside.discard(me)

        ready()
        print(f([1, 2]))
        """.replace("\n        ", "\n")
    )
    crowd.go()
    assert crowd.outputs() == ["[1, 2]"]


def test_a_listener_of_a_map_may_map_again(options: dict[str, Any], place: str) -> None:
    """`on_result` runs in the map's own thread, which must not wait for itself."""
    f = operomap(**options | {"mode": "thread", "workers": 2})(work)
    World.body = lambda x: time.sleep(0.2 * x) or [x]
    again: list[Any] = []
    reported = f.with_options(on_result=lambda one: again or again.append(f([1, 2])))
    assert reported([1, 2]) == [[1], [2]]
    assert again == [[[1], [2]]]
