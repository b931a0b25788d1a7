# this_file: tests/caching/stores/test_redis_connections.py
"""Connections to a real server: used again, closed in time, never by two at once."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from opero import clear_cache, opero
from opero.caching.stores import redis, redis_connections
from opero.caching.stores.base import Backoff, open_store
from opero.caching.stores.redis import RedisStore
from opero.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

    from tests.redis_server import RedisServer

pytestmark = pytest.mark.internal


@pytest.fixture
def server(own_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> RedisServer:
    """One whose clients are those of the test, and which a busy machine may keep waiting."""
    monkeypatch.setattr(redis_connections, "_CONNECT", 20.0)
    monkeypatch.setattr(redis_connections, "_ANSWER", 20.0)
    return own_server


@pytest.fixture
def store(server: RedisServer) -> RedisStore:
    return RedisStore(server.url)


def clients(server: RedisServer) -> int:
    """How many connections there are, beside the one that asks."""
    reported = server.do("INFO", "clients")
    assert isinstance(reported, dict)
    return int(reported["connected_clients"]) - 1


def test_one_thread_uses_one_connection(store: RedisStore, server: RedisServer) -> None:
    before = clients(server)
    for n in range(100):
        store.set(f"k{n}", b"1", None)
    assert clients(server) == before + 1
    store.close()
    assert clients(server) == before


def test_hundreds_of_threads_do_not_run_out_of_connections(store: RedisStore) -> None:
    """The library's own pool ends at a hundred."""
    together = threading.Barrier(150)

    def use(n: int) -> bytes | None:
        together.wait(20)
        store.set(f"k{n}", b"%d" % n, None)
        return store.get(f"k{n}")

    with ThreadPoolExecutor(150) as pool:
        assert list(pool.map(use, range(150))) == [b"%d" % n for n in range(150)]
    store.close()


def test_a_connection_that_has_been_idle_for_long_is_not_trusted(
    store: RedisStore, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands in between may have forgotten it, and would swallow what is sent."""
    store.set("k", b"1", None)
    reported = server.do("INFO", "stats")
    monkeypatch.setattr(redis_connections, "FRESH_SECONDS", 0.0)
    assert store.get("k") == b"1"
    now = server.do("INFO", "stats")
    assert isinstance(reported, dict)
    assert isinstance(now, dict)
    # One connection is that which asks.
    assert now["total_connections_received"] - reported["total_connections_received"] == 2
    store.close()


def test_so_is_one_of_an_event_loop(
    store: RedisStore, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_connections, "FRESH_SECONDS", 0.0)

    async def main() -> None:
        for _ in range(5):
            assert await store.aget("k") is None
        assert clients(server) == 1

    asyncio.run(main())


@pytest.mark.parametrize("moment", ["last", "before"])
def test_a_store_that_is_dropped_with_its_loop_leaves_no_connection_open(
    server: RedisServer, moment: str
) -> None:
    """What closes its connections runs in a task then, which is cancelled with the loop's other tasks."""
    before = clients(server)

    async def main() -> None:
        store = RedisStore(server.url)
        await asyncio.gather(*(store.aget("k") for _ in range(5)))
        assert clients(server) == before + 1
        del store
        if moment == "before":
            await asyncio.sleep(0)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(main())
        gc.collect()
    assert [str(warning.message) for warning in caught] == []
    assert clients(server) == before


def test_a_command_at_the_very_end_of_a_loop_leaves_no_connection_open(
    store: RedisStore, server: RedisServer
) -> None:
    before = clients(server)

    async def last() -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            await asyncio.sleep(0.05)
            await store.aget("k")

    async def main() -> None:
        await store.aget("k")
        generator = last()
        await anext(generator)
        unfinished.append(generator)

    unfinished: list[object] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(main())
        unfinished.clear()
        gc.collect()
    assert [str(warning.message) for warning in caught] == []
    assert clients(server) == before


def test_a_refused_command_leaves_the_connection_as_it_was(
    store: RedisStore, server: RedisServer
) -> None:
    server.do("LPUSH", "opero:cache:list", "x")
    before = clients(server)
    for _ in range(20):
        with pytest.raises(StoreError):
            store.get("list")
    store.set("k", b"1", None)
    assert (store.get("k"), clients(server)) == (b"1", before + 1)
    store.close()


def test_ctrl_c_within_a_command_spoils_no_later_answer(
    store: RedisStore, server: RedisServer
) -> None:
    class Interrupted(BaseException):
        pass

    def interrupt(*given: object) -> None:
        raise Interrupted

    for n in range(3):
        store.set(f"k{n}", b"%d" % n, None)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        server.freeze()
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Interrupted):
            store.get("k0")
    finally:
        server.thaw()
        signal.signal(signal.SIGALRM, before)
    assert [store.get(f"k{n}") for n in (1, 2)] == [b"1", b"2"]
    store.close()


def test_threads_that_go_on_after_a_close_leave_nothing_open(
    store: RedisStore, server: RedisServer
) -> None:
    before = clients(server)
    ended = threading.Event()

    def use() -> None:
        while not ended.is_set():
            store.set("k", b"1", None)

    with ThreadPoolExecutor(4) as pool:
        using = [pool.submit(use) for _ in range(4)]
        for _ in range(20):
            time.sleep(0.005)
            store.close()
        ended.set()
        for each in using:
            each.result()
    store.close()
    for _ in range(500):  # the server notices a moment later
        if clients(server) == before:
            return
        time.sleep(0.02)
    raise AssertionError("connections are left")


def test_a_refusal_among_many_answers_is_raised_and_the_connection_goes_on(
    store: RedisStore, server: RedisServer
) -> None:
    store.set("k", b"1", None)
    before = clients(server)
    with pytest.raises(StoreError, match="ResponseError"):
        store._ask(redis._VALUE, ("GET", "x"), ("LPUSH", b"opero:cache:k", "1"), ("SET", "x", "2"))
    assert store._ask(bytes, ("GET", "x"), ("GET", b"opero:cache:k")) == [b"2", b"1"]
    assert clients(server) == before


def test_many_are_asked_over_a_connection_that_the_server_has_closed(
    store: RedisStore, server: RedisServer
) -> None:
    store.set("k", b"1", None)
    server.do("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    assert store.get_many(["k", "j"]) == [b"1", None]
    server.do("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    assert store.acquire([("k", "me"), ("j", "me")], 30) == [True, True]


def test_answers_to_an_event_loop_may_come_in_any_pieces() -> None:
    sent = b"$0\r\n\r\n$5\r\na\r\nbc\r\n:1\r\n:0\r\n+OK\r\n"

    async def main(size: int) -> list[object]:
        connection, loop = (
            redis_connections.LoopConnection(None, Backoff()),
            asyncio.get_running_loop(),
        )
        wanted = [1, 1, 2, 1]
        waiting = [(loop.create_future(), count, list[object]()) for count in wanted]
        waiting[1][0].cancel()  # whose answer comes all the same
        connection._waiting.extend(waiting)
        for start in range(0, len(sent), size):
            connection.data_received(sent[start : start + size])
        return [future.result() for future, _, _ in waiting if not future.cancelled()]

    for size in range(1, len(sent) + 1):
        assert asyncio.run(main(size)) == [[b""], [1, 0], [b"OK"]]


def test_tasks_of_an_event_loop_share_one_connection_whatever_they_ask_for(
    store: RedisStore, server: RedisServer
) -> None:
    values = {f"k{n}": bytes([n]) * (1 << n) for n in range(20)}
    for key, value in values.items():
        store.set(key, value, None)
    store.close()

    async def main() -> None:
        keys = list(values) * 3
        assert await asyncio.gather(*map(store.aget, keys)) == [values[key] for key in keys]
        assert clients(server) == 1

    asyncio.run(main())


def test_what_is_asked_over_a_connection_that_breaks_is_asked_again(store: RedisStore) -> None:
    store.set("k", b"1", None)

    async def main() -> None:
        assert await store.aget("k") == b"1"
        asking = [asyncio.create_task(store.aget("k")) for _ in range(5)]
        await asyncio.sleep(0)
        store._loops[asyncio.get_running_loop()]._transport.abort()
        assert await asyncio.gather(*asking) == [b"1"] * 5

    asyncio.run(main())
    store.close()


@contextmanager
def answering(*pieces: bytes, pause: float = 0.0) -> Iterator[str]:
    """The address of a server that answers whatever it gets with these pieces."""
    clients: list[socket.socket] = []

    def talk(client: socket.socket) -> None:
        with client, suppress(OSError):
            while client.recv(1000):
                for piece in pieces:
                    client.sendall(piece)
                    time.sleep(pause)

    def serve() -> None:
        with suppress(OSError):
            while True:
                clients.append(listening.accept()[0])
                threads.submit(talk, clients[-1])

    with ThreadPoolExecutor() as threads, socket.create_server(("127.0.0.1", 0)) as listening:
        serving = threads.submit(serve)
        yield f"redis://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        serving.result(20)
        for client in clients:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)


WAYS = pytest.mark.parametrize(
    "get", [RedisStore.get, lambda store, key: asyncio.run(store.aget(key))], ids=["thread", "loop"]
)


@WAYS
@pytest.mark.parametrize("database", [0, 1])
@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"$ten\r\n",
        b":\r\n",
        b"*1\r\n$1\r\n1\r\n",
        b"*99999999\r\n" + b"*1\r\n" * 1000,
        b"$99999999999\r\n",
        b"$" + b"9" * 5000 + b"\r\n",
        b"+" + bytes(1 << 17),
    ],
    ids=range(8),
)
def test_a_server_that_is_no_redis_is_one_that_cannot_be_reached(
    get: Callable[[RedisStore, str], object],
    database: int,
    answer: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with answering(answer) as url:
        store = RedisStore(f"{url}/{database}")
        with pytest.raises(StoreError, match="cannot be reached"):
            get(store, "k")
        store.close()
    assert not caplog.records


@WAYS
def test_an_answer_that_trickles_is_not_waited_for(
    get: Callable[[RedisStore, str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_connections, "_ANSWER", 0.05)
    with answering(b"$50\r\n", *[b"x"] * 50, b"\r\n", pause=0.01) as url:
        store = RedisStore(url)
        with pytest.raises(StoreError, match="does not answer"):
            get(store, "k")
        store.close()


@pytest.mark.parametrize(
    "answer", [b":5\r\n", b"+OK\r\n", b"$-1\r\n", b"$1\r\n\x92\r\n", b"$4\r\n\x92\x01\x91\x01\r\n"]
)
def test_answers_of_another_kind_are_errors_of_the_store_by_its_name(answer: bytes) -> None:
    with answering(answer) as url:
        f = opero(cache_backend=url, retries=0)(lambda x: x + 1)
        assert f(1) == 2
        assert f.cache.info().size is None
        for clear in (f.cache.clear, lambda: clear_cache(backend=url)):
            with pytest.raises(StoreError, match=f"{url} does not answer as Redis does"):
                clear()
        open_store(url).close()


def test_what_other_programs_keep_there_under_no_text_is_listed(
    store: RedisStore, server: RedisServer
) -> None:
    server.do("SET", b"opero:cache:\xff", b"x")
    assert [item.key for item in store.scan("")] == ["\\xff"]
    store.close()


def test_tasks_that_wait_for_one_that_is_cancelled_while_it_connects_get_a_connection() -> None:
    """Neither the connection that is given up nor the one that follows is left open."""

    async def main() -> None:
        greeted, ended = asyncio.Queue[None](), asyncio.Queue[None]()
        goes_on = asyncio.Event()

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while received := await reader.read(1000):
                if b"SELECT" in received:
                    greeted.put_nowait(None)
                    await goes_on.wait()
                answers = b"+OK\r\n" * received.count(b"SELECT")
                with suppress(ConnectionError):
                    writer.write(answers + b"$1\r\nx\r\n" * received.count(b"GETRANGE"))
            writer.close()
            ended.put_nowait(None)

        async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
            store = RedisStore(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/1")
            tasks = [asyncio.create_task(store.aget("k")) for _ in range(5)]
            for opener in tasks[:2]:
                await greeted.get()
                opener.cancel()
            await greeted.get()
            goes_on.set()
            assert await asyncio.gather(*tasks[2:]) == [b"x"] * 3
            await store._loops[asyncio.get_running_loop()].closer.aclose()
            for _ in range(3):
                await ended.get()

    asyncio.run(asyncio.wait_for(main(), 20))
