#!/usr/bin/env python3
# this_file: examples/03_shared_rate_limit.py
"""One rate limit for several functions, from coroutines and threads alike."""

from __future__ import annotations

import asyncio
import time

from opero import RateLimiter, opero

limiter = RateLimiter("20/second")
started: list[tuple[float, str]] = []


@opero(cache=False, rate_limit=limiter)
async def search(word: str) -> None:
    """Search: a coroutine."""
    started.append((time.monotonic(), f"search({word})"))


@opero(cache=False, rate_limit=limiter)
def details(word: str) -> None:
    """Look up details: a plain function, called from threads."""
    started.append((time.monotonic(), f"details({word})"))


async def main() -> None:
    """Ask for twelve calls at once."""
    await asyncio.gather(
        *(search(word) for word in ("ant", "bee", "cat", "dog", "eel", "fox")),
        *(asyncio.to_thread(details, word) for word in ("ant", "bee", "cat", "dog", "eel", "fox")),
    )


print(limiter)
asyncio.run(main())

# Calls start 50 ms apart; the second one may use the one slot of catch-up (burst=1).
first = started[0][0]
for at, name in sorted(started):
    print(f"{at - first:6.2f} s  {'·' * round((at - first) * 60)}{name}")
print(
    f"{len(started)} calls in {max(started)[0] - first:.2f} s, waited: {search.stats.waited:.2f} s"
    f" in search and {details.stats.waited:.2f} s in details"
)
