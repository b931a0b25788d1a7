#!/usr/bin/env python3
# this_file: examples/09_crashing_item.py
"""A CPU map with items that crash, hang and eat memory: each costs itself, and the others all arrive."""

from __future__ import annotations

import os
import time
from typing import Any

from opero import operomap

BAD: dict[int, str] = {7: "crash", 19: "hang", 23: "memory"}


@operomap(workers=2, retries=1, min_delay=0.01, timeout="1s", memory_limit="1GB", cache=False)
def count_primes(n: int) -> tuple[int, int]:
    """Count the primes below 200 × n, and return which process did it."""
    match BAD.get(n):
        case "crash":
            os._exit(11)  # as a fault in a C library does
        case "hang":
            time.sleep(3600)
        case "memory":
            return len(bytearray(4_000_000_000)), 0
    sieve = [True] * (200 * n)
    for p in range(2, int((200 * n) ** 0.5) + 1):
        sieve[p * p :: p] = [False] * len(sieve[p * p :: p])
    return sum(sieve[2:]), os.getpid()


events: list[Any] = []
began = time.perf_counter()
result = count_primes.with_options(on_event=events.append).map(range(1, 61))

print(f"{len(result.values)} of {result.total} counts arrived, the last is {result.values[-1][0]}")
for failure in result.failures:
    print(
        f"item {failure.item:>2}: {type(failure.error).__name__} after {failure.attempts} attempts"
    )
workers = {pid for _, pid in result.values}
print(
    f"{len(workers)} processes delivered; none of them was this one: {os.getpid() not in workers}"
)
print(f"retries heard of here: {sum(type(event).__name__ == 'RetryScheduled' for event in events)}")
print(f"an hour's sleep among them, and all over in {time.perf_counter() - began:.1f} s")

print("\nThe same for debugging: in this process, with real stack traces")
try:
    count_primes.with_options(sequential=True)(["five"])
except TypeError as error:
    trace, where = error.__traceback__, ""
    while trace is not None:
        where, trace = trace.tb_frame.f_code.co_name, trace.tb_next
    print(f"{type(error).__name__} in {where}(): {error}")
    print(error.__notes__[-1])
