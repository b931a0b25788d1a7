#!/usr/bin/env python3
# this_file: benchmarks/run.py
"""Run the suite and write the report: `python benchmarks/run.py --help`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

_HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    # Started as a file, Python puts this folder first; the package lies one above.
    sys.path[0] = str(_HERE.parent)

from benchmarks import accuracy, imports, maps, memory, overhead, results, tasks  # noqa: E402 - see above
from benchmarks.durable import rows as durable  # noqa: E402
from benchmarks.harness import QUICK, Effort  # noqa: E402
from benchmarks.report import render  # noqa: E402

ACCURACY = "accuracy"


def measure(wanted: Sequence[str], effort: Effort) -> results.Results:
    """Measure on this interpreter what the words in `wanted` name; everything if there are none."""
    random = Random(0)
    measurements: dict[str, Callable[[], results.RowResult]] = {
        row.name: partial(overhead.measure, row, effort, random)
        for row in (*overhead.ROWS, *tasks.TASKS)
    }
    measurements |= {name: partial(imports.measure, name, effort, random) for name in imports.ROWS}
    measurements |= {name: partial(memory.measure, name) for name in memory.ROWS}
    measurements |= {name: partial(maps.measure, name, effort, random) for name in maps.ROWS}
    measurements |= {name: partial(tasks.measure, name, effort, random) for name in tasks.ROWS}
    measurements |= {name: partial(durable.measure, name, effort, random) for name in durable.ROWS}
    found: results.Results = {"meta": results.describe(effort), "rows": {}, "accuracy": []}
    for name, measurement in measurements.items():
        if _is_wanted(name, wanted):
            _say(name)
            found["rows"][name] = measurement()
    if _is_wanted(ACCURACY, wanted):
        _say(ACCURACY)
        if effort is QUICK:
            subject = accuracy.LIMITERS[:1]
            found["accuracy"] = list(accuracy.measure(effort, accuracy.QUICK_RATES, subject))
        else:
            found["accuracy"] = list(accuracy.measure(effort))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite on this interpreter and the ones named, and write or print the report."""
    options = _parser().parse_args(arguments)
    partial = (options.quick or options.rows) and not options.keep
    with TemporaryDirectory() as scratch:
        folder = options.output or (Path(scratch) if partial else _HERE)
        effort = QUICK if options.quick else Effort()
        results.save(measure(options.rows, effort), folder / "results", into=options.keep)
        for python in options.pythons:
            _run_on(python, options, folder)
        page = render(results.load(folder / "results"))
        if partial and options.output is None:
            print(page)
        else:
            (folder / "RESULTS.md").write_text(page, encoding="utf-8")
            _say(f"written: {folder / 'RESULTS.md'}")
    return 0


def _run_on(python: str, options: argparse.Namespace, folder: Path) -> None:
    command = [python, str(_HERE / "run.py"), "--output", str(folder)]
    if options.quick:
        command.append("--quick")
    if options.keep:
        command.append("--keep")
    if options.rows:
        command += ["--rows", *options.rows]
    _say(python)
    subprocess.run(command, check=True)  # noqa: S603 - the user names the interpreters


def _is_wanted(name: str, wanted: Sequence[str]) -> bool:
    return not wanted or any(word in name for word in wanted)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="opero measured side by side with its peers")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[],
        metavar="WORD",
        help="only rows whose name contains a word, e.g. retry, hit-async, import, accuracy",
    )
    parser.add_argument(
        "--keep", action="store_true", help="let the rows measured replace those in the results"
    )
    parser.add_argument(
        "--pythons",
        nargs="+",
        default=[],
        metavar="PATH",
        help="other interpreters, with opero and the peers installed, to run on as well",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where RESULTS.md and results/ go; by default beside this file, but a run made "
        "partial by --quick or --rows prints its page and keeps nothing; where a folder is named, rows "
        "that are not measured anew stay",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
