# this_file: tests/test_events.py
"""Events and the bus that carries them."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import pickle
import sys
import threading
import time
from typing import Any

import pytest
from tests.tables import rows

from opero import events, opero
from opero.errors import OperoUsageError
from opero.events import (
    AttemptFailed,
    CacheHit,
    CacheMiss,
    CallGaveUp,
    CallSucceeded,
    Event,
    EventBus,
    FallbackUsed,
    LimiterWaited,
    RetryScheduled,
    event_bus,
)
from opero.events import types as kinds
from opero.tasks import Task, run_sync
from opero.testing import capture_events, fake_clock, flaky
from opero.utils.ambient import switch

pytestmark = pytest.mark.internal

HIT = CacheHit(function="f")
MISS = CacheMiss(function="f")
KINDS = [
    kind
    for kind in vars(kinds).values()
    if inspect.isclass(kind) and issubclass(kind, Event) and not kind.__name__.startswith("_")
    if kind is not Event
]


def names(kind: type[Event]) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


@pytest.fixture
def bus() -> EventBus:
    return EventBus()


@pytest.fixture(autouse=True)
def nobody_is_left_on_the_default_bus() -> Any:
    yield
    assert not event_bus.active
    assert not switch.on


# --- the bus --------------------------------------------------------------------------------------


def test_handlers_get_events_in_the_order_of_subscription(bus: EventBus) -> None:
    received: list[str] = []
    with (
        bus.subscribe(lambda e: received.append("a")),
        bus.subscribe(lambda e: received.append("b")),
    ):
        bus.emit(HIT)
    assert received == ["a", "b"]


def test_a_handler_gets_its_types_and_their_subclasses(bus: EventBus) -> None:
    received: list[Event] = []
    with bus.subscribe(received.append, types=[CacheHit, RetryScheduled]):
        bus.emit(HIT)
        bus.emit(MISS)
    assert received == [HIT]
    with bus.subscribe(received.append, types=[Event]):
        bus.emit(MISS)
    assert received == [HIT, MISS]


def test_a_cancelled_subscription_gets_no_event(bus: EventBus) -> None:
    received: list[Event] = []
    subscription = bus.subscribe(received.append)
    subscription.cancel()
    subscription.cancel()
    bus.emit(HIT)
    assert received == []
    assert not bus.active


def test_one_handler_may_subscribe_twice_and_leave_once(bus: EventBus) -> None:
    received: list[Event] = []
    first, second = bus.subscribe(received.append), bus.subscribe(received.append)
    first.cancel()
    bus.emit(HIT)
    assert received == [HIT]
    second.cancel()


def test_a_handler_may_unsubscribe_itself(bus: EventBus) -> None:
    received: list[Event] = []

    def once(event: Event) -> None:
        subscription.cancel()
        received.append(event)

    subscription = bus.subscribe(once)
    with bus.subscribe(received.append):
        bus.emit(HIT)
        bus.emit(MISS)
    assert received == [HIT, HIT, MISS]


def test_a_handler_may_subscribe_another(bus: EventBus) -> None:
    received: list[Event] = []
    made: list[Any] = []
    with bus.subscribe(lambda e: made.append(bus.subscribe(received.append)) if not made else None):
        bus.emit(HIT)
        bus.emit(MISS)
    made[0].cancel()
    assert received == [MISS]


def test_a_handler_that_raises_is_reported_and_affects_no_other(
    bus: EventBus, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(event: Event) -> None:
        raise ValueError("no such thing")

    received: list[Event] = []
    with bus.subscribe(broken), bus.subscribe(received.append):
        bus.emit(HIT)
    reported = capsys.readouterr()
    assert reported.out == ""
    assert "Exception ignored in opero event handler <function" in reported.err
    assert "ValueError: no such thing" in reported.err
    assert received == [HIT]


def test_a_handler_whose_repr_raises_affects_no_call(bus: EventBus) -> None:
    class Rude:
        def __call__(self, event: Event) -> None:
            raise ValueError

        def __repr__(self) -> str:
            raise ValueError

    with bus.subscribe(Rude()):
        bus.emit(HIT)


@pytest.mark.parametrize("stderr", [None, io.TextIOWrapper(io.BytesIO())])
def test_a_process_without_stderr_is_not_disturbed(
    bus: EventBus, stderr: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stderr is not None:
        stderr.close()
    monkeypatch.setattr(sys, "stderr", stderr)
    with bus.subscribe(lambda e: 1 / 0):
        bus.emit(HIT)


def test_what_is_no_exception_passes_through(bus: EventBus) -> None:
    def stop(event: Event) -> None:
        raise KeyboardInterrupt

    with bus.subscribe(stop), pytest.raises(KeyboardInterrupt):
        bus.emit(HIT)


def test_a_handler_that_cannot_be_called_is_refused(bus: EventBus) -> None:
    with pytest.raises(OperoUsageError, match="handler=None must be a callable"):
        bus.subscribe(None)  # type: ignore[arg-type]
    assert not bus.active


def test_the_switch_is_held_while_there_is_a_subscription() -> None:
    first, second = event_bus.subscribe(print), event_bus.subscribe(print)
    assert switch.on
    first.cancel()
    assert switch.on
    second.cancel()
    assert not switch.on


def test_subscribing_from_many_threads_loses_no_subscription() -> None:
    bus = EventBus()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:

        def come_and_go() -> None:
            for _ in range(200):
                bus.subscribe(print).cancel()
            bus.subscribe(print)

        threads = [threading.Thread(target=come_and_go) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert repr(bus) == "<EventBus with 4 subscriptions>"
    for subscription in bus.subscriptions:
        subscription.cancel()


def test_repr_of_a_subscription_names_its_handler_and_types(bus: EventBus) -> None:
    with (
        bus.subscribe(print) as everything,
        bus.subscribe(print, types=[CacheHit, CacheMiss]) as two,
    ):
        assert repr(everything) == "<Subscription of <built-in function print> to all events>"
        assert repr(two) == "<Subscription of <built-in function print> to CacheHit, CacheMiss>"


# --- events ---------------------------------------------------------------------------------------


@rows("kind", KINDS)
def test_every_event_is_public_and_documented(kind: type[Event]) -> None:
    assert kind.__name__ in events.__all__
    assert kind.__doc__
    own = set(names(kind)) - set(names(Event)) - {"details"}
    assert all(name in (kind.__doc__ or "") for name in own)


@rows("kind", KINDS)
def test_every_event_can_be_copied_pickled_and_shown(kind: type[Event]) -> None:
    given: dict[str, Any] = dict.fromkeys(names(kind), 1)
    event = kind(**given | ({"details": {}} if "details" in given else {}))
    assert pickle.loads(pickle.dumps(event)) == copy.deepcopy(event) == event
    assert repr(event).startswith(f"{kind.__name__}(function=1, at=1")
    assert hash(event) == hash(copy.copy(event))


def test_an_event_knows_when_it_happened() -> None:
    before = time.time()
    assert before <= CacheHit(function="f").at <= time.time()


def test_an_event_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        HIT.function = "g"  # type: ignore[misc]


# --- events of a call ----------------------------------------------------------------------------


def test_events_of_a_call_with_retries_and_fallbacks() -> None:
    @opero(arg_fallback="model", retries=1, jitter=False, rate_limit="1/s")
    def ask(model: str) -> str:
        if ask.stats.calls <= 2:
            raise ConnectionError(model)
        return model

    with fake_clock(), capture_events() as reported:
        ask(["big", "small"])
        ask(["big", "small"])
    received = [type(e) for e in reported if not isinstance(e, LimiterWaited)]
    assert received == [
        CacheMiss,
        AttemptFailed,
        FallbackUsed,
        AttemptFailed,
        RetryScheduled,
        CallSucceeded,
        CacheHit,
    ]
    by_kind = {type(e): dataclasses.asdict(e) for e in reported}
    assert by_kind[FallbackUsed]["value"] == "model='small'"
    assert by_kind[FallbackUsed]["index"] == 1
    assert by_kind[RetryScheduled]["attempt"] == 2
    assert by_kind[RetryScheduled]["delay"] == 0.1
    assert by_kind[CallSucceeded]["calls"] == 3
    assert by_kind[LimiterWaited]["seconds"] > 0
    assert {e.function for e in reported} == {ask.__qualname__}


def test_call_gave_up_has_the_error() -> None:
    error = ConnectionError("gone")
    fetch = opero(cache=False, retries=1, min_delay=0)(flaky("ok", failures=9, error=error))
    with capture_events(CallGaveUp) as reported, pytest.raises(ConnectionError):
        fetch()
    (event,) = reported
    assert isinstance(event, CallGaveUp)
    assert (event.attempts, event.calls) == (2, 2)
    assert event.error is error


def test_no_event_holds_a_secret() -> None:
    @opero(cache=False, arg_fallback="api_key", retries=1, min_delay=0)
    def fetch(api_key: object) -> None:
        raise ConnectionError

    with capture_events() as reported, pytest.raises(ConnectionError):
        fetch(["hunter-1", "hunter-2"])
    assert reported
    assert "hunter" not in repr(reported)


# --- listeners of one function --------------------------------------------------------------------


def test_on_event_gets_events_of_its_function_only() -> None:
    received: list[Event] = []

    @opero(on_event=received.append)
    def mine(x: int) -> int:
        return x

    @opero
    def other(x: int) -> int:
        return x

    mine(1)
    other(1)
    mine(1)
    assert [type(e) for e in received] == [CacheMiss, CallSucceeded, CacheHit]
    assert {e.function for e in received} == {mine.__qualname__}


def test_several_listeners_and_the_bus_get_events() -> None:
    first: list[Event] = []
    second: list[Event] = []
    fetch = opero(cache=False, on_event=[first.append, second.append])(lambda: 1)
    with capture_events() as third:
        fetch()
    assert first == second == third
    assert len(first) == 1


def test_a_listener_that_raises_breaks_no_call(capsys: pytest.CaptureFixture[str]) -> None:
    fetch = opero(cache=False, on_event=lambda event: 1 / 0)(lambda: 5)
    assert (fetch(), fetch()) == (5, 5)
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_listener_does_not_slow_other_functions_down() -> None:
    opero(cache=False, on_event=print)(lambda: 5)
    assert not switch.on


def test_no_event_is_built_without_a_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[type] = []

    def count(self: Event, **given: Any) -> None:
        built.append(type(self))

    monkeypatch.setattr(Event, "__init__", count)
    fetch = opero(min_delay=0)(flaky("ok", failures=1))
    fetch()
    fetch()
    assert built == []


def test_the_fast_path_is_back_when_the_last_listener_leaves() -> None:
    seen: list[int] = []

    @opero(cache=False)
    def fetch() -> int:
        frame = sys._getframe(1)
        seen.append(sum("<opero wrapper" in f.f_code.co_filename for f in [frame]))
        return 1

    fetch()
    fetch()
    with event_bus.subscribe(lambda e: None):
        fetch()
    fetch()
    assert seen[1:] == [1, 0, 1], "called straight from the wrapper, but for the listener"


# --- unsubscribe ----------------------------------------------------------------------------------


class Sink:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def write(self, event: Event) -> None:
        self.seen.append(event["type"])

    async def later(self, event: Event) -> None:
        self.seen.append(event["type"])


def test_unsubscribe_ends_all_subscriptions_of_a_bound_method(bus: EventBus) -> None:
    sink, other = Sink(), Sink()
    bus.subscribe(sink.write)
    bus.subscribe(sink.write)
    bus.subscribe(other.write)
    assert bus.unsubscribe(sink.write) == 2
    assert bus.unsubscribe(sink.write) == bus.unsubscribe(print) == 0
    bus.emit({"type": "one"})
    assert (sink.seen, other.seen) == ([], ["one"])


def test_unsubscribe_on_the_default_bus_releases_the_fast_paths() -> None:
    sink = Sink()
    event_bus.subscribe(sink.later)
    assert switch.on
    assert event_bus.unsubscribe(sink.later) == 1
    assert not switch.on


def test_a_handler_can_unsubscribe_itself(bus: EventBus) -> None:
    seen = []

    def once(event: Event) -> None:
        seen.append(event)
        bus.unsubscribe(once)

    bus.subscribe(once)
    bus.emit(HIT)
    bus.emit(HIT)
    assert seen == [HIT]


# --- module ---------------------------------------------------------------------------------------


def test_events_of_a_call_carry_the_module_of_the_function() -> None:
    with capture_events(Event) as seen:
        opero(cache=False)(names)(Event)
    assert {(e.function, e.module) for e in seen} == {("names", __name__)}


def test_events_of_a_task_carry_the_module_of_its_function() -> None:
    with capture_events() as seen:
        run_sync(Task(names, Event))
    assert {(e.function, e.module) for e in seen} == {("names", __name__)}
