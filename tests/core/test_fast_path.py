# this_file: tests/core/test_fast_path.py
"""The fast path past the guards: quicker than the stages, and otherwise the same."""

from __future__ import annotations

import asyncio
import itertools
import re
import threading
from collections.abc import Callable, Hashable
from typing import Any

import pytest
from tenacity import stop_never
from tests.tables import rows

from opero import CircuitBreaker, ConcurrencyLimit, RateLimiter, opero, remaining
from opero.core.deadline import current_deadline
from opero.core.function import FunctionInfo
from opero.core.options import Options
from opero.core.pipeline import Pipeline
from opero.errors import CircuitOpenError, DeadlineError
from opero.utils.ambient import switch

pytestmark = pytest.mark.internal

GUARDS = {
    "concurrency": lambda: ConcurrencyLimit(1),
    "rate_limit": lambda: RateLimiter("5/minute", smooth=False, burst=0),
    "circuit_breaker": lambda: CircuitBreaker(fail_max=3, jitter=0),
    "timeout": lambda: 60,
    "deadline": lambda: 90,
}
SETS = [names for n in range(len(GUARDS) + 1) for names in itertools.combinations(GUARDS, n)]


_TIMES = re.compile(r",? ?(in )?[\d.]+ s( after the first failure)?")


class UnlikeError(Exception):
    """What retry_on does not ask for."""


def options_of(names: Any) -> dict[str, Any]:
    made = {name: GUARDS[name]() for name in names}
    return {"cache": False, "retries": 1, "min_delay": 0, "retry_on": KeyError, **made}


def decorated(face: Any, body: Any, names: Any, *, by_stages: bool = False) -> Any:
    """A function whose lane is open, or closed, because its first result has been seen."""
    fetch = opero(**options_of(names))(face.of(body))
    assert face.run(fetch, None) is None
    fetch.__opero__.fast_path.closed = by_stages
    return fetch


def held_by(fetch: Any) -> Any:
    """What its guards know, after a call."""
    pipeline = fetch.__opero__
    limit, circuit, limiter = pipeline.concurrency, pipeline.circuit, pipeline.rate_limit
    slots = 0
    while limiter is not None and limiter.limiter.try_acquire():
        slots += 1
    return {
        "permits": limit and limit.limit.in_flight,
        "circuit": circuit and circuit.breaker.stats,
        "slots": slots,
        "stats": {k: v for k, v in fetch.stats.as_dict().items() if k not in ("slept", "waited")},
        "deadline": current_deadline(),
        "switch": len(switch.on),
    }


def outcome_of(face: Any, fetch: Any, errors: list[Any]) -> Any:
    try:
        return face.run(fetch, list(errors))
    except BaseException as error:  # noqa: BLE001 - whatever it is, both ways must end alike
        notes = "\n".join(getattr(error, "__notes__", ()))
        return type(error), str(error), _TIMES.sub("", notes)


def body(errors: Any) -> Any:
    """Raise one error after the other, one in each call."""
    error = errors.pop(0) if errors else None
    if error is not None:
        raise error
    return None if errors is None else remaining() is not None


@rows("names", SETS)
@rows(
    "errors",
    [
        [None],
        [KeyError, None],
        [KeyError, KeyError],
        [UnlikeError],
        [KeyboardInterrupt],
        [KeyError, KeyboardInterrupt],
    ],
)
def test_a_call_ends_as_it_does_in_the_stages(face: Any, names: Any, errors: Any) -> None:
    known = len(switch.on)
    seen = []
    for by_stages in (False, True):
        fetch = decorated(face, body, names, by_stages=by_stages)
        seen.append((outcome_of(face, fetch, errors), held_by(fetch)))
    assert seen[0] == seen[1]
    assert seen[0][1]["permits"] in (None, 0)
    assert seen[0][1]["deadline"] is None
    assert len(switch.on) == known


@rows("names", SETS)
def test_it_is_there_for_every_set_of_guards(face: Any, names: Any) -> None:
    fetch = decorated(face, body, names)
    expected = face.asynchronous or not {"timeout", "deadline"} <= {*names}
    assert fetch.__opero__.has_fast_path is expected
    assert fetch.__opero__.is_unguarded is (not names)
    assert ("_opero_count" in fetch.__code__.co_names) is expected


@pytest.mark.parametrize(
    ("options", "fast"),
    [
        ({}, True),
        ({"retries": 0}, True),
        ({"retry_if_result": bool}, False),
        ({"stop": stop_never}, False),
        ({"arg_fallback": "model"}, True),
        ({"cache": True}, True),
        ({"cache": True, "cache_backend": "disk"}, True),
        ({"cache": True, "cache_if": lambda result, receipt: True}, False),
        ({"cache": True, "cache_stale_ttl": 60}, False),
        ({"cache": True, "cache_refresh": 0.5}, False),
        ({"rate_limit": RateLimiter("5/s", cost=2)}, False),
        ({"rate_limit": RateLimiter("5/s", key=lambda model: model)}, False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else str(value),
)
def test_it_is_for_functions_whose_first_call_needs_no_stage(
    options: dict[str, Any], fast: bool
) -> None:
    made = Options.of("test", **{"cache": False, **options})
    assert Pipeline(FunctionInfo(lambda model: None), made).has_fast_path is fast


def test_a_call_without_a_slot_gives_the_permit_back_and_goes_through_the_stages(face: Any) -> None:
    fetch = decorated(face, body, ("concurrency", "rate_limit"))
    for _ in range(4):
        face.run(fetch, None)
    limit, asked = fetch.__opero__.concurrency.limit, []
    fetch.__globals__["_opero_run"] = face.of(lambda call: asked.append(limit.in_flight))
    face.run(fetch, None)
    assert asked == [0]
    assert fetch.stats.calls == 5


def stolen(
    limit: ConcurrencyLimit, monkeypatch: Any, then: Callable[[], object] = lambda: None
) -> None:
    """Let another caller take the permit that is given back next, and call `then`."""
    leave = limit.leave

    def give_back(holder: Hashable) -> None:
        monkeypatch.undo()
        leave(holder)
        assert limit.try_acquire()
        then()

    monkeypatch.setattr(limit, "leave", give_back)


def test_a_failed_call_needs_no_permit_to_report(face: Any, monkeypatch: Any) -> None:
    def broken(errors: Any) -> None:
        if errors is not None:
            raise KeyError

    limit = ConcurrencyLimit(1, queue=0)
    fetch = opero(cache=False, retries=0, concurrency=limit)(face.of(broken))
    face.run(fetch, None)
    stolen(limit, monkeypatch)
    with pytest.raises(KeyError):
        face.run(fetch, [])


def test_a_failed_call_does_not_wait_for_itself(face: Any, monkeypatch: Any) -> None:
    fetch = decorated(face, body, ("concurrency",))
    limit = fetch.__opero__.concurrency.limit
    timer = threading.Timer(0.02, limit.release)
    stolen(limit, monkeypatch, timer.start)
    face.run(fetch, [KeyError, None])
    timer.join()
    assert limit.in_flight == 0


def test_an_open_circuit_refuses_before_anything_is_taken(face: Any) -> None:
    fetch = decorated(face, body, GUARDS)
    fetch.__opero__.circuit.breaker.force_open()
    with pytest.raises(CircuitOpenError):
        face.run(fetch, None)
    held = held_by(fetch)
    assert (held["permits"], held["slots"], held["stats"]["calls"]) == (0, 4, 1)


def test_a_retry_has_what_is_left_of_the_deadline(face: Any) -> None:
    ends = []

    def broken(errors: Any) -> Any:
        ends.append(current_deadline())
        if errors is not None:
            raise KeyError

    fetch = decorated(face, broken, ("deadline",))
    with pytest.raises(KeyError):
        face.run(fetch, [])
    first, retry = ends[1:]
    assert retry == pytest.approx(first, abs=1e-6)


@pytest.mark.parametrize("by_stages", [False, True])
@pytest.mark.parametrize("timeout", [None, 5])
def test_a_task_that_its_deadline_cuts_short_has_not_failed(
    by_stages: bool, timeout: float | None
) -> None:
    breaker = CircuitBreaker(fail_max=1)
    limit = ConcurrencyLimit(1)

    @opero(
        cache=False,
        retries=3,
        deadline=0.6,
        timeout=timeout,
        circuit_breaker=breaker,
        concurrency=limit,
    )
    async def hang() -> None:
        await asyncio.sleep(30)

    hang.__opero__.fast_path.closed = by_stages
    with pytest.raises(DeadlineError, match=r"hang\(\) ran out of time during the call"):
        asyncio.run(hang())
    assert (hang.stats.calls, hang.stats.failures, hang.stats.gave_up) == (1, 0, 1)
    assert (breaker.state, limit.in_flight) == ("closed", 0)
    assert not current_deadline()


@pytest.mark.parametrize("by_stages", [False, True])
def test_a_task_that_timed_out_is_retried_within_its_deadline(by_stages: bool) -> None:
    made = []

    @opero(cache=False, retries=1, min_delay=0, timeout=0.2, deadline=60, concurrency=1)
    async def hang_once() -> str:
        made.append(remaining())
        if len(made) == 1:
            await asyncio.sleep(30)
        return "value"

    hang_once.__opero__.fast_path.closed = by_stages
    assert asyncio.run(hang_once()) == "value"
    assert made[1] < made[0]
    assert (hang_once.stats.calls, hang_once.stats.failures) == (2, 1)


def test_a_cancelled_task_gives_everything_back() -> None:
    async def hang(errors: Any) -> None:
        if errors is not None:
            await asyncio.sleep(30)

    async def main() -> Any:
        fetch = opero(**options_of(GUARDS))(hang)
        await fetch(None)
        task = asyncio.create_task(fetch([]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert fetch.__opero__.concurrency.limit.in_flight == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return fetch

    known = len(switch.on)
    fetch = asyncio.run(main())
    held = held_by(fetch)
    assert (held["permits"], held["deadline"], len(switch.on)) == (0, None, known)
    assert held["circuit"].failures == 0


# --- the stages ---------------------------------------------------------------------------------

everything: dict[str, Any] = {"arg_fallback": "model", "rate_limit": 1000}


def pipeline_of(fn: Any, **options: Any) -> Pipeline:
    return Pipeline(FunctionInfo(fn), Options.of("test", **options))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["cache", "retry"]),
        ({"cache": False}, ["retry"]),
        ({"cache": False, "retries": 0}, ["retry"]),
        (everything, ["cache", "retry", "fallback", "rate limit"]),
        ({**everything, "cache": False, "retries": 0}, ["retry", "fallback", "rate limit"]),
        ({"cache": False, "retries": 0, "stop": stop_never}, ["retry"]),
    ],
    ids=lambda value: None if isinstance(value, list) else " ".join(value) or "default",
)
def test_the_stages_stand_in_their_fixed_order(options: dict[str, Any], names: list[str]) -> None:
    assert [s.name for s in pipeline_of(lambda model: None, **options).stages] == names
