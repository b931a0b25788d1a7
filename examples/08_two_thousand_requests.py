#!/usr/bin/env python3
# this_file: examples/08_two_thousand_requests.py
"""2,000 HTTP requests under a quota, in threads, coroutines and processes; each run is killed at half and goes on.

The server (`server.py`) enforces its quota over any one second and keeps its own books. This program is the parent: it
starts itself again as the client, kills it (SIGKILL) when the server has seen half of the requests, starts
it once more, and checks what came of it against the books.

    python examples/08_two_thousand_requests.py [REQUESTS]
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server import BadDayServer
from terminal import Claims, heading, say, table, use_utf8

from opero import operomap

if TYPE_CHECKING:
    from opero.concurrency import MapResult

LIMIT = 900
SCRIPT = "/page  quota=1000/1s  200"
MODES = ("thread", "async", "process")
UNDER_WAY = 64  # most requests that may be on their way when the client is killed


# --- the client: two functions, and a decorator ---------------------------------------------------


def fetch(page: int, url: str) -> int:
    """Fetch a page, as plain code does."""
    with urllib.request.urlopen(f"{url}/page?number={page}", timeout=10) as answer:  # noqa: S310 - our own server
        found: dict[str, Any] = json.load(answer)
    return int(found["query"].partition("=")[2])


async def afetch(page: int, url: str) -> int:
    """Fetch a page, as a coroutine."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        f"GET /page?number={page} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    )
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    if b" 200 " not in head.partition(b"\r\n")[0]:
        raise ConnectionError(head.partition(b"\r\n")[0].decode())
    return int(json.loads(body)["query"].partition("=")[2])


def client(mode: str, url: str, checkpoint: str, requests: int) -> None:
    """Fetch all pages; what an earlier run has written to the checkpoint is not fetched again."""
    options: dict[str, Any] = {
        "mode": mode,
        "workers": {"thread": 16, "async": 32, "process": 4}[mode],
        "rate_limit": LIMIT,
        "checkpoint": checkpoint,
        "cache": False,
        "cache_ignore": ("url",),  # the server has another port tomorrow
    }
    result: MapResult[int]
    if mode == "async":
        result = asyncio.run(operomap(**options)(afetch).map(range(requests), url))
    else:
        result = operomap(**options)(fetch).map(range(requests), url)
    result.raise_on_failure()
    assert result.values == list(range(requests))
    print(json.dumps({"resumed": result.resumed, "seconds": result.seconds}))


# --- the parent -----------------------------------------------------------------------------------


def program(mode: str, url: str, checkpoint: Path, requests: int) -> subprocess.Popen[str]:
    """Start the client as a program of its own."""
    command = [sys.executable, __file__, "client", mode, url, str(checkpoint), str(requests)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 - this very file


def run(server: BadDayServer, mode: str, folder: Path, requests: int) -> dict[str, Any]:
    """Run the client in one mode: kill it at half, and run it again."""
    server.reset()
    checkpoint = folder / f"{mode}.db"
    with program(mode, server.url, checkpoint, requests) as first:
        while server.calls("/page") < requests // 2:
            assert first.poll() is None, "the client ended before it could be killed"
            time.sleep(0.005)
        first.kill()
    time.sleep(0.05)
    half = server.calls("/page")
    with program(mode, server.url, checkpoint, requests) as second:
        output, _ = second.communicate()
    route = server.report()["routes"]["/page"]
    found: dict[str, Any] = json.loads(output or "{}")
    return {**found, "half": half, "calls": route["calls"], "quota": route["quota"]}


def main(requests: int) -> int:
    """Run all modes; return 0 if every claim holds."""
    use_utf8()
    began = time.perf_counter()
    print(f"{requests} requests at {LIMIT} a second; the server allows 1000 in any one second")
    found: dict[str, dict[str, Any]] = {}
    with BadDayServer(SCRIPT) as server, tempfile.TemporaryDirectory() as folder:
        for mode in MODES:
            found[mode] = run(server, mode, Path(folder), requests)

    heading("What the server saw, and what the second run took from the checkpoint")
    rows = [
        [
            *(mode, str(one["half"]), str(one.get("resumed", "✗")), str(one["calls"])),
            *(str(one["quota"]["worst_window"]), str(one["quota"]["rejected"])),
            f"{(one['calls'] - one['half']) / one.get('seconds', 1):.0f}/s",
        ]
        for mode, one in found.items()
    ]
    head = [
        "mode",
        "until the kill",
        "resumed",
        "calls",
        "fullest second",
        "refused",
        "rate after it",
    ]
    table(head, rows, numbers=head[1:])
    say("The limit holds for all workers of a mode together, also for four processes.")

    heading("Claims, checked against the server's own books")
    claims = Claims()
    for mode, one in found.items():
        claims.check(
            f"{mode}: no page was lost: {requests} pages, in order, by a run that was killed at half",
            "resumed" in one,
        )
        twice = one["calls"] - one["quota"]["rejected"] - requests
        claims.check(
            f"{mode}: at most what was on its way was asked for twice ({twice} of {requests})",
            0 <= twice <= UNDER_WAY,
        )
        claims.check(
            f"{mode}: the quota turned away {one['quota']['rejected']} of {one['calls']} calls",
            one["quota"]["rejected"] <= requests // 50,
        )
    return claims.finish(time.perf_counter() - began)


if __name__ == "__main__":
    if sys.argv[1:2] == ["client"]:
        client(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))
    else:
        sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else 2000))
