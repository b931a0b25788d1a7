#!/usr/bin/env python3
# this_file: examples/demo.py
"""Real HTTP calls on a bad day, with and without `@opero`.

A local server (`examples/server.py`) fails, stalls, tears connections down and enforces a quota.
The functions below call it through `httpx`. Each runs twice: as decorated, and as it was written.
The server keeps its own books, and every claim at the end is checked against them.

    python examples/demo.py
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx
from server import BadDayServer
from terminal import Claims, heading, indented, say, table, use_utf8

from opero import RateLimiter, failures, opero, operomap

if TYPE_CHECKING:
    from badday.ledger import Entry

    from opero.concurrency import MapResult

SCRIPT = """
/profile/ada           500*2 200            # two server errors, then an answer
/profile/bob           429(0.1) 200         # asks to come back, then answers
/profile/cleo          hang 200             # the first call is never answered
/south/*               drop                 # a mirror whose answers break off
/west/*                200@0.02             # a mirror that works, if slowly
/search                quota=30/1s 200      # a hard quota over any one second
/v1/chat/completions   model=gpt-4   503    # overloaded all day
/v1/chat/completions   200@0.05
/tile                  quota=70/1s   503*6 200   # refuses the first six calls
"""
QUESTION = "Why?"
CHAT = "/v1/chat/completions"

server = BadDayServer(SCRIPT)
web = httpx.Client(timeout=0.5, trust_env=False)
async_web = httpx.AsyncClient(timeout=0.5, trust_env=False)


# --- the functions: httpx as usual, and one decorator ---------------------------------------------


@opero(cache_ttl="5m", min_delay="50ms")
def profile(user: str) -> dict[str, Any]:
    """Fetch a user's profile."""
    answer = web.get(f"{server.url}/profile/{user}").raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


@opero(retries=1, min_delay="50ms", arg_fallback="mirror")
def download(name: str, mirror: str | tuple[str, ...] = ("north", "south", "west")) -> str:
    """Fetch a file from the first mirror that has it; no server listens at north."""
    base = server.dead_url if mirror == "north" else server.url
    return web.get(f"{base}/{mirror}/{name}").raise_for_status().text


@opero(retries=1, min_delay="50ms", arg_fallback="model")
async def ask(prompt: str, model: str | tuple[str, ...] = ("gpt-4", "gpt-3.5")) -> str:
    """Ask a language model."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}]}
    answer = (await async_web.post(server.url + CHAT, json=body)).raise_for_status()
    reply: str = answer.json()["choices"][0]["message"]["content"]
    return reply


limiter = RateLimiter("20/second")


@opero(cache=False, rate_limit=limiter)
async def search(page: int) -> dict[str, Any]:
    """Fetch one page of a search."""
    answer = (await async_web.get(f"{server.url}/search?page={page}")).raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


@opero(cache=False, rate_limit=limiter)
def count(word: str) -> dict[str, Any]:
    """Count a word's hits: another function, synchronous, under the same limit."""
    answer = web.get(f"{server.url}/search?count={word}").raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


@operomap(mode="process", workers=3, cache=False, retries=5, min_delay="20ms", rate_limit="50/s")
def tile(number: int, url: str) -> int:
    """Fetch and draw a tile, in one of three processes; tile 13 crashes the library that draws."""
    try:
        with urllib.request.urlopen(f"{url}/tile?number={number}", timeout=5) as answer:  # noqa: S310 - our own server
            found: str = json.load(answer)["query"]
    except urllib.error.HTTPError as refused:
        refused.close()  # it holds the connection, and may live as long as its traceback
        raise
    if number == 13:
        os._exit(11)
    return int(found.partition("=")[2])


# --- the same calls, with opero and without -------------------------------------------------------

Way = Callable[..., Callable[..., Any]]
Results = dict[str, list[Any]]  # per line of the table: receipts or plain results, or exceptions

PAGES = range(48)
TILES = range(30)
WORDS = [f"tide {year}" for year in range(2015, 2027)]


def through_opero(function: Any, **_first_choice: str) -> Callable[..., Any]:
    """Call a function as decorated, and get a receipt."""
    call: Callable[..., Any] = function.call
    return call


def plainly(function: Any, **first_choice: str) -> Callable[..., Any]:
    """Call a function as it was written, with the value one would choose without a fallback."""
    return partial(function.__wrapped__, **first_choice)


def sync_calls(way: Way) -> Results:
    """Make the synchronous calls one after the other."""
    calls: dict[str, tuple[Callable[..., Any], str]] = {
        "profile('ada')": (way(profile), "ada"),
        "profile('bob')": (way(profile), "bob"),
        "profile('cleo')": (way(profile), "cleo"),
        "download('tides.csv')": (way(download, mirror="north"), "tides.csv"),
    }
    return {name: [caught(function, argument)] for name, (function, argument) in calls.items()}


def caught(function: Callable[..., Any], argument: str) -> Any:
    """Return a call's result, or the exception in its place."""
    try:
        return function(argument)
    except httpx.HTTPError as error:
        return error


async def same_question(way: Way, times: int) -> list[Any]:
    """Ask the model one question several times at once."""
    asking = (way(ask, model="gpt-4")(QUESTION) for _ in range(times))
    return await asyncio.gather(*asking, return_exceptions=True)


async def metered_calls(way: Way) -> list[Any]:
    """Search and count at once, from coroutines and from threads: more than the quota allows."""
    return await asyncio.gather(
        *(way(search)(page) for page in PAGES),
        *(asyncio.to_thread(way(count), word) for word in WORDS),
        return_exceptions=True,
    )


def all_calls(way: Way, runner: asyncio.Runner) -> Results:
    """Make every call of the demo."""
    return {
        **sync_calls(way),
        f"5 × ask({QUESTION!r})": runner.run(same_question(way, 5)),
        f"{len(PAGES)} × search, {len(WORDS)} × count": runner.run(metered_calls(way)),
    }


def repeated_calls(runner: asyncio.Runner) -> Results:
    """Make the cached calls once more."""
    again = {**sync_calls(through_opero), "ask(...)": runner.run(same_question(through_opero, 1))}
    return {f"{name} again": results for name, results in again.items()}


# --- telling what came of it ----------------------------------------------------------------------


def report(decorated: Results, plain: Results) -> None:
    """Print a line per call: what the receipts say, and how it went without opero."""
    head = ["call", "with opero", "source", "calls", "paused", "waited", "without opero"]
    rows = [
        [name, *receipt_cells(results), plain_cell(plain.get(name, []))]
        for name, results in decorated.items()
    ]
    table(head, rows, numbers=["calls", "paused", "waited"])


def receipt_cells(receipts: list[Any]) -> list[str]:
    """Sum up the receipts of one line: values used, sources, real calls, longest pauses."""
    if any(isinstance(receipt, Exception) for receipt in receipts):
        return [plain_cell(receipts), "", "", "", ""]
    values = dict.fromkeys(receipt.fallback for receipt in receipts if receipt.fallback)
    return [
        " ".join(["✓", *values]),
        "+".join(dict.fromkeys(receipt.source for receipt in receipts)),
        str(sum(receipt.calls for receipt in receipts)),
        seconds(max(receipt.slept for receipt in receipts)),
        seconds(max(receipt.waited for receipt in receipts)),
    ]


def errors(results: Results) -> int:
    """Count the calls that failed."""
    return sum(isinstance(result, Exception) for line in results.values() for result in line)


def plain_cell(results: list[Any]) -> str:
    """Say how the calls of one line ended."""
    failed = [result for result in results if isinstance(result, Exception)]
    if not failed:
        return "✓" if results else ""
    many = f"{len(failed)} of {len(results)}: " if len(results) > 1 else ""
    return f"✗ {many}{kind(failed[0])}"


def kind(error: Exception) -> str:
    """Name an error briefly."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"HTTP {error.response.status_code}"
    return type(error).__name__


def seconds(value: float) -> str:
    """Format a pause; nothing for none."""
    return f"{value:.2f} s" if value >= 0.005 else ""


def arrivals(log: list[Entry]) -> str:
    """Count the searches that came in, for each quarter of a second from the first."""
    times = [entry.at for entry in log if entry.route == "/search"]
    quarters = Counter(int((at - times[0]) * 4) for at in times)
    return " ".join(f"{quarters[nth]:>2}" for nth in range(max(quarters) + 1))


def last_error() -> Exception | None:
    """Fail for good: both mirrors are broken."""
    try:
        download("tides.csv", mirror=("north", "south"))
    except httpx.HTTPError as error:
        return error
    return None


def check_claims(
    claims: Claims, decorated: Results, again: Results, books: dict[str, Any], unseen: int
) -> None:
    """Hold what the receipts say against what the server wrote down."""
    routes = books["routes"]
    for user, calls in (("ada", 3), ("bob", 2), ("cleo", 2)):
        seen = routes[f"/profile/{user}"]
        claims.check(
            f"profile({user!r}) took {calls} calls; the server saw {describe(seen['outcomes'])}",
            decorated[f"profile({user!r})"][0].calls == seen["calls"] == calls,
        )
    (file,) = decorated["download('tides.csv')"]
    claims.check(
        "download() came from the third mirror: north refuses connections, south breaks off",
        file.fallback == "west" and file.calls == 3 and routes["/west/*"]["calls"] == 1,
    )
    answers = decorated[f"5 × ask({QUESTION!r})"]
    claims.check(
        "5 equal questions at once were one: gpt-4 refused once, gpt-3.5 answered once",
        len({receipt.value for receipt in answers}) == 1
        and routes[f"{CHAT} model=gpt-4"]["calls"] == 1
        and books["usage"]["gpt-3.5"]["requests"] == 1,
    )
    claims.check(
        f"{len(again)} repeated calls came from the cache; the server saw {unseen} calls meanwhile",
        unseen == 0 and all(receipt.source == "hit" for [receipt] in again.values()),
    )
    quota = routes["/search"]["quota"]
    claims.check(
        f"the quota of {quota['limit']} calls in any second was never broken: at most"
        f" {quota['worst_window']} came, and {quota['rejected']} of"
        f" {routes['/search']['calls']} were refused",
        routes["/search"]["outcomes"] == {"200": len(PAGES) + len(WORDS)}
        and quota["worst_window"] <= quota["limit"],
    )


def check_tiles(claims: Claims, tiles: MapResult[int], seen: dict[str, Any]) -> None:
    """Hold what the map reports against what the server wrote down."""
    lost = [failure.item for failure in tiles.failures]
    claims.check(
        f"{len(tiles.values)} of {len(TILES)} tiles came from worker processes, though the server"
        " refused six calls; the one that killed its process cost no other tile",
        lost == [13] and tiles.values == [n for n in TILES if n != 13],
    )
    quota = seen["quota"]
    claims.check(
        f"one limit held for all processes: at most {quota['worst_window']} calls came in any second,"
        f" {quota['limit']} were allowed, {quota['rejected']} of {seen['calls']} turned away",
        quota["rejected"] == 0 and seen["calls"] >= len(TILES) + 6,
    )


def describe(outcomes: dict[str, int]) -> str:
    """Put counts into words: "2 × 500, 1 × 200"."""
    return ", ".join(f"{count} × {outcome}" for outcome, count in outcomes.items())


def main() -> int:
    """Run the demo; return 0 if every claim holds."""
    use_utf8()
    started = time.perf_counter()
    claims = Claims()
    print("opero on a bad day: real HTTP calls to a local server that plays this script")
    indented(SCRIPT)

    heading("What the decorators do, in the functions' own words: explain()")
    for function in (profile, download, ask, search, tile):
        indented(str(function.explain()))
        print()

    with server, web, asyncio.Runner() as runner:
        decorated = all_calls(through_opero, runner)
        books = server.report()
        again = repeated_calls(runner)
        unseen = server.report()["calls"] - books["calls"]
        tiles = tile.map(TILES, server.url)
        drawn = server.report()["routes"]["/tile"]
        error = last_error()
        log = server.log()
        server.reset()
        plain = all_calls(plainly, runner)
        runner.run(async_web.aclose())

    heading("What happened to each call, and to the same call without opero")
    report(decorated | again, plain)

    heading("The quota: searches that reached the server in each quarter of a second")
    indented(f"with opero     {arrivals(log)}")
    indented(f"without opero  {arrivals(server.log())}")
    say(
        "The limit is 20 a second and one slot of catch-up; a call that has to open a connection"
        " arrives a little after it starts."
    )

    heading("A map in three processes: six calls are refused, and one tile kills its process")
    indented(repr(tiles))

    heading("When nothing helps: httpx's own error, with a note")
    if error:
        indented(f"{type(error).__module__}.{type(error).__name__}: {error}")
        indented("\n".join(error.__notes__))

    heading("Claims, checked against the server's own books")
    total, lost, failed = sum(map(len, decorated.values())), errors(decorated), errors(plain)
    claims.check(
        f"{total - lost} of {total} calls were answered; without opero {failed} failed",
        not lost and failed > 0,
    )
    if not lost:
        check_claims(claims, decorated, again, books, unseen)
    check_tiles(claims, tiles, drawn)
    claims.check(
        "with two broken mirrors the error is the last call's own, and failures() has all four",
        isinstance(error, httpx.RemoteProtocolError) and len(failures(error)) == 4,
    )
    return claims.finish(time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
