#!/usr/bin/env python3
# this_file: examples/05_one_429.py
"""Fifty callers, one "429, come back in 0.6 seconds": from its arrival on no call is made meanwhile."""

from __future__ import annotations

import asyncio
import time

from server import BadDayServer
from terminal import use_utf8

from opero import opero

CALLERS, PAUSE = 50, 0.6
SCRIPT = f"/busy  200*9 429({PAUSE}) 200"
begun: list[float] = []
refused: list[float] = []


class HTTPError(Exception):
    """An answer that is not 200; its headers are all that opero needs to see."""

    def __init__(self, status: int, headers: dict[str, str]) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status
        self.headers = headers


@opero(cache=False, rate_limit="30/s")
async def ask(host: str, port: int) -> None:
    """Get the busy page; a client library would do in the place of these lines."""
    begun.append(time.monotonic())
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"GET /busy HTTP/1.1\r\nHost: example\r\nConnection: close\r\n\r\n")
    head, _, _ = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    first, *lines = head.decode().splitlines()
    status = int(first.split()[1])
    if status != 200:
        refused.append(time.monotonic())
        raise HTTPError(status, dict(line.split(": ", 1) for line in lines))


async def main(url: str) -> None:
    """Ask with all callers at once."""
    host, port = url.removeprefix("http://").split(":")
    await asyncio.gather(*(ask(host, int(port)) for _ in range(CALLERS)))


use_utf8()
with BadDayServer(SCRIPT) as server:
    asyncio.run(main(server.url))
    log = server.log()

meanwhile = [at for at in begun if refused[0] < at < refused[0] + PAUSE]
last = max(entry.at for entry in log)

strip = ["·"] * (round(last / 0.025) + 1)
for entry in log:
    place = round(entry.at / 0.025)
    strip[place] = "✗" if entry.outcome == "429" else "▪" if strip[place] == "·" else strip[place]
for start in range(0, len(strip), 80):
    print(f"{start * 0.025:5.1f} s  {''.join(strip[start : start + 80])}")
print("         ▪ answered  ✗ 429  · no caller     one character is 25 ms of the server's time\n")
print(f"{ask.stats.calls} calls for {CALLERS} callers, {ask.stats.failures} of them refused")
print(f"calls in the {PAUSE} s that the server asked for: {len(meanwhile)}")
print(ask.explain())
