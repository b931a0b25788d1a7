# this_file: benchmarks/report.py
"""Raw results to Markdown: the bars first, then every contender, then the limiters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.harness import paired_ratio
from benchmarks.results import peers_of

if TYPE_CHECKING:
    from benchmarks.results import AccuracyResult, Bar, Results, RowResult

SUBJECT = "opero"

_FRONT_MATTER = "---\nthis_file: benchmarks/RESULTS.md\n---\n"

# Percent of its rate that a limiter must sustain; less from where a sleep is coarser than a slot.
_LEAST_SHARE = 99
_FAST, _LEAST_SHARE_FAST = 10_000, 95

_METHOD = """\
## How this was made

`python benchmarks/run.py` (see [README.md](README.md)). Per row every contender runs in the same
process, one turn per round, the order shuffled anew in each round, the garbage collector off
during a turn. *best* and *median* are over the rounds; a ratio is the median of the ratios within
each round. A contender counts only after a check that it runs the function as often as the row
says (a hit: once in all). Maps: each turn in an interpreter of its own, a short map before the one
that counts; opero begins its processes with each map, the pools of the others are there already
unless the row says otherwise. Figures include the loop around the call, as the bare call shows.
Process times are wall times of `python -c …` less those of an empty program in the same round.
Limiters: admissions are stamped right after the limiter let the caller through; *rate* is what
was reached from the first second on, *window* the most admissions in any half-open second against
the N allowed, *stall* the longest silence while callers waited, *cpu* the share of one core.
"""

Table = Iterable[Sequence[str]]


def render(results: Sequence[Results]) -> str:
    """The whole page.

    Args:
        results: One per interpreter, in the order of the columns.
    """
    pythons = [result["meta"]["python"].rsplit(" ", 1)[1].rsplit(".", 1)[0] for result in results]
    parts = [
        _FRONT_MATTER,
        "# opero beside its peers\n",
        "Made by `benchmarks/run.py`; edit nothing here. Less is better; ratios count more.\n",
        _made(results),
        "## Bars\n",
        _bars(results, pythons),
        _behind(results, pythons),
        "## Overhead per call, imports, memory, maps\n",
        "Each cell: best · median · opero ÷ this contender.\n",
        *(_details(name, results, pythons) for name in _row_names(results)),
        _limiters(results, pythons),
        _METHOD,
    ]
    return "\n".join(part for part in parts if part)


def verdict(row: RowResult) -> tuple[float, bool] | None:
    """What is held against the row's bar, rounded as it is printed, and whether it is met.

    Returns:
        None if the row has no bar, or lacks the figures.
    """
    bar, subject = row["bar"], _samples(row, SUBJECT)
    if bar is None or not subject:
        return None
    if bar["of"] == "absolute":
        value = round(median(subject), 1)
    else:
        peers = [found for name in peers_of(row["peer"]) if (found := _samples(row, name))]
        if not peers:
            return None
        value = round(max(paired_ratio(subject, peer) for peer in peers), 2)
    return value, value <= bar["limit"]


def accuracy_verdict(results: Iterable[AccuracyResult]) -> tuple[str, bool]:
    """The worst of opero's modes at one rate, and whether it is within the bar.

    The bar: 99 to 100 % of the rate after the first second, in whole percent (from 95 % at 10,000 a
    second), and no half-open second with more than N + 1 admissions.
    """
    results = list(results)
    rate = results[0]["rate"]
    percents = [result["sustained"] * 100 for result in results]
    window = max(result["window"] for result in results)
    least = _LEAST_SHARE_FAST if rate >= _FAST else _LEAST_SHARE
    met = least <= round(min(percents)) and round(max(percents)) <= 100 and window <= rate + 1
    return f"{min(percents):.1f}–{max(percents):.1f} %, N{window - rate:+d}", met


def _made(results: Sequence[Results]) -> str:
    rows = [["python", "machine", "made", "rounds"]]
    for result in results:
        meta = result["meta"]
        rows.append(
            [meta["python"], meta["machine"], meta["made"], f"{meta['effort']['rounds']:.0f}"]
        )
    versions = {
        name: sorted({result["meta"]["versions"].get(name, "–") for result in results})
        for result in results
        for name in result["meta"]["versions"]
    }
    listed = ", ".join(f"{name} {' / '.join(found)}" for name, found in versions.items())
    remarks = dict.fromkeys(result["meta"].get("remark", "") for result in results)
    said = "".join(f"\n**{remark}**\n" for remark in remarks if remark)
    return f"{_table(rows)}\nVersions: {listed}.\n{said}"


def _bars(results: Sequence[Results], pythons: Sequence[str]) -> str:
    rows = [["path", "bar", *pythons]]
    for name in _row_names(results):
        row = _first(results, name)
        if row["bar"] is not None:
            verdicts = [_verdict_cell(result["rows"].get(name)) for result in results]
            rows.append([row["title"], _bar_text(row["bar"], row), *verdicts])
    for rate in _rates(results):
        least = f"≥ {_LEAST_SHARE_FAST}" if rate >= _FAST else f"{_LEAST_SHARE}–100"
        cells = [_accuracy_cell(_accuracy(result, rate, SUBJECT)) for result in results]
        rows.append([f"limiter accuracy, {rate}/s", f"{least} %, ≤ N+1", *cells])
    return _table(rows)


def _behind(results: Sequence[Results], pythons: Sequence[str]) -> str:
    """Where another contender was quicker, and why."""
    rows = [["path", "first", *pythons, "why"]]
    for name in _row_names(results):
        note = _first(results, name).get("note", "")
        leaders = [_leader(result["rows"].get(name)) for result in results]
        found = [leader for leader, _ in leaders if leader not in ("", SUBJECT)]
        if note and found:
            cells = [f"{ratio:.2f} ×" if leader else "–" for leader, ratio in leaders]
            rows.append([_first(results, name)["title"], max(found, key=found.count), *cells, note])
    if len(rows) == 1:
        return ""
    return (
        f"## Where opero is not first in a map\n\nEach cell: opero ÷ the first.\n\n{_table(rows)}"
    )


def _leader(row: RowResult | None) -> tuple[str, float]:
    """Return the quickest contender and what opero takes as a multiple of its time."""
    if row is None or not _samples(row, SUBJECT):
        return "", 0.0
    medians = {
        name: median(_samples(row, name)) for name in row["candidates"] if _samples(row, name)
    }
    leader = min(medians, key=lambda name: medians[name])
    return leader, medians[SUBJECT] / medians[leader] if medians[leader] else 1.0


def _details(name: str, results: Sequence[Results], pythons: Sequence[str]) -> str:
    row = _first(results, name)
    rows = [["contender", *pythons]]
    for contender in row["candidates"]:
        cells = [_contender_cell(result["rows"].get(name), contender) for result in results]
        rows.append([contender, *cells])
    return f"### {row['title']}\n\n{_table(rows)}"


def _limiters(results: Sequence[Results], pythons: Sequence[str]) -> str:
    rates = _rates(results)
    if not rates:
        return ""
    parts = ["## Limiter accuracy\n", "Each cell: rate · window · stall · cpu.\n"]
    for rate in rates:
        found = [entry for result in results for entry in result["accuracy"]]
        lines = dict.fromkeys(
            (entry["limiter"], entry["mode"]) for entry in found if entry["rate"] == rate
        )
        rows = [["limiter", "mode", *pythons]]
        for limiter, mode in lines:
            cells = []
            for result in results:
                entries = [e for e in _accuracy(result, rate, limiter) if e["mode"] == mode]
                cells.append(_limiter_cell(entries[0]) if entries else "–")
            rows.append([limiter, mode, *cells])
        parts.append(f"### {rate}/s\n\n{_table(rows)}")
    return "\n".join(parts)


def _verdict_cell(row: RowResult | None) -> str:
    if row is None:
        return "–"
    judged = verdict(row)
    if judged is None:
        return row["candidates"].get(SUBJECT, {"status": "not measured"})["status"]
    value, met = judged
    relative = row["bar"] is not None and row["bar"]["of"] == "peer"
    text = f"{value:.2f} ×" if relative else _quantity(value, row["unit"])
    return f"{text} met" if met else f"**{text} missed**"


def _accuracy_cell(results: Sequence[AccuracyResult]) -> str:
    if not results:
        return "–"
    broken = [result["status"] for result in results if result["status"] != "ok"]
    if broken:
        return broken[0]
    text, met = accuracy_verdict(results)
    return f"{text} met" if met else f"**{text} missed**"


def _contender_cell(row: RowResult | None, contender: str) -> str:
    if row is None or contender not in row["candidates"]:
        return "–"
    samples = _samples(row, contender)
    if not samples:
        return row["candidates"][contender]["status"]
    unit = row["unit"]
    if len(samples) == 1:
        return _quantity(samples[0], unit)
    text = f"{_quantity(min(samples), unit)} · {_quantity(median(samples), unit)}"
    subject = _samples(row, SUBJECT)
    if contender == SUBJECT or not subject or min(samples) <= 0:
        return text
    return f"{text} · {paired_ratio(subject, samples):.2f}"


def _limiter_cell(result: AccuracyResult) -> str:
    if result["status"] != "ok":
        return result["status"]
    rate, window = result["rate"], result["window"]
    parts = (
        f"{result['sustained'] * 100:.1f} %",
        f"{window / rate * 100:.0f} % (N{window - rate:+d})",
        f"{result['stall'] * 1e3:.1f} ms",
        f"{result['cpu'] * 100:.1f} %",
    )
    return " · ".join(parts)


def _bar_text(bar: Bar, row: RowResult) -> str:
    if bar["of"] == "peer":
        return f"≤ {bar['limit']:g} × {row['peer']}"
    return f"≤ {_quantity(bar['limit'], row['unit'])}"


def _quantity(value: float, unit: str) -> str:
    return f"{value:,.1f} {unit}" if unit in ("ms", "MB", "%") else f"{value:,.0f} {unit}"


def _samples(row: RowResult, contender: str) -> list[float]:
    cell = row["candidates"].get(contender)
    return cell["samples"] if cell is not None and cell["status"] == "ok" else []


def _row_names(results: Sequence[Results]) -> list[str]:
    return list(dict.fromkeys(name for result in results for name in result["rows"]))


def _first(results: Sequence[Results], name: str) -> RowResult:
    return next(result["rows"][name] for result in results if name in result["rows"])


def _rates(results: Sequence[Results]) -> list[int]:
    return sorted({entry["rate"] for result in results for entry in result["accuracy"]})


def _accuracy(result: Results, rate: int, limiter: str) -> list[AccuracyResult]:
    return [
        entry
        for entry in result["accuracy"]
        if entry["rate"] == rate and entry["limiter"] == limiter
    ]


def _table(rows: Table) -> str:
    head, *body = rows
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(cells)} |" for cells in body]
    return "\n".join(lines) + "\n"
