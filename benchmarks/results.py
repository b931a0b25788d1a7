# this_file: benchmarks/results.py
"""The shape of what a run leaves behind: raw figures, every statistic is made by the report."""

from __future__ import annotations

import json
import os
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict, cast

if TYPE_CHECKING:
    from benchmarks.harness import Effort

PACKAGES = (
    "opero",
    "tenacity",
    "stamina",
    "nopanic",
    "pyresilience",
    "cachebox",
    "cachetools",
    "diskcache",
    "redis",
    "aiocache",
    "cashews",
    "async-lru",
    "asynciolimiter",
    "aiolimiter",
    "pyrate-limiter",
    "loky",
    "joblib",
    "mpire",
    "pebble",
    "twat-mp",
    "tasklane",
    "streamable",
    "aiometer",
    "pyarallel",
    "numpy",
    "dbos",
    "py-orchestrate",
)


Unit = Literal["ns", "ms", "B", "MB", "items", "%"]


class Bar(TypedDict):
    """What opero is held to: at most `limit` times the peer, or `limit` of the row's unit."""

    limit: float
    of: Literal["peer", "absolute"]


class Cell(TypedDict):
    """One contender in one row; no samples unless the status is "ok"."""

    status: str
    samples: list[float]


class RowResult(TypedDict):
    """One row; `peer` is for `peers_of`, and samples of the same round share their index.

    The note says why another contender may be quicker.
    """

    title: str
    unit: Unit
    peer: str | None
    bar: Bar | None
    candidates: dict[str, Cell]
    note: NotRequired[str]


class AccuracyResult(TypedDict):
    """One limiter watched in one mode at one rate.

    `rate` is in calls per second, `sustained` the share of it reached after the first second,
    `window` the most admissions in any half-open second, `stall` in seconds, `cpu` a share of one
    core.
    """

    limiter: str
    mode: str
    rate: int
    status: str
    admitted: int
    sustained: float
    window: int
    stall: float
    cpu: float


class Meta(TypedDict):
    """Where and how a run was made; the remark says what was out of the ordinary."""

    python: str
    machine: str
    made: str
    effort: dict[str, float]
    versions: dict[str, str]
    remark: NotRequired[str]


class Results(TypedDict):
    """Everything that one interpreter measured."""

    meta: Meta
    rows: dict[str, RowResult]
    accuracy: list[AccuracyResult]


def at_most(limit: float) -> Bar:
    """A bar in the row's own unit."""
    return {"limit": limit, "of": "absolute"}


def at_most_times(limit: float) -> Bar:
    """A bar as a multiple of the peer."""
    return {"limit": limit, "of": "peer"}


def peers_of(peer: str | None) -> list[str]:
    """Return the contenders that a row is held against: one, or several joined by "or".

    Example:
        >>> peers_of("nopanic retry"), peers_of("nopanic stack or pyresilience stack")
        (['nopanic retry'], ['nopanic stack', 'pyresilience stack'])
    """
    return peer.split(" or ") if peer else []


def describe(effort: Effort) -> Meta:
    """What has to be known about this interpreter and machine to read its figures."""
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()}",
        "made": datetime.now(UTC).date().isoformat(),
        "effort": {
            "rounds": effort.rounds,
            "round_seconds": effort.round_seconds,
            "process_rounds": effort.process_rounds,
            "accuracy_seconds": effort.accuracy_seconds,
            "map_rounds": effort.map_rounds,
        },
        "versions": {name: _version(name) for name in PACKAGES},
    }


def save(results: Results, folder: Path, *, into: bool = False) -> Path:
    """Write `<major.minor>.json` into `folder` and return its path.

    Args:
        results: What was measured.
        folder: The folder.
        into: Whether other rows that are there already stay.
    """
    short = ".".join(platform.python_version_tuple()[:2])
    if into and (folder / f"{short}.json").exists():
        before = json.loads((folder / f"{short}.json").read_text(encoding="utf-8"))
        accuracy = results["accuracy"] or before["accuracy"]
        rows = {**before["rows"], **results["rows"]}
        results = {"meta": results["meta"], "rows": rows, "accuracy": accuracy}
    text = json.dumps(results, indent=1)
    # A row of samples on one line keeps the file readable and its diffs short.
    text = re.sub(r"\[([^\[\]{}\"]+)\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_short()}.json"
    path.write_text(text + "\n", encoding="utf-8")
    return path


def load(folder: Path) -> list[Results]:
    """All results in `folder`, oldest Python first."""
    paths = sorted(folder.glob("*.json"), key=lambda path: tuple(map(int, path.stem.split("."))))
    return [cast("Results", json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def _short() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "from its source" if name == "opero" else "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
