#!/usr/bin/env python3
# this_file: examples/07_paid_batch.py
"""A batch of 500 paid calls is killed three times and started again, and no document is paid for twice."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from tempfile import TemporaryDirectory
from urllib.request import urlopen

from server import BadDayServer
from terminal import use_utf8

from opero import opero

DOCUMENTS, KILLS = 500, 3


def batch(service: str, folder: str) -> None:
    """Embed all documents, and say of each that it is done. This is what gets killed."""

    @opero(cache_backend=f"disk:{folder}", cache_ttl=None, cache_ignore=["service"])
    def embed(document: int, service: str) -> int:
        with urlopen(f"{service}/embed?document={document}") as answer:  # noqa: S310 - the example's own server
            return len(answer.read())

    for document in range(DOCUMENTS):
        embed(document, service)
        print(document, flush=True)


def run(service: str, folder: str, kill_after: int) -> list[int]:
    """Start the batch, kill it after so many documents, and return those that it said were done."""
    done: list[int] = []
    command = [sys.executable, __file__, service, folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 - itself
        for line in process.stdout or ():
            done.append(int(line))
            if len(done) == kill_after:
                time.sleep(random.uniform(0, 0.002))  # somewhere in the next calls
                process.kill()
    return done


def main() -> None:
    """Kill the batch three times, let it come to its end, and look into the server's books."""
    finished: set[int] = set()
    calls: Counter[str] = Counter()
    repeated = 0
    share = DOCUMENTS // KILLS
    kills = [share * n + random.randrange(10, share - 10) for n in range(KILLS)]
    with BadDayServer("/embed  per=document  200") as server, TemporaryDirectory() as folder:
        for number, goal in enumerate([*kills, DOCUMENTS + 1], 1):
            before, known = calls, len(finished)
            done = run(server.url, f"{folder}/results", goal)
            calls = Counter(entry.split for entry in server.log())
            again = sum(calls[str(document)] > before[str(document)] for document in finished)
            repeated += again
            finished.update(done)
            end = "killed" if goal <= DOCUMENTS else "reached the end"
            print(
                f"run {number}: {known:3} documents found, {calls.total() - before.total():3} calls paid, "
                f"{again} of them for finished documents; {end}"
            )
    print(f"\n{len(finished)} documents, {calls.total()} calls.")
    print(
        f"Calls of which the batch was killed before it had the answer: {calls.total() - DOCUMENTS}"
    )
    print(f"Finished calls that were repeated: {repeated}")


if __name__ == "__main__":
    use_utf8()
    if len(sys.argv) > 1:
        batch(*sys.argv[1:])
    else:
        main()
