# this_file: tests/core/test_receipt.py
"""`f.call(...)`: the value, and how it came about."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest

from opero import Receipt, opero
from opero.testing import FakeClock, flaky

quick: dict[str, Any] = {"cache": False, "min_delay": 0}


def test_a_first_success_is_recorded_as_such(face: Any, clock: FakeClock) -> None:
    def body() -> str:
        clock.advance(2)
        return "fine"

    receipt = face.run(opero(cache=False)(face.of(body)).call)
    assert receipt == Receipt(value="fine", source="fresh", attempts=1, calls=1, seconds=2.0)


def test_every_field_of_a_bumpy_call(face: Any, clock: FakeClock) -> None:
    raised: list[Exception] = []

    def body(prompt: str, model: str) -> str:
        clock.advance(1)
        if len(raised) < 3:
            raised.append(ConnectionError(model))
            raise raised[-1]
        return f"{prompt} by {model}"

    fetch = opero(cache=False, arg_fallback="model", min_delay=4, jitter=False)(face.of(body))
    receipt = face.run(fetch.call, "hi", ["a", "b"])
    assert receipt == Receipt(
        value="hi by b",
        source="fresh",
        attempts=2,
        calls=4,
        fallback="b",
        label="model='b'",
        slept=4.0,
        waited=0.0,
        seconds=8.0,
        rejected=False,
        errors=tuple(raised),
    )
    assert all(a is b for a, b in zip(receipt.errors, raised, strict=True))


def test_a_cached_value_cost_nothing(face: Any) -> None:
    fetch = opero(arg_fallback="model")(face.of(lambda model: model))
    fresh, hit = face.run(fetch.call, ["a", "b"]), face.run(fetch.call, ["a", "b"])
    assert (fresh.source, fresh.attempts, fresh.calls, fresh.fallback) == ("fresh", 1, 1, "a")
    assert (hit.source, hit.attempts, hit.calls, hit.fallback) == ("hit", 0, 0, None)
    assert (hit.value, hit.label, hit.errors) == ("a", None, ())


def test_a_value_that_another_caller_computed_is_shared() -> None:
    begun = asyncio.Event()

    @opero
    async def fetch(x: int) -> int:
        begun.set()
        await asyncio.sleep(0.01)
        return x

    async def main() -> list[Receipt[int]]:
        leader = asyncio.ensure_future(fetch.call(1))
        await begun.wait()
        return [await fetch.call(1), await leader]

    follower, leader = asyncio.run(main())
    assert (leader.source, leader.calls) == ("fresh", 1)
    assert (follower.source, follower.calls, follower.attempts) == ("shared", 0, 0)


def test_time_in_the_rate_limiter_is_waited(face: Any, clock: FakeClock) -> None:
    fetch = opero(cache=False, rate_limit="1/10s")(face.of(lambda: 1))
    receipts = [face.run(fetch.call) for _ in range(3)]
    assert receipts[-1].waited == pytest.approx(10, abs=0.1)
    assert receipts[-1].slept == 0
    assert fetch.stats.waited == pytest.approx(sum(r.waited for r in receipts))


@pytest.mark.parametrize(
    "call",
    [
        lambda f: f(1, 2),
        lambda f: f(1, b=2),
        lambda f: f(b=2, a=1),
        lambda f: f(1, 2, c=3),
    ],
)
def test_it_takes_the_functions_arguments_any_way(face: Any, call: Any) -> None:
    def body(a: int, b: int, *, c: int = 3) -> tuple[int, int, int]:
        return a, b, c

    assert face.run(call, opero(**quick)(face.of(body)).call).value == (1, 2, 3)


def test_it_takes_stars() -> None:
    @opero(**quick)
    def gather(*args: int, **kwargs: int) -> tuple[tuple[int, ...], dict[str, int]]:
        return args, kwargs

    assert gather.call(1, 2, a=3).value == ((1, 2), {"a": 3})


def test_it_has_the_functions_parameters_and_name() -> None:
    def fetch(a: int, /, b: int = 2, *args: int, c: int = 3, **more: int) -> None: ...

    call = opero(fetch).call
    shown = inspect.signature(call).parameters.values()
    assert [(p.name, p.kind, p.default) for p in shown] == [
        (p.name, p.kind, p.default) for p in inspect.signature(fetch).parameters.values()
    ]
    assert call.__qualname__.endswith("fetch.call")
    assert "Receipt" in call.__doc__


@pytest.mark.parametrize("args", [(), (1, 2, 3)], ids=["too few", "too many"])
def test_wrong_arguments_are_a_type_error_at_once(face: Any, args: tuple[int, ...]) -> None:
    def fetch(a: int, b: int) -> None: ...

    async def afetch(a: int, b: int) -> None: ...

    decorated = opero(cache=False)(afetch if face.asynchronous else fetch)
    with pytest.raises(TypeError, match=r"fetch\.call\(\) (missing|takes) 2 "):
        decorated.call(*args)
    assert decorated.stats.calls == 0


def test_a_failed_call_raises_and_has_no_receipt(face: Any) -> None:
    with pytest.raises(ConnectionError, match="gave up after 4 attempts"):
        face.run(opero(**quick)(face.of(flaky("never", failures=99))).call)


def test_on_a_method_it_knows_the_instance() -> None:
    class Client:
        @opero(**quick)
        def fetch(self, x: int) -> tuple[Any, int]:
            return self, x

        @opero(**quick)
        async def afetch(self, x: int) -> tuple[Any, int]:
            return self, x

    client = Client()
    assert client.fetch.call(1).value == (client, 1)
    assert asyncio.run(client.afetch.call(1)).value == (client, 1)


@pytest.mark.parametrize(
    ("receipt", "shown"),
    [
        (
            Receipt(value=1, attempts=1, calls=1),
            "<Receipt int: fresh, 1 attempt, 1 call in 0.000 s>",
        ),
        (
            Receipt(
                value="x", attempts=2, calls=3, label="m='b'", slept=1.5, waited=0.25, seconds=2
            ),
            "<Receipt str: fresh, 2 attempts, 3 calls, with m='b', 1.750 s of waiting in 2.000 s>",
        ),
        (Receipt(value=None, source="hit"), "<Receipt NoneType: hit in 0.000 s>"),
        (
            Receipt(value=[], attempts=4, calls=4, rejected=True),
            "<Receipt list: fresh, 4 attempts, 4 calls, rejected in 0.000 s>",
        ),
    ],
    ids=["smooth", "bumpy", "hit", "rejected"],
)
def test_a_receipt_shows_itself_without_the_value(receipt: Receipt[Any], shown: str) -> None:
    assert repr(receipt) == shown


def test_a_receipt_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Receipt(value=1).value = 2  # type: ignore[misc]
