# this_file: tests/core/test_circuit_breaker.py
"""The circuit breaker as a stage: what it asks before a call, and what it tells after it."""

from __future__ import annotations

import asyncio
import gc
import math
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from opero import CircuitBreaker, CircuitState, opero
from opero.core.call import Call, part_key
from opero.core.circuit_breaker import Circuit, CircuitCheck, breaker_of
from opero.errors import CircuitOpenError, DeadlineError, Rejected
from opero.events import CircuitChanged, Event
from opero.events.bus import Emitter
from opero.testing import FakeClock, capture_events, set_disabled
from opero.utils.secrets import show_value

if TYPE_CHECKING:
    from opero.core.call import Stage

pytestmark = pytest.mark.internal

CLOSED, OPEN, HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN
FORCED_OPEN = CircuitState.FORCED_OPEN
REFUSED = ConnectionRefusedError("refused")

Drive = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def drive(request: pytest.FixtureRequest) -> Drive:
    """Sends a call through a stage to a body, by one of the two adapters."""

    def sync(stage: Stage, body: Callable[[], Any], call: Call | None = None) -> Any:
        return stage.wrap_sync(lambda call: body())(call or Call((), {}))

    def asynchronous(stage: Stage, body: Callable[[], Any], call: Call | None = None) -> Any:
        async def proceed(call: Call) -> Any:
            return body()

        return asyncio.run(stage.wrap_async(proceed)(call or Call((), {})))

    return sync if request.param == "sync" else asynchronous


def circuit(*listeners: Callable[[Event], object], **options: Any) -> Circuit:
    return Circuit(CircuitBreaker(**options), Emitter("fetch", listeners))


def raises(error: BaseException) -> Callable[[], Any]:
    def body() -> Any:
        raise error

    return body


def ok() -> str:
    return "ok"


# --- one breaker --------------------------------------------------------------------------------


def test_a_success_goes_through(drive: Drive) -> None:
    assert drive(circuit(), ok) == "ok"


def test_the_call_that_trips_it_raises_its_own_error(drive: Drive) -> None:
    stage = circuit(fail_max=2)
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError) as caught:
            drive(stage, raises(REFUSED))
        assert caught.value is REFUSED
    with pytest.raises(CircuitOpenError, match="'fetch' is open"):
        drive(stage, ok)


def test_a_refused_call_never_reaches_the_function(drive: Drive) -> None:
    stage = circuit()
    stage.breaker.force_open()
    reached: list[int] = []
    with pytest.raises(CircuitOpenError):
        drive(stage, lambda: reached.append(1))
    assert not reached


@pytest.mark.parametrize(
    ("error", "failures"),
    [(REFUSED, 1), (DeadlineError(), 0), (CircuitOpenError("inner", None), 0), (Rejected(0), 0)],
)
def test_refusals_and_rejected_results_are_no_failures(
    drive: Drive, error: Exception, failures: int
) -> None:
    stage = circuit()
    with pytest.raises(type(error)):
        drive(stage, raises(error))
    assert stage.breaker.stats.failures == failures


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), GeneratorExit()])
def test_an_interrupted_probe_gives_its_place_back(
    drive: Drive, clock: FakeClock, error: BaseException
) -> None:
    stage = circuit(reset_timeout=30)
    stage.breaker.open()
    clock.advance(30)
    with pytest.raises(type(error)):
        drive(stage, raises(error))
    assert stage.breaker.state is HALF_OPEN
    assert drive(stage, ok) == "ok"
    assert stage.breaker.state is CLOSED


@pytest.mark.asyncio
async def test_cancelled_calls_neither_open_it_nor_keep_a_probe() -> None:
    stage = circuit(fail_max=1, reset_timeout=0)

    async def hang(call: Call) -> None:
        await asyncio.Event().wait()

    async def cancel_one() -> None:
        task = asyncio.create_task(stage.wrap_async(hang)(Call((), {})))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    await cancel_one()
    assert stage.breaker.state is CLOSED
    stage.breaker.open()
    await cancel_one()
    stats = stage.breaker.stats
    assert (stats.state, stats.probes, stats.refused) == (HALF_OPEN, 0, 0)


def test_an_abandoned_coroutine_gives_its_probe_back() -> None:
    stage = circuit(reset_timeout=0)
    stage.breaker.open()

    class Pause:
        def __await__(self) -> Any:
            yield

    async def wait(call: Call) -> None:
        await Pause()

    running = stage.wrap_async(wait)(Call((), {}))
    running.send(None)
    assert stage.breaker.stats.probes == 1
    del running
    gc.collect()
    assert stage.breaker.stats.probes == 0


def test_results_are_judged(drive: Drive) -> None:
    stage = circuit(fail_max=1, counts_result=lambda result: result == "ok")
    assert drive(stage, ok) == "ok"
    assert stage.breaker.state is OPEN


def test_a_window_counts_successes(drive: Drive) -> None:
    stage = circuit(failure_rate=0.5)
    for _ in range(3):
        drive(stage, ok)
    assert stage.breaker.stats.calls == 3


def test_the_test_switch_refuses_nothing_and_counts_no_failure(drive: Drive) -> None:
    stage = circuit(fail_max=1)
    with set_disabled():
        with pytest.raises(ConnectionError):
            drive(stage, raises(REFUSED))
        assert stage.breaker.state is CLOSED
        stage.breaker.force_open()
        assert drive(stage, ok) == "ok"
        assert drive(CircuitCheck(stage), ok) == "ok"


def test_a_call_that_was_already_made_is_not_refused(drive: Drive) -> None:
    stage = circuit()
    stage.breaker.force_open()
    begun = Call((), {})
    begun.prior_outcome = REFUSED
    with pytest.raises(ConnectionError):
        drive(stage, raises(REFUSED), begun)
    assert drive(CircuitCheck(stage), ok, begun) == "ok"


def test_the_check_refuses_and_takes_no_probe(drive: Drive, clock: FakeClock) -> None:
    stage = circuit(reset_timeout=30)
    check = CircuitCheck(stage)
    assert drive(check, ok) == "ok"
    stage.breaker.open()
    with pytest.raises(CircuitOpenError):
        drive(check, ok)
    clock.advance(30)
    assert drive(check, lambda: stage.breaker.stats.probes) == 0
    stage.breaker.acquire()
    with pytest.raises(CircuitOpenError):
        drive(check, ok)


def test_explain_gets_one_line() -> None:
    stage = circuit(fail_max=2)
    assert stage.describe().startswith("opens after 2 failures in a row")
    assert CircuitCheck(stage).describe() == ""


def test_the_option_is_a_breaker_or_true() -> None:
    mine = CircuitBreaker()
    assert breaker_of(mine) is mine
    assert breaker_of(True) is not breaker_of(True)


# --- names and listeners ------------------------------------------------------------------------


def test_an_unnamed_breaker_takes_the_name_of_the_first_function_it_guards() -> None:
    breaker = CircuitBreaker()
    Circuit(breaker, Emitter("fetch"))
    Circuit(breaker, Emitter("post"))
    assert breaker.name == "fetch"


def received(events: list[Event]) -> list[tuple[str, str, str]]:
    return [(e.function, e.circuit, e.new_state) for e in events if isinstance(e, CircuitChanged)]


def test_functions_hear_of_their_shared_circuit_by_their_own_name() -> None:
    of_fetch, of_post = list[Event](), list[Event]()
    breaker = CircuitBreaker("api")
    stages = [
        Circuit(breaker, Emitter("fetch", [of_fetch.append])),
        Circuit(breaker, Emitter("post", [of_post.append])),
    ]
    with capture_events(CircuitChanged) as on_bus:
        breaker.open()
    assert received(of_fetch) == [("fetch", "api", "open")]
    assert received(of_post) == [("post", "api", "open")]
    assert received(on_bus) == [("api", "api", "open")]
    del stages


def test_the_bus_gets_the_function_if_it_is_the_only_one() -> None:
    stage = circuit(name="api")
    with capture_events(CircuitChanged) as on_bus:
        stage.breaker.open()
    assert received(on_bus) == [("fetch", "api", "open")]


def test_a_function_with_other_options_does_not_hear_twice() -> None:
    reported: list[Event] = []
    breaker, emitter = CircuitBreaker(), Emitter("fetch", [reported.append])
    stages = [Circuit(breaker, emitter), Circuit(breaker, Emitter("fetch", [reported.append]))]
    breaker.open()
    assert len(reported) == 1
    del stages[0]
    breaker.close()
    assert len(reported) == 2


def test_a_shared_breaker_does_not_keep_the_listeners_of_functions_that_are_gone() -> None:
    class Listener:
        def __call__(self, event: Event) -> None: ...

    listener = Listener()
    gone = weakref.ref(listener)
    breaker = CircuitBreaker()
    stage = Circuit(breaker, Emitter("fetch", [listener]))
    del stage, listener
    gc.collect()
    assert gone() is None
    breaker.open()


# --- fallback values ----------------------------------------------------------------------------


class Models:
    """A circuit for a fallback parameter, and calls with its values."""

    def __init__(self, *values: Any, secret: bool = False, **options: Any) -> None:
        self.values = values
        self.secret = secret
        self.reported: list[Event] = []
        self.stage = Circuit(
            CircuitBreaker(**{"fail_max": 1, "jitter": 0, **options}),
            Emitter("ask", [self.reported.append]),
            several=lambda call: len(self.values) > 1,
            label=self.label,
        )

    def label(self, call: Call) -> str:
        return show_value("model", call.value_index or 0, call.value, secret=self.secret)

    def call(self, index: int) -> Call:
        call = Call((), {})
        call.value, call.value_index = self.values[index], index
        return call

    def refused(self) -> list[int]:
        """Places of the values whose breaker lets no call through."""
        refuses = self.stage.refuses
        return [n for n, value in enumerate(self.values) if refuses(value, n) is not None]

    def fail(self, drive: Drive, index: int) -> None:
        with pytest.raises(ConnectionError):
            drive(self.stage, raises(REFUSED), self.call(index))


def test_each_of_several_values_has_its_own_breaker(drive: Drive) -> None:
    models = Models("gpt-4", "gpt-3.5")
    models.fail(drive, 0)
    with pytest.raises(CircuitOpenError, match=r"ask\[model='gpt-4'\]"):
        drive(models.stage, ok, models.call(0))
    assert drive(models.stage, ok, models.call(1)) == "ok"
    assert models.stage.breaker.state is CLOSED
    assert drive(CircuitCheck(models.stage), ok, models.call(1)) == "ok"
    with pytest.raises(CircuitOpenError):
        drive(CircuitCheck(models.stage), ok, models.call(0))


def test_a_single_value_uses_the_breaker_itself(drive: Drive) -> None:
    models = Models("gpt-4")
    models.fail(drive, 0)
    assert models.stage.breaker.state is OPEN
    assert models.stage.breaker.parts == ()


def test_a_value_keeps_its_breaker_at_another_place_in_the_list(drive: Drive) -> None:
    models = Models({"name": "a"}, {"name": "b"})
    models.fail(drive, 0)
    models.values = ({"name": "b"}, {"name": "a"})
    assert drive(models.stage, ok, models.call(0)) == "ok"
    with pytest.raises(CircuitOpenError):
        drive(models.stage, ok, models.call(1))


def test_a_value_without_content_goes_by_its_place(drive: Drive) -> None:
    models = Models(lambda: 0, lambda: 1)
    models.fail(drive, 1)
    assert drive(models.stage, ok, models.call(0)) == "ok"
    assert models.stage.refuses(models.values[1], 1) is not None
    assert {part_key(value, n) for n, value in enumerate(models.values)} == {0, 1}


def test_secret_values_are_named_by_their_place_only(drive: Drive) -> None:
    models = Models("sk-one", "sk-two", secret=True)
    models.fail(drive, 1)
    (part,) = models.stage.breaker.parts
    assert part.name == "ask[model[1]]"
    assert "sk-" not in repr((part, models.stage.breaker, models.reported))


def test_the_fallback_can_ask_whether_a_value_is_refused(drive: Drive, clock: FakeClock) -> None:
    models = Models("a", "b", reset_timeout=30)
    stage = models.stage
    assert stage.refuses("a", 0) is None
    models.fail(drive, 0)
    clock.advance(10)
    models.fail(drive, 1)
    waits = [stage.refuses(value, n) for n, value in enumerate(models.values)]
    assert waits == pytest.approx([20, 30])
    error = stage.refusal([wait for wait in waits if wait is not None])
    assert error.name == "ask"
    assert error.retry_after == pytest.approx(20)
    with set_disabled():
        assert stage.refuses("a", 0) is None


def test_a_refusal_of_the_value_itself_lets_the_next_one_be_tried(drive: Drive) -> None:
    models = Models("a", "b")
    models.fail(drive, 0)
    call = models.call(0)
    with pytest.raises(CircuitOpenError) as caught:
        drive(models.stage, ok, call)
    assert models.stage.refused_value(call, caught.value)
    assert not models.stage.refused_value(models.call(1), caught.value)
    assert not models.stage.refused_value(call, REFUSED)


def test_verbs_by_hand_reach_all_values(drive: Drive) -> None:
    models = Models("a", "b", "c")
    breaker = models.stage.breaker
    drive(models.stage, ok, models.call(0))
    breaker.force_open()
    assert [models.stage.refuses(v, n) for n, v in enumerate("abc")] == [math.inf] * 3
    with pytest.raises(CircuitOpenError):
        drive(models.stage, ok, models.call(1))
    assert models.stage.refusal([math.inf]).retry_after is None
    breaker.close()
    assert [part.state for part in breaker.parts] == [CLOSED] * 2
    breaker.disable()
    models.fail(drive, 0)
    models.fail(drive, 2)
    assert {part.state for part in breaker.parts} == {CircuitState.DISABLED}
    breaker.reset()
    breaker.open()
    assert {part.state for part in breaker.parts} == {OPEN}


def test_a_value_that_two_threads_meet_first_has_one_breaker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    breaker, rival = CircuitBreaker(), CircuitBreaker()
    monkeypatch.setattr(CircuitBreaker, "_make_room", lambda self: self._parts.update(key=rival))
    assert breaker.part("key", "a") is rival


def test_a_hand_that_comes_in_between_reaches_a_new_value_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    breaker = CircuitBreaker()
    monkeypatch.setattr(CircuitBreaker, "_make_room", lambda self: breaker.force_open())
    assert breaker.part("key", "a").state is FORCED_OPEN


def test_a_new_value_is_held_open_before_any_call_can_meet_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    breaker = CircuitBreaker("ask")
    breaker.force_open()
    with capture_events(CircuitChanged) as events:
        seen: list[Event] = []
        monkeypatch.setattr(CircuitBreaker, "_make_room", lambda self: seen.extend(events))
        breaker.part("key", "a")
    assert received(seen) == [("ask[a]", "ask[a]", "forced_open")]


def test_changes_of_values_reach_the_listeners_of_function_and_breaker(drive: Drive) -> None:
    on_change: list[CircuitChanged] = []
    models = Models("a", "b", on_change=on_change.append)
    with capture_events(CircuitChanged) as on_bus:
        models.fail(drive, 0)
    assert received(models.reported) == [("ask", "ask[model='a']", "open")]
    assert received(list(on_change)) == received(on_bus) == received(models.reported)


def test_functions_that_share_a_breaker_share_those_of_its_values(drive: Drive) -> None:
    models = Models("a", "b")
    models.fail(drive, 0)
    other = Circuit(
        models.stage.breaker, Emitter("summarise"), several=lambda call: True, label=models.label
    )
    with pytest.raises(CircuitOpenError):
        drive(other, ok, models.call(0))
    (part,) = models.stage.breaker.parts
    with capture_events(CircuitChanged) as on_bus:
        part.close()
    assert received(on_bus) == [(part.name, part.name, "closed")]


def test_values_without_failures_are_forgotten_when_there_are_too_many(
    drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opero.limits.breaker._MOST_PARTS", 3)
    models = Models(*range(8))
    breaker = models.stage.breaker
    models.fail(drive, 0)
    for index in (1, 2, 3):
        drive(models.stage, ok, models.call(index))
    assert [part.name for part in breaker.parts] == ["ask[model=0]", "ask[model=3]"]
    assert models.refused() == [0]
    for index in (4, 5, 6, 7):
        models.fail(drive, index)
    assert models.refused() == [5, 6, 7]


def test_explain_says_that_values_are_guarded_one_by_one() -> None:
    assert Models("a", "b").stage.describe().endswith("for each value by itself")


def test_the_repr_counts_the_values(drive: Drive) -> None:
    models = Models("a", "b")
    drive(models.stage, ok, models.call(0))
    assert repr(models.stage.breaker) == "<CircuitBreaker 'ask' closed, 1 part>"


def test_guards_of_a_decorated_function_can_be_reached() -> None:
    @opero(cache=False, circuit_breaker=True, rate_limit="100/s", concurrency=2)
    def guarded() -> None: ...

    breaker, limiter, limit = guarded.circuit_breaker, guarded.rate_limit, guarded.concurrency
    assert breaker is not None
    assert breaker.state is CLOSED
    assert limiter is not None
    assert limiter.describe().startswith("100 per second")
    assert limit is not None
    assert limit.limit == 2
    assert guarded.with_options(retries=1).circuit_breaker is guarded.circuit_breaker

    @opero(cache=False)
    def plain() -> None: ...

    assert (plain.circuit_breaker, plain.rate_limit, plain.concurrency) == (None, None, None)
