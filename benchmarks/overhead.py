# this_file: benchmarks/overhead.py
"""What a decorator costs per call: the rows of the table as data, and how a row is run."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from types import FrameType
from typing import Any

from benchmarks import bodies
from benchmarks import candidates as c
from benchmarks.candidates import Candidate, Function
from benchmarks.guards import GUARDS
from benchmarks.harness import Effort, Timer, interleaved, make_timer, missing, significant
from benchmarks.results import Bar, Cell, RowResult, at_most_times
from benchmarks.stores import STORES


@dataclass(frozen=True, slots=True)
class Row:
    """One path that is measured.

    Attributes:
        name: Slug, for `--rows`.
        title: As it stands in the report.
        call: Source of one call; `f` is the contender, `i` counts on if the row is `distinct`.
        body: Makes a fresh function to be wrapped.
        candidates: The contenders; the one named "opero" is the subject.
        peer: Name of the contender that opero is compared with in the summary; of several, joined
            by "or", with the fastest.
        bar: What opero is held to, if anything.
        executions: How often each call runs the body; 0 for a cache hit.
        distinct: Whether every call gets another argument.
        is_async: Whether the body is a coroutine function.
        in_threads: Whether the body may run in other threads, where no profiler counts.
    """

    name: str
    title: str
    call: str
    body: Callable[[], Function]
    candidates: tuple[Candidate, ...]
    peer: str | None = None
    bar: Bar | None = None
    executions: int = 1
    distinct: bool = False
    is_async: bool = False
    in_threads: bool = False


_BARE = Candidate("bare call", (), c.bare)

_HAND_STACK = Candidate(
    "cachetools(tenacity(pyrate-limiter))",
    ("cachetools", "tenacity", "pyrate_limiter"),
    c.hand_stack,
)
_HAND_STACK_ASYNC = Candidate(
    "async-lru(tenacity(aiolimiter))",
    ("async_lru", "tenacity", "aiolimiter"),
    c.hand_stack_async,
)

_RETRY = (
    _BARE,
    Candidate("opero", ("opero",), c.opero_retry),
    Candidate("nopanic retry", ("nopanic",), c.nopanic_retry),
    Candidate("pyresilience retry", ("pyresilience",), c.pyresilience_retry),
    Candidate("stamina", ("stamina",), c.stamina_retry),
    Candidate("tenacity", ("tenacity",), c.tenacity_retry),
)

_RETRY_AT_ONCE = (
    Candidate("opero", ("opero",), c.opero_retry_at_once),
    Candidate("nopanic retry", ("nopanic",), c.nopanic_retry_at_once),
    Candidate("pyresilience retry", ("pyresilience",), c.pyresilience_retry_at_once),
    Candidate("stamina", ("stamina",), c.stamina_retry_at_once),
    Candidate("tenacity, sleep stubbed", ("tenacity",), c.tenacity_retry_without_sleep),
)

_CACHE = (
    Candidate("opero", ("opero",), c.opero_cache),
    Candidate("cachebox TTL", ("cachebox",), c.cachebox_ttl),
    Candidate("cachebox LRU", ("cachebox",), c.cachebox_lru),
    Candidate("nopanic cache", ("nopanic",), c.nopanic_cache),
    Candidate("pyresilience cache", ("pyresilience",), c.pyresilience_cache),
)

_CACHE_SYNC = (
    _BARE,
    *_CACHE,
    Candidate("functools.lru_cache", (), c.functools_lru),
    Candidate("cachetools TTL + lock", ("cachetools",), c.cachetools_ttl),
    _HAND_STACK,
)

_CACHE_ASYNC = (
    _BARE,
    *_CACHE,
    Candidate("async-lru + ttl", ("async_lru",), c.async_lru_ttl),
    _HAND_STACK_ASYNC,
)

_CACHE_DICT = (
    Candidate("opero", ("opero",), c.opero_cache),
    Candidate("opero, a str", ("opero",), c.opero_cache_of_text),
    Candidate("lru_cache + deepcopy", (), c.functools_lru_deepcopy),
    Candidate("lru_cache + pickle.loads", (), c.functools_lru_pickle),
    Candidate("cachebox TTL + deepcopy", ("cachebox",), c.cachebox_deepcopy),
    Candidate("copy.deepcopy alone", (), c.deepcopy_alone),
    Candidate("pickle round trip alone", (), c.pickle_round_trip),
)

_STACK = (
    Candidate("opero", ("opero",), c.opero_stack),
    Candidate("nopanic cache+retry+limit", ("nopanic",), c.nopanic_stack),
    Candidate("pyresilience cache+retry+limit", ("pyresilience",), c.pyresilience_stack),
)

_LIMIT = (
    _BARE,
    Candidate("opero", ("opero",), c.opero_limit),
    Candidate("nopanic rate_limit", ("nopanic",), c.nopanic_limit),
    Candidate("pyresilience rate_limiter", ("pyresilience",), c.pyresilience_limit),
    Candidate("pyrate-limiter", ("pyrate_limiter",), c.pyrate_limit),
)

_LIMIT_ASYNC = (
    *_LIMIT,
    Candidate("asynciolimiter Limiter", ("asynciolimiter",), c.asynciolimiter_limit),
    Candidate("asynciolimiter LeakyBucket", ("asynciolimiter",), c.asynciolimiter_bucket),
    Candidate("aiolimiter", ("aiolimiter",), c.aiolimiter_limit),
)

_HEARD = (
    Candidate("opero", ("opero",), c.opero_retry),
    Candidate("opero, 1 listener", ("opero",), c.opero_one_listener),
    Candidate("opero, 10 listeners", ("opero",), c.opero_ten_listeners),
)

_ORCHESTRATORS = (
    _BARE,
    Candidate("opero", ("opero",), c.opero_two_retries),
    Candidate("@orchestrate", ("opero",), c.orchestrated),
)
_ORCHESTRATED_SYNC = (
    *_ORCHESTRATORS,
    Candidate("Orchestrator.execute_sync", ("opero",), c.orchestrator_sync),
)
_ORCHESTRATED_ASYNC = (
    *_ORCHESTRATORS,
    Candidate("Orchestrator.execute", ("opero",), c.orchestrator_async),
    Candidate("Orchestrator, with a fallback", ("opero",), c.orchestrator_fallback),
)

# slug, words, call, body, asynchronous body
_HITS = (
    ("int", "one int", "f(1)", bodies.identity, bodies.identity_async),
    ("two", "two ints", "f(1, 2)", bodies.pair, bodies.pair_async),
    ("str", "one str", "f('Berlin')", bodies.identity, bodies.identity_async),
)


def _hit_rows() -> Iterator[Row]:
    for is_async, contenders in ((False, _CACHE_SYNC), (True, _CACHE_ASYNC)):
        mode = "async" if is_async else "sync"
        for slug, words, call, body, body_async in _HITS:
            yield Row(
                f"hit-{mode}-{slug}",
                f"memory hit, {words}, {mode}",
                call,
                body_async if is_async else body,
                contenders,
                peer="cachebox TTL",
                bar=at_most_times(0.7),
                executions=0,
                is_async=is_async,
            )


def _guard_rows() -> Iterator[Row]:
    for is_async in (False, True):
        mode = "async" if is_async else "sync"
        for slug, (words, contenders) in GUARDS.items():
            yield Row(
                f"guard-{slug}-{mode}",
                f"{words}, success, {mode}",
                "f(1)",
                bodies.identity_async if is_async else bodies.identity,
                (_BARE, *contenders),
                peer=" or ".join(contender.name for contender in contenders[1:]),
                bar=at_most_times(0.8),
                is_async=is_async,
                in_threads=not is_async and slug in ("timeout", "deadline", "stack"),
            )


ROWS: tuple[Row, ...] = (
    Row(
        "retry-sync",
        "retry only, success, sync",
        "f(1)",
        bodies.identity,
        _RETRY,
        peer="nopanic retry",
        bar=at_most_times(0.6),
    ),
    Row(
        "retry-async",
        "retry only, success, async",
        "f(1)",
        bodies.identity_async,
        _RETRY,
        peer="nopanic retry",
        bar=at_most_times(0.6),
        is_async=True,
    ),
    *_hit_rows(),
    Row(
        "hit-dict",
        "memory hit of a small dict, isolated",
        "f(1)",
        bodies.small_dict,
        _CACHE_DICT,
        peer="opero, a str",
        bar=at_most_times(3),
        executions=0,
    ),
    Row(
        "miss-sync",
        "miss through cache + retry + fallback + limiter, sync",
        "f(i)",
        bodies.model_call,
        (*_STACK, _HAND_STACK),
        peer="nopanic cache+retry+limit",
        bar=at_most_times(0.8),
        distinct=True,
    ),
    Row(
        "miss-async",
        "miss through cache + retry + fallback + limiter, async",
        "f(i)",
        bodies.model_call_async,
        (*_STACK, _HAND_STACK_ASYNC),
        peer="nopanic cache+retry+limit",
        bar=at_most_times(1.0),
        distinct=True,
        is_async=True,
    ),
    Row(
        "limiter-sync",
        "limiter, uncontended, sync",
        "f(1)",
        bodies.identity,
        _LIMIT,
        peer="nopanic rate_limit",
        bar=at_most_times(0.8),
    ),
    Row(
        "limiter-async",
        "limiter, uncontended, async",
        "f(1)",
        bodies.identity_async,
        _LIMIT_ASYNC,
        peer="nopanic rate_limit",
        bar=at_most_times(0.8),
        is_async=True,
    ),
    *_guard_rows(),
    *(Row(**facts) for facts in STORES),
    Row(
        "failing-sync",
        "two failures, then success, no pauses, sync",
        "f(1)",
        bodies.fails_twice,
        _RETRY_AT_ONCE,
        executions=3,
    ),
    Row(
        "failing-async",
        "two failures, then success, no pauses, async",
        "f(1)",
        bodies.fails_twice_async,
        _RETRY_AT_ONCE,
        executions=3,
        is_async=True,
    ),
    Row(
        "emit-0",
        "emit, nobody listens (and a call of the listener)",
        "f(1)",
        bodies.identity,
        (_BARE, Candidate("opero", ("opero",), c.opero_emit_to_nobody)),
    ),
    Row(
        "emit-1",
        "emit to 1 listener",
        "f(1)",
        bodies.identity,
        (
            _BARE,
            Candidate("opero", ("opero",), c.opero_emit),
            Candidate("blinker", ("blinker",), c.blinker_send),
        ),
        peer="blinker",
    ),
    Row(
        "emit-10",
        "emit to 10 listeners",
        "f(1)",
        bodies.identity,
        (
            Candidate("opero", ("opero",), c.opero_emit_to_ten),
            Candidate("blinker", ("blinker",), c.blinker_send_to_ten),
        ),
        peer="blinker",
        executions=10,
    ),
    Row(
        "listeners-sync",
        "a call while nobody, 1, 10 listen: one event, sync",
        "f(1)",
        bodies.identity,
        _HEARD,
    ),
    Row(
        "listeners-async",
        "a call while nobody, 1, 10 listen: one event, async",
        "f(1)",
        bodies.identity_async,
        _HEARD,
        is_async=True,
    ),
    Row(
        "orchestrator-sync",
        "an orchestrator instead of a decorator, success, sync",
        "f(1)",
        bodies.identity,
        _ORCHESTRATED_SYNC,
    ),
    Row(
        "orchestrator-async",
        "an orchestrator instead of a decorator, success, async",
        "f(1)",
        bodies.identity_async,
        _ORCHESTRATED_ASYNC,
        is_async=True,
    ),
)


def measure(row: Row, effort: Effort, random: Random) -> RowResult:
    """Run one row.

    Every contender is first checked to run the body as often as the row says, so that no figure
    stands for a miss that was meant as a hit.
    """
    cells: dict[str, Cell] = {}
    timers: dict[str, Timer] = {}
    with asyncio.Runner() as runner:
        run = runner.run if row.is_async else None
        for candidate in row.candidates:
            cell: Cell = {"status": "ok", "samples": []}
            cells[candidate.name] = cell
            if missing(candidate.requires):
                cell["status"] = "not installed"
                continue
            try:
                _check(row, candidate, run)
                function = candidate.build(row.body())
                timer = make_timer(function, row.call, distinct=row.distinct, run=run)
                timer(1)
            except Exception as error:  # noqa: BLE001 - an error is shown in its own cell
                cell["status"] = f"failed: {type(error).__name__}: {error}"
            else:
                timers[candidate.name] = timer
        samples = interleaved(
            timers, rounds=effort.rounds, round_seconds=effort.round_seconds, random=random
        )
    for name, figures in samples.items():
        cells[name]["samples"] = [significant(figure) for figure in figures]
    return {
        "title": row.title,
        "unit": "ns",
        "peer": row.peer,
        "bar": row.bar,
        "candidates": cells,
    }


def _check(row: Row, candidate: Candidate, run: Callable[[Any], Any] | None) -> None:
    if candidate.build is c.bare:
        return
    calls = 5
    body = row.body()
    with (_counted if row.in_threads else _executions)(body) as (body, count):
        timer = make_timer(candidate.build(body), row.call, distinct=row.distinct, run=run)
        timer(calls)
    expected = row.executions * calls if row.executions else 1
    if count() != expected:
        raise AssertionError(f"the body ran {count()} times in {calls} calls, not {expected}")


@contextmanager
def _counted(body: Function) -> Iterator[tuple[Function, Callable[[], int]]]:
    executions: list[None] = []

    @functools.wraps(body)
    def counting(*args: Any) -> Any:
        executions.append(None)
        return body(*args)

    yield counting, lambda: len(executions)


@contextmanager
def _executions(body: Function) -> Iterator[tuple[Function, Callable[[], int]]]:
    # The profiler counts from outside; a counting wrapper would change what keys are made of.
    code = body.__code__
    executions = 0

    def profile(frame: FrameType, event: str, _argument: object) -> None:
        nonlocal executions
        executions += event == "call" and frame.f_code is code

    previous = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield body, lambda: executions
    finally:
        sys.setprofile(previous)
