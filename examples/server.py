#!/usr/bin/env python3
# this_file: examples/server.py
"""An HTTP server that has a bad day, for examples and tests; standard library only.

It answers as real APIs do when they are flaky, slow, overloaded or metered, exactly as a short
script says (the language is described in `badday/script.py`), and it reports what it saw:

    with BadDayServer("/users  500*2 200") as server:
        httpx.get(server.url + "/users")
        print(server.report())

    python examples/server.py --port 8765 --script my_script.txt

`GET /report` returns the report, `POST /reset` starts afresh, `POST /v1/chat/completions` speaks
the chat-completions shape. One event loop in one background thread serves all clients, so every
count and quota is exact, by the server's own monotonic clock.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from badday.chat import error_body
from badday.desk import Desk, Reply
from badday.wire import WireError, render, take_request

if TYPE_CHECKING:
    from badday.ledger import Entry

DEFAULT_SCRIPT = """
/hello                                200
/flaky                                500*2 200          # fails its first two calls, then answers
/items                 per=id         503 200            # so does each item, once
/busy                                 429(0.2)*2 200     # asks to come back later
/slow                                 200@0.4
/stuck                                hang 200           # the first call never gets an answer
/mirror/dead                          reset
/mirror/torn                          drop
/mirror/good                          200
/search                quota=25/1s    200                # enforced over any one second
/v1/chat/completions   key=           401
/v1/chat/completions   key=sk-spent   429
/v1/chat/completions   model=gpt-4    503                # overloaded all day
/v1/chat/completions                  200
"""


class BadDayServer:
    """A local server with a script, in a thread of its own, on a free port.

    Args:
        script: What each route answers (see `badday/script.py`).
        host: Address to listen on.
        port: Port, or 0 for a free one.
        clock: Monotonic seconds that counts and quotas go by.

    Attributes:
        url: Where it listens, such as `http://127.0.0.1:40123`; set while it runs.
        dead_url: An address that refuses every connection while the server runs.
    """

    def __init__(
        self,
        script: str = DEFAULT_SCRIPT,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url = ""
        self.dead_url = ""
        self._address = (host, port)
        self._desk = Desk(script, clock)
        self._ready = threading.Event()
        self._failure: OSError | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, name="bad-day-server", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure:
            self._thread.join()
            raise self._failure
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def report(self) -> dict[str, Any]:
        """Return the counts since the start or the last reset, as `GET /report` does."""
        return self._desk.report()

    def log(self) -> list[Entry]:
        """Return the latest calls, oldest first: second, route, value of `per=`, outcome."""
        return self._desk.log()

    def calls(self, route: str) -> int:
        """Return how many calls a route saw, refused ones included; `route` as in the report."""
        found: int = self.report()["routes"][route]["calls"]
        return found

    def reset(self, script: str | None = None) -> None:
        """Forget all counts; play `script` from now on, or the old one from its start."""
        self._desk.reset(script)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        connections: set[_Connection] = set()
        host, port = self._address
        try:
            server = await self._loop.create_server(
                lambda: _Connection(self._desk, connections), host, port, backlog=1024
            )
        except OSError as error:
            self._failure = error
            self._ready.set()
            return
        # bound but not listening: the system refuses connections, and no other program gets the port
        with socket.socket() as dead:
            dead.bind((host, 0))
            self.url = f"http://{host}:{server.sockets[0].getsockname()[1]}"
            self.dead_url = f"http://{host}:{dead.getsockname()[1]}"
            self._ready.set()
            await self._stop.wait()
            server.close()
            for connection in list(connections):
                connection.close()
            await server.wait_closed()
            await asyncio.sleep(0)  # aborted transports close their sockets in the next round


class _Connection(asyncio.Protocol):
    """One client's connection: requests one after the other, kept alive until it says close."""

    def __init__(self, desk: Desk, connections: set[_Connection]) -> None:
        self._desk = desk
        self._connections = connections
        self._buffer = bytearray()
        self._pending: Reply | None = None
        self._closing = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        if self._timer:
            self._timer.cancel()
        if self._pending and not self._closing:
            self._desk.abandon(self._pending)

    def close(self) -> None:
        """Drop the client, whatever it waits for."""
        self._closing = True
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._answer_next()

    def _answer_next(self) -> None:
        while not self._pending and not self._transport.is_closing():
            try:
                request = take_request(self._buffer)
            except WireError as error:
                body = error_body(error.status, message=str(error))
                self._transport.write(render(error.status, body, {"Connection": "close"}))
                self._transport.close()
                return
            if request is None:
                return
            last = request.headers.get("connection", "").lower() == "close"
            reply = self._desk.reply(request)
            self._pending = reply
            if reply.delay:
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(reply.delay, self._send_late, reply, last)
            else:
                self._send(reply, last)

    def _send_late(self, reply: Reply, last: bool) -> None:
        self._send(reply, last)
        self._answer_next()

    def _send(self, reply: Reply, last: bool) -> None:
        if reply.kind == "hang":
            return
        self._pending = None
        if reply.kind == "reset":
            _reset(self._transport)
        elif reply.kind == "drop":
            self._transport.write(reply.data[: -len(reply.data) // 8])
            self._transport.close()
        else:
            self._transport.write(reply.data)
            if last:
                self._transport.close()


def _reset(transport: asyncio.Transport) -> None:
    """End a connection with RST, as a crashing peer does, instead of an orderly FIN."""
    linger = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    transport.abort()


def main() -> None:
    """Serve until Ctrl-C, then print the report."""
    parser = argparse.ArgumentParser(description="An HTTP server that has a bad day.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one")
    parser.add_argument("--script", type=Path, help="file with the routes to play")
    options = parser.parse_args()
    script = options.script.read_text(encoding="utf-8") if options.script else DEFAULT_SCRIPT
    with BadDayServer(script, host=options.host, port=options.port) as server:
        print(server.url, flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print(json.dumps(server.report(), indent=2))


if __name__ == "__main__":
    main()
