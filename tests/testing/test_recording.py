# this_file: tests/testing/test_recording.py
"""Recorded outcomes are replayed without calls; a call that was not recorded fails."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import SecretStr

from opero import event_bus, opero, operomap
from opero.core import get_retry_decorator
from opero.errors import OperoError, OperoUsageError, OperoWarning
from opero.testing import NotRecordedError, fake_clock, flaky, record, replay, set_disabled
from opero.utils import ambient
from opero.utils.ambient import switch

pytestmark = pytest.mark.internal

CALLS: list[Any] = []


@pytest.fixture(autouse=True)
def _no_calls_yet() -> Iterator[None]:
    CALLS.clear()
    yield
    assert ambient.tape() is None
    assert not switch.on


@pytest.fixture
def tape(tmp_path: Path) -> Path:
    """Where to record."""
    return tmp_path / "calls.jsonl"


def lines(tape: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in tape.read_text().splitlines()[1:]]


def body(x: Any, *more: Any, client: Any = None, api_key: str = "sk-real") -> Any:
    CALLS.append(x)
    if isinstance(x, Exception):
        raise x
    return [x, *more]


def of(face: Any, **options: Any) -> Any:
    return opero(**{"cache": False, "retries": 0, **options})(face.of(body))


# --- results and failures -------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"cache": True}], ids=["cache off", "cache on"])
def test_a_replay_returns_the_recorded_outcome_without_a_call(
    face: Any, tape: Path, options: dict[str, Any]
) -> None:
    f = of(face, **options)
    with record(tape):
        assert face.run(f, 1) == [1]
        assert face.run(f, "a") == ["a"]
    CALLS.clear()
    with replay(tape):
        assert face.run(f, "a") == ["a"]
        assert face.run(f, 1) == [1]
    assert CALLS == []


@dataclass(frozen=True)
class Price:
    cents: int


class Odd:
    """An object that only a pickle can keep."""

    def __init__(self, x: int) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Odd) and self.x == other.x

    __hash__ = None  # type: ignore[assignment]  # as dicts


VALUES = [
    None,
    float("nan"),
    -0.0,
    2**80,
    "\u2028\ud800 é",
    b"\0",
    (1, {2: {3}}),
    {"$": 1},
    {"type": "no:module"},
    Price(5),
    Odd(5),
    np.arange(6.0).reshape(2, 3),
    pd.DataFrame({"a": [1, 2]}),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_any_result_is_replayed_with_its_type(tape: Path, value: Any) -> None:
    f = opero(cache=False)(lambda: value)
    with record(tape):
        f()
    with replay(tape):
        again = f()
    assert type(again) is type(value)
    if isinstance(value, np.ndarray | pd.DataFrame):
        assert (again == value).all(axis=None)
    else:
        assert repr(again) == repr(value) if type(value) is float else again == value


def test_plain_results_can_be_read_in_the_file(tape: Path) -> None:
    f = opero(cache=False)(lambda: {"EUR": 12.5})
    with record(tape):
        f()
    assert lines(tape)[0]["result"] == {"EUR": 12.5}
    assert lines(tape)[0]["function"].endswith("<lambda>")


def test_each_caller_gets_a_value_of_its_own(tape: Path) -> None:
    f = opero(body)
    with record(tape):
        f(1)
    with replay(tape):
        f(1).append("changed")
        assert f(1) == [1]


class QuotaError(Exception):
    def __init__(self, *, left: int) -> None:
        super().__init__(f"{left} left")
        self.left = left


@pytest.mark.parametrize(
    "error", [ConnectionError("no route"), KeyError("x"), FileNotFoundError(2, "gone", "f"), QuotaError(left=3)],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_a_failure_is_raised_again(face: Any, tape: Path, error: Exception) -> None:
    f = opero(cache=False, retries=2, min_delay=0)(face.of(flaky(None, failures=9, error=error)))
    with record(tape), pytest.raises(type(error)):
        face.run(f)
    with replay(tape), pytest.raises(type(error)) as caught:
        face.run(f)
    assert str(caught.value) == str(error)
    assert vars(caught.value).get("left") == vars(error).get("left")
    assert "gave up after 3 attempts" in caught.value.__notes__[0]
    assert f.stats.calls == 3


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def test_a_failure_without_a_text_is_raised_again(tape: Path) -> None:
    f = opero(cache=False)(flaky(None, failures=9, error=MuteError(7)))
    with record(tape), pytest.raises(MuteError):
        f()
    with replay(tape), pytest.raises(MuteError) as caught:
        f()
    assert caught.value.args == (7,)


def test_a_replay_neither_waits_nor_retries(tape: Path) -> None:
    f = opero(cache=False, retries=3, min_delay=20, rate_limit="1/minute")(flaky("ok", failures=2))
    with fake_clock(), record(tape):
        assert f() == "ok"
    with fake_clock() as clock, replay(tape):
        assert f() == "ok"
    assert clock.elapsed == 0


def test_a_mistake_in_a_call_is_no_recording(tape: Path) -> None:
    f = opero(cache_key=lambda x: object())(lambda x: x)
    with record(tape), pytest.raises(OperoUsageError):
        f(1)
    assert lines(tape) == []


def test_wrong_arguments_are_refused_by_the_function(tape: Path) -> None:
    f = opero(body)
    with record(tape):
        pass
    with replay(tape), pytest.raises(TypeError, match="missing"):
        f()


# --- which call is which --------------------------------------------------------------------------


def test_a_call_that_was_not_recorded_fails_and_is_not_made(face: Any, tape: Path) -> None:
    f = of(face)
    with record(tape):
        face.run(f, 1)
    CALLS.clear()
    with pytest.raises(NotRecordedError) as caught, replay(tape):
        face.run(f, 2)
    assert CALLS == []
    assert str(caught.value).startswith(
        "body() was not recorded: calls.jsonl holds 1 other call of the function"
    )
    assert caught.value.function.endswith(":body")
    assert len(caught.value.call) == 24
    assert caught.value.call in str(caught.value)
    assert isinstance(caught.value, OperoError | AssertionError)


def test_a_block_fails_if_something_has_swallowed_that(tape: Path) -> None:
    f = opero(body)
    with record(tape):
        pass
    with (
        pytest.raises(NotRecordedError, match="no other calls of the function"),
        replay(tape),
        contextlib.suppress(Exception),
    ):
        f(1)


def test_outcomes_of_equal_calls_are_replayed_in_order(tape: Path) -> None:
    f = opero(cache=False, retries=0)(flaky(lambda: len(CALLS), failures=1))
    with record(tape):
        with pytest.raises(ConnectionError):
            f()
        assert f() == 0
        CALLS.append("later")
        assert f() == 1
    with replay(tape):
        with pytest.raises(ConnectionError):
            f()
        assert [f(), f()] == [0, 1]


def test_without_a_cache_one_call_more_than_recorded_fails(tape: Path) -> None:
    f = opero(cache=False)(body)
    with record(tape):
        f(1), f(1)
    with (
        pytest.raises(NotRecordedError, match="holds it 2 times, and it is made once more"),
        replay(tape),
    ):
        f(1), f(1), f(1)


def test_with_a_cache_the_last_outcome_answers_all_further_calls(tape: Path) -> None:
    f = opero(body)
    with record(tape):
        f(1), f(1)
    assert len(lines(tape)) == 1
    with replay(tape):
        assert [f(1) for _ in range(5)] == [[1]] * 5


def test_a_cached_result_is_recorded(tape: Path) -> None:
    f = opero(body)
    f(1)
    with record(tape):
        f(1)
    f.cache.clear()
    with replay(tape):
        assert f(1) == [1]
    assert CALLS == [1]


def test_ways_to_write_a_call_are_one_call(tape: Path) -> None:
    @opero
    def f(x: int, y: int = 2, **more: int) -> int:
        return x + y

    with record(tape):
        f(1, z=3)
    with replay(tape):
        assert f(y=2, z=3, x=1) == 3


def test_options_say_what_is_part_of_a_call(tape: Path) -> None:
    ignoring = opero(cache_ignore=["client"])(body)
    keyed = opero(cache=False, cache_key=lambda x, *_, **__: x % 10)(body)
    with record(tape):
        ignoring(1, client="a"), keyed(3)
    with replay(tape):
        assert ignoring(1, client="b") == [1]
        assert keyed(13) == [3]


def test_what_has_no_content_is_no_part_of_a_call(tape: Path) -> None:
    class Client:
        @opero(cache=False)
        def ask(self, x: int, callback: Callable[[], None]) -> int:
            return x

    with record(tape):
        Client().ask(1, lambda: None)
    with replay(tape):
        assert Client().ask(1, lambda: 1) == 1


def _adder(n: int, lock: Any) -> Callable[[int], int]:
    def add(x: int) -> int:
        return x + n if lock else 0

    return opero(cache=False)(add)


def test_functions_of_one_name_are_distinguished_by_their_closures(tape: Path) -> None:
    with record(tape):
        _adder(1, threading.Lock())(1), _adder(2, threading.Lock())(1)
    with replay(tape):
        assert _adder(2, threading.Lock())(1) == 3
        assert _adder(1, threading.Lock())(1) == 2


def test_functions_of_one_name_are_distinguished_by_what_they_are_bound_to(tape: Path) -> None:
    class Adder:
        def __init__(self, number: int) -> None:
            self.number = number
            self.lock = threading.Lock()

        def add(self, x: int) -> int:
            return self.number + x

        def __call__(self, x: int) -> int:
            return self.number + x

    @dataclass(frozen=True)
    class Shop:
        name: str

        def price(self, item: str) -> str:
            return f"{item} of {self.name}"

    def add(number: int, x: int, client: Any = None) -> int:
        return number + x

    plain = opero(cache=False)

    def made(client: Any) -> list[Any]:
        both = [functools.partial(add, number, client=client) for number in (1, 2)]
        return [
            *(plain(one)(5) for one in both),
            *(plain(Shop(name).price)("tea") for name in ("Ada", "Bo")),
            plain(Adder(3).add)(5),
            plain(Adder(4))(5),
        ]

    with record(tape):
        recorded = made(threading.Lock())
    assert recorded == [6, 7, "tea of Ada", "tea of Bo", 8, 9]
    with replay(tape):
        assert made(threading.Lock()) == recorded


def test_a_closure_that_changes_stays_the_same_function(tape: Path) -> None:
    seen: list[int] = []

    @opero(cache=False)
    def f(x: int) -> int:
        seen.append(x)
        return x

    with record(tape):
        f(1), f(2)
    with replay(tape):
        assert (f(1), f(2)) == (1, 2)


# --- secrets and safety ---------------------------------------------------------------------------


def test_secrets_are_neither_written_nor_part_of_a_call(tape: Path) -> None:
    @opero(cache=False, retries=0)
    def ask(x: int, api_key: str) -> str:
        if x == 2:
            raise ConnectionError(f"{api_key} refused at https://me:hunter2@host/")
        return f"asked with {api_key}"

    @opero(cache=False)
    def outer(x: int) -> str:
        return ask(x, "sk-real-one")

    with record(tape):
        ask(1, api_key="sk-real-one"), outer(1)
        with pytest.raises(ConnectionError):
            ask(2, "sk-real-one")
    assert "sk-real" not in tape.read_text()
    assert "hunter2" not in tape.read_text()
    with replay(tape):
        assert ask(1, api_key="none") == "asked with ***"


@dataclass
class Login:
    word: str


@pytest.mark.parametrize(
    "credentials",
    [{"a": {"b": ["hunter2"]}}, {"hunter2"}, Login("hunter2"), SecretStr("hunter2")],
    ids=repr,
)
def test_a_secret_within_an_argument_is_not_written(tape: Path, credentials: Any) -> None:
    f = opero(cache=False)(lambda credentials: "got hunter2")
    with record(tape):
        f(credentials)
    assert "hunter2" not in tape.read_text()


def test_a_secret_in_what_only_a_pickle_can_keep_is_not_written(tape: Path) -> None:
    @opero(cache=False)
    def f(token: str) -> Odd:
        return Odd(token)

    with pytest.warns(OperoWarning, match="holds a secret argument"), record(tape):
        f("tok-12345")
    assert "encoded" not in lines(tape)[0]


def test_arguments_are_not_written(tape: Path) -> None:
    f = opero(cache=False)(lambda question: 42)
    with record(tape):
        f("what I asked the doctor")
    assert "doctor" not in tape.read_text()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"function": "$f", "call": "$c", "encoded": "cGlja2xl"}', "it cannot be read"),
        (
            '{"function": "$f", "call": "$c", "result": {"$": "data", "t": "antigravity:X", "v": {}}}',
            "it needs the module antigravity, which is not loaded",
        ),
        ('{"function": "$f", "call": "$c", "result": {"$": "tuple"}}', "it cannot be read"),
        (
            (
                '{"function": "$f", "call": "$c", "error": {"type": "antigravity:X", "args": [],'
                ' "made_from": [], "attributes": {}, "notes": [], "message": "m"}}'
            ),
            "it needs the module antigravity",
        ),
        (
            (
                '{"function": "$f", "call": "$c", "error": {"type": "builtins:NoSuchError", "args": [],'
                ' "made_from": [], "attributes": {}, "notes": [], "message": "m"}}'
            ),
            "its class NoSuchError is not in builtins any more",
        ),
    ],
    ids=["forged", "strange class", "broken", "strange error", "lost error"],
)
def test_an_unreadable_outcome_raises_and_executes_nothing(tape: Path, line: str, why: str) -> None:
    f = opero(cache=False)(body)
    with record(tape):
        f(1)
    first = lines(tape)[0]
    received = line.replace("$f", first["function"]).replace("$c", first["call"])
    tape.write_text(f'{{"opero recording": 1}}\n{received}\n')
    with pytest.raises(NotRecordedError, match=why), replay(tape):
        f(1)
    assert "antigravity" not in sys.modules


def test_a_pickle_that_was_signed_elsewhere_is_not_opened(
    tape: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    f = opero(cache=False)(Odd)
    with record(tape):
        f(1)
    monkeypatch.setenv("OPERO_CACHE_SECRET", "that of another machine")
    with pytest.raises(NotRecordedError, match="its signature does not fit"), replay(tape):
        f(1)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no recording"),
        ("{}\n", "no recording"),
        ('{"opero recording": 1}\n{"a": 1}', "line 2"),
        ('{"opero recording": 1}\n' + "[" * 100_000, "line 2"),
        ('{"opero recording": 1}\n"\udcff"', "line 2"),
        ("\udcff\udcfe", "no recording"),
    ],
    ids=["empty", "JSON", "no call", "deep", "no text in a line", "no text"],
)
def test_a_file_that_is_no_recording_is_refused(tape: Path, text: str, why: str) -> None:
    tape.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(OperoUsageError, match=why), replay(tape):
        pass


def test_a_result_that_cannot_be_kept_reaches_its_caller_and_is_missed_later(tape: Path) -> None:
    def lock() -> Any:
        return threading.Lock()

    f = opero(cache=False)(lock)
    with (
        pytest.warns(OperoWarning, match=r"lock\(\) is not recorded"),
        record(tape),
    ):
        assert f().acquire()
    with pytest.raises(NotRecordedError, match="cannot be pickled"), replay(tape):
        f()


# --- streams --------------------------------------------------------------------------------------


def counting(face: Any) -> Any:
    """Return a generator function of either kind that gives numbers, fails at three, and gives back what is sent."""

    def count(n: int, api_key: str = "sk-real") -> Iterator[Any]:
        CALLS.append(n)
        for number in range(n):
            sent = yield {"number": number, "key": api_key}
            if sent:
                yield sent
        if n == 3:
            raise ConnectionError("torn")

    async def acount(n: int, api_key: str = "sk-real") -> AsyncIterator[Any]:
        for item in count(n, api_key):
            await asyncio.sleep(0)
            yield item

    return opero(cache=False, retries=0)(acount if face.asynchronous else count)


def read(face: Any, stream: Any, most: int = 99) -> list[Any]:
    """Return the numbers of a stream, of the first `most` items if it has more, and its error at the end."""

    async def aread() -> list[Any]:
        numbers: list[Any] = []
        try:
            async for item in stream:
                numbers.append(item["number"])
                if len(numbers) == most:
                    await stream.aclose()
                    break
        except ConnectionError as error:
            numbers.append(str(error))
        return numbers

    def sread() -> list[Any]:
        numbers: list[Any] = []
        try:
            for item in stream:
                numbers.append(item["number"])
                if len(numbers) == most:
                    break
        except ConnectionError as error:
            numbers.append(str(error))
        return numbers

    return asyncio.run(aread()) if face.asynchronous else sread()


def test_a_stream_is_replayed_item_by_item_with_its_error(face: Any, tape: Path) -> None:
    count = counting(face)
    with record(tape):
        assert read(face, count(2)) == [0, 1]
        assert read(face, count(3)) == [0, 1, 2, "torn"]
    CALLS.clear()
    with replay(tape):
        assert read(face, count(3, api_key="none")) == [0, 1, 2, "torn"]
        assert read(face, count(2, api_key="none")) == [0, 1]
    assert CALLS == []
    assert "sk-real" not in tape.read_text()


def test_a_stream_that_was_dropped_is_replayed_as_far_as_it_was_read(face: Any, tape: Path) -> None:
    count = counting(face)
    with record(tape):
        assert read(face, count(9), most=2) == [0, 1]
    with replay(tape):
        assert read(face, count(9), most=2) == [0, 1]
    with pytest.raises(NotRecordedError, match="its consumer left the stream"), replay(tape):
        read(face, count(9))


def test_a_stream_that_is_open_when_the_block_ends_is_recorded_so_far(tape: Path) -> None:
    @opero(cache=False)
    def count() -> Iterator[int]:
        yield from range(9)

    with record(tape):
        stream = count()
        assert [next(stream), next(stream)] == [0, 1]
    assert next(stream) == 2
    stream.close()
    (line,) = lines(tape)
    assert [part.get("result") for part in line["stream"]] == [0, 1, None]
    with replay(tape):
        stream = count()
        assert [next(stream), next(stream)] == [0, 1]


def test_a_stream_is_replayed_with_what_its_generator_returned(tape: Path) -> None:
    @opero(cache=False)
    def count() -> Generator[int, str, str]:
        sent = yield 1
        return sent

    def run() -> list[Any]:
        stream = count()
        first = next(stream)
        with pytest.raises(StopIteration) as end:
            stream.send("sent")
        return [first, end.value.value]

    with record(tape):
        assert run() == [1, "sent"]
    with replay(tape):
        assert run() == [1, "sent"]


def test_items_that_cannot_be_kept_are_missed_where_they_come(tape: Path) -> None:
    @opero(cache=False)
    def give() -> Iterator[Any]:
        yield 1
        yield threading.Lock()

    with pytest.warns(OperoWarning, match=r"give\(\) is not recorded: .*lock"), record(tape):
        assert len(list(give())) == 2
    received: list[Any] = []
    with pytest.raises(NotRecordedError, match="cannot be pickled"), replay(tape):
        received.extend(give())
    assert received == [1]


def test_a_cancelled_stream_is_recorded_so_far(tape: Path) -> None:
    @opero(cache=False)
    async def count() -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(60)

    async def main() -> None:
        async def consume() -> None:
            async for _ in count():
                pass

        task = asyncio.create_task(consume())
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with record(tape):
        asyncio.run(main())
    (line,) = lines(tape)
    assert line["stream"][0] == {"result": 1}
    assert list(line["stream"][1]) == ["missing"]


@pytest.mark.parametrize("stream", ["[]", "[{}]", "5", '[{"result": 1}, {"speed": 2}]'])
def test_a_stream_that_cannot_be_meant_is_no_recording(tape: Path, stream: str) -> None:
    tape.write_text(
        f'{{"opero recording": 1}}\n{{"function": "f", "call": "c", "stream": {stream}}}\n'
    )
    with pytest.raises(OperoUsageError, match="line 2, cannot be read"), replay(tape):
        pass


# --- nested, concurrent, other ways to call -------------------------------------------------------


def test_a_call_within_a_call_is_recorded_too(face: Any, tape: Path) -> None:
    inner = of(face)
    if face.asynchronous:

        async def body_of_outer(x: int) -> Any:
            return ["outer", await inner(x)]
    else:

        def body_of_outer(x: int) -> Any:  # type: ignore[misc]  # async beside sync
            return ["outer", inner(x)]

    outer = opero(cache=False)(body_of_outer)
    with record(tape):
        face.run(outer, 1)
    CALLS.clear()
    with replay(tape):
        assert face.run(outer, 1) == ["outer", [1]]
        assert face.run(inner, 1) == [1]
    assert CALLS == []


def test_tasks_are_recorded_and_replayed(tape: Path) -> None:
    @opero(cache=False)
    async def f(x: int) -> int:
        CALLS.append(x)
        await asyncio.sleep(0.001 * (x % 7))
        return x * x

    async def main() -> list[int]:
        return await asyncio.gather(*map(f, range(100)))

    with record(tape):
        expected = asyncio.run(main())
    CALLS.clear()
    with replay(tape):
        assert asyncio.run(main()) == expected
    assert CALLS == []


def test_threads_are_recorded_and_replayed(tape: Path) -> None:
    f = opero(cache=False)(body)

    def all_at_once() -> list[Any]:
        got: list[Any] = []
        threads = [threading.Thread(target=lambda n=n: got.append(f(n % 5))) for n in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sorted(got)

    with record(tape):
        expected = all_at_once()
    CALLS.clear()
    with replay(tape):
        assert all_at_once() == expected
    assert (CALLS, len(lines(tape))) == ([], 40)


def test_the_items_of_a_map_are_recorded_even_where_they_are_cached(face: Any, tape: Path) -> None:
    mode = "async" if face.asynchronous else "thread"
    f = operomap(mode=mode, progress=False)(face.of(body))
    face.run(f, [1])
    with record(tape):
        assert face.run(f, [1, 2, 1]) == [[1], [2], [1]]
    f.cache.clear()
    CALLS.clear()
    with replay(tape):
        assert face.run(f, [1, 2, 1]) == [[1], [2], [1]]
        assert face.run(f.one, 1) == [1]
    assert CALLS == []
    with pytest.raises(NotRecordedError), replay(tape):
        face.run(f, [3])


def test_items_of_a_process_map_are_recorded_in_the_parent(tape: Path) -> None:
    f = operomap(progress=False, cache=False)(body)
    with record(tape):
        assert list(f.stream([1, 2])) == [[1], [2]]
    assert CALLS == [1, 2]
    with replay(tape):
        assert f.map([1, 2]).values == [[1], [2]]
    assert CALLS == [1, 2]


def test_a_plain_function_that_returns_awaitables_is_replayed_as_one(tape: Path) -> None:
    async def answer(x: int) -> int:
        return x

    with record(tape):
        assert asyncio.run(opero(cache=False)(answer)(1)) == 1
    with replay(tape):
        assert asyncio.run(opero(cache=False)(answer)(1)) == 1


def test_a_receipt_of_a_replayed_call_is_one_of_a_hit(face: Any, tape: Path) -> None:
    f = of(face)
    with record(tape):
        assert face.run(f.call, 1).source == "fresh"
    with replay(tape):
        receipt = face.run(f.call, 1)
    assert (receipt.value, receipt.source, receipt.calls) == ([1], "hit", 0)


def test_standalone_stages_are_recorded_too(tape: Path) -> None:
    f = get_retry_decorator(retries=1)(body)
    with record(tape):
        f(1)
    with replay(tape):
        assert f(1) == [1]
    assert CALLS == [1]


def test_a_listener_changes_nothing(tape: Path) -> None:
    f = opero(cache=False)(body)
    with event_bus.subscribe(lambda event: None):
        with record(tape):
            f(1)
        with replay(tape):
            assert f(1) == [1]


def test_the_test_switch_changes_nothing(tape: Path) -> None:
    f = opero(body)
    with set_disabled():
        with record(tape):
            f(1)
        with replay(tape):
            assert f(1) == [1]
    assert CALLS == [1]


def test_an_inner_block_has_its_own_file(tmp_path: Path) -> None:
    f = opero(cache=False)(body)
    with record(tmp_path / "outer"):
        f(1)
        with record(tmp_path / "inner"):
            f(2)
        f(3)
    assert (len(lines(tmp_path / "outer")), len(lines(tmp_path / "inner"))) == (2, 1)
    with replay(tmp_path / "outer"):
        with replay(tmp_path / "inner"):
            assert f(2) == [2]
        assert f(1) == [1]


def test_outcomes_recorded_before_an_interrupted_block_are_kept(tape: Path) -> None:
    f = opero(cache=False)(body)
    broken = opero(cache=False, retries=0)(flaky(None, failures=1))
    with contextlib.suppress(ConnectionError), record(tape):
        f(1), broken(), f(2)
    assert len(lines(tape)) == 2
    with replay(tape):
        assert f(1) == [1]


def test_a_call_that_outlives_the_block_is_not_recorded(tape: Path) -> None:
    f = opero(cache=False)(echo)

    async def main() -> int:
        with record(tape):
            running = f(1)
        return await running

    assert asyncio.run(main()) == 1
    assert lines(tape) == []


class BrokenError(Exception):
    pass


async def echo(x: int) -> int:
    return x


def test_a_background_refresh_is_not_recorded(tape: Path) -> None:
    with fake_clock() as clock:
        done = threading.Event()
        f = opero(
            cache_ttl=100,
            cache_refresh=0.5,
            on_event=lambda event: done.set() if type(event).__name__ == "CacheRefreshed" else None,
        )(lambda: len(CALLS))
        f()
        clock.advance(60)
        with record(tape):
            assert f() == 0
            assert done.wait(20)
    assert len(lines(tape)) == 1


def test_a_failure_leaves_no_reference_cycle(tape: Path) -> None:
    f = opero(cache=False, retries=0)(flaky(None, failures=1, error=BrokenError))
    with record(tape), pytest.raises(BrokenError):
        f()
    gc.collect()
    gc.disable()
    try:
        with replay(tape):
            try:
                f()
            except BrokenError as error:
                gone = weakref.ref(error)
        assert gone() is None
    finally:
        gc.enable()


def test_another_process_replays_what_this_one_has_recorded(tape: Path, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(
        "import sys\n"
        "from opero import opero\n"
        "@opero(cache_ignore=['session'])\n"
        "def price(item, session):\n"
        "    print('asking')\n"
        "    return {item: (1, 2.5)}\n"
    )
    script = (
        "import sys, opero.testing as t, shop\n"
        "with getattr(t, sys.argv[1])(sys.argv[2]): print(shop.price('tea', object()))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    outs = [
        subprocess.run(
            [sys.executable, "-W", "error", "-c", script, verb, str(tape)],
            capture_output=True,
            text=True,
            check=True,
            env={**env, "PYTHONHASHSEED": seed},
        ).stdout
        for verb, seed in (("record", "1"), ("replay", "2"))
    ]
    assert outs == ["asking\n{'tea': (1, 2.5)}\n", "{'tea': (1, 2.5)}\n"]
