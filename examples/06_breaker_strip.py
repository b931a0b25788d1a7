#!/usr/bin/env python3
# this_file: examples/06_breaker_strip.py
"""A backend dies and comes back: what its circuit breaker does, as a strip of characters."""

from __future__ import annotations

import time
from urllib.error import HTTPError
from urllib.request import urlopen

from server import BadDayServer
from terminal import use_utf8

from opero import CircuitBreaker, events, opero
from opero.errors import CircuitOpenError

CALLERS, TICK = 70, 0.03
SCRIPT = "/price  200*12  503*4  200"
SIGNS = {"closed": "▁", "open": "█", "half_open": "▄"}

# After three failures in a row there are no calls for 0.2 s, then one probe; each that fails doubles the time.
changes: list[events.CircuitChanged] = []
breaker = CircuitBreaker("price", fail_max=3, reset_timeout=0.2, jitter=0)
breaker.subscribe(changes.append)


@opero(cache=False, retries=0, circuit_breaker=breaker)
def price(url: str) -> bytes:
    """Ask the backend."""
    with urlopen(f"{url}/price") as answer:  # noqa: S310 - the example's own server
        body: bytes = answer.read()
        return body


use_utf8()
callers, states = "", ""
with BadDayServer(SCRIPT) as server:
    for _ in range(CALLERS):
        states += SIGNS[breaker.state]
        try:
            price(server.url)
            callers += "·"
        except CircuitOpenError:
            callers += " "
        except HTTPError:
            callers += "✗"
        time.sleep(TICK)
    log = server.log()

print(f"callers  {callers}")
print(f"state    {states}")
print("         · answered  ✗ failed  (blank) refused at once     ▁ closed  █ open  ▄ half-open\n")
for change in changes:
    soon = f", again in {change.retry_after:.1f} s" if change.retry_after else ""
    print(f"{change.old_state} → {change.new_state}{soon}".replace("_", "-"))
dead = [entry for entry in log if entry.outcome == "503"]
print(f"\nof {CALLERS} callers {len(dead)} met the dead backend, the others were spared")
print(breaker)
