# this_file: benchmarks/durable/child.py
"""A contender in a process of its own: reads "row count" lines, answers with seconds."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from pathlib import Path
from time import perf_counter

REPLAYS = {"replay": 0, "replay_async": 1, "replay_gather": 2}


def main(module: str) -> None:
    # What a contender prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as folder:
        engine = importlib.import_module(f"benchmarks.durable.{module}").Engine(Path(folder))
        print("ready", file=answers, flush=True)
        prepared = 0
        for line in sys.stdin:
            row, count = line.split()[0], int(line.split()[1])
            try:
                if row in REPLAYS and prepared != count:
                    engine.prepare_replay(count)
                    prepared = count
                began = perf_counter()
                if row in REPLAYS:
                    engine.replay(count, REPLAYS[row])
                else:
                    getattr(engine, row)(count)
            except Exception as error:  # noqa: BLE001 - it is shown in the contender's cell
                print(
                    f"failed: {type(error).__name__}: {error}".replace("\n", " "),
                    file=answers,
                    flush=True,
                )
            else:
                print(perf_counter() - began, file=answers, flush=True)
        engine.stop()


if __name__ == "__main__":
    main(sys.argv[1])
