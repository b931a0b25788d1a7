# this_file: tests/core/test_fallback.py
"""Argument fallback: one attempt tries the values of one parameter in order."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from opero import opero
from opero.core import get_fallback_decorator
from opero.errors import DeadlineError, OperoUsageError, OperoWarning
from opero.events import FallbackUsed
from opero.testing import FakeClock, capture_events, flaky, set_disabled

quick: dict[str, Any] = {"cache": False, "min_delay": 0}
once: dict[str, Any] = {"cache": False, "retries": 0}


class Recorder:
    """Remembers what it was called with; only the value `good` works."""

    def __init__(self, good: object = "good") -> None:
        self.good = good
        self.tried: list[Any] = []

    def __call__(self, value: object) -> str:
        self.tried.append(value)
        if value is not self.good and value != self.good:
            raise ConnectionError(str(value))
        return f"by {value}"

    def ask(self, model: object) -> str:
        """The same as a function whose parameter has a name."""
        return self(model)


# --- decisions ------------------------------------------------------------------------------------


class Point(NamedTuple):
    x: int
    y: int


numbers = (n for n in range(3))


@pytest.mark.parametrize(
    ("given", "values"),
    [
        (["a", "b"], ("a", "b")),
        (("a", "b"), ("a", "b")),
        (["a"], ("a",)),
        ("ab", ("ab",)),
        (None, (None,)),
        (b"ab", (b"ab",)),
        ({"a": 1, "b": 2}, ({"a": 1, "b": 2},)),
        ({"a", "b"}, ({"a", "b"},)),
        (numbers, (numbers,)),
        (range(3), (range(3),)),
        ([["a", "b"], ["c"]], (["a", "b"], ["c"])),
        (0, (0,)),
    ],
)
def test_only_a_list_or_tuple_holds_several_values(given: object, values: tuple[Any, ...]) -> None:
    tried: list[Any] = []

    @opero(cache=False, retries=0, arg_fallback="given")
    def fetch(given: Any) -> None:
        tried.append(given)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        fetch(given)
    assert tried == list(values)


# --- where the parameter stands -------------------------------------------------------------------


def shapes(seen: Recorder) -> dict[str, Callable[..., Any]]:
    def positional(prompt: str, model: Any) -> Any:
        return seen(model)

    def positional_only(prompt: str, model: Any, /) -> Any:
        return seen(model)

    def keyword_only(prompt: str, *, model: Any) -> Any:
        return seen(model)

    def after_star_args(prompt: str, *rest: Any, model: Any = ("unused",)) -> Any:
        return seen(model)

    def before_star_args(model: Any, *rest: Any, **more: Any) -> Any:
        return seen(model)

    def behind_defaults(prompt: str = "", model: Any = "unused", size: int = 3) -> Any:
        return seen(model)

    return {f.__name__: f for f in locals().values() if callable(f) and f is not seen}


@pytest.mark.parametrize(
    ("shape", "call"),
    [
        ("positional", lambda f, v: f("hi", v)),
        ("positional", lambda f, v: f("hi", model=v)),
        ("positional", lambda f, v: f(model=v, prompt="hi")),
        ("positional_only", lambda f, v: f("hi", v)),
        ("keyword_only", lambda f, v: f("hi", model=v)),
        ("after_star_args", lambda f, v: f("hi", 1, 2, model=v)),
        ("before_star_args", lambda f, v: f(v, 1, 2, extra=3)),
        ("before_star_args", lambda f, v: f(model=v, extra=3)),
        ("behind_defaults", lambda f, v: f(model=v)),
        ("behind_defaults", lambda f, v: f("hi", v, 4)),
    ],
)
@pytest.mark.parametrize("way", ["plain", "call"])
def test_the_values_may_come_any_way(face: Any, shape: str, call: Any, way: str) -> None:
    seen = Recorder()
    fetch = opero(arg_fallback="model", **once)(face.of(shapes(seen)[shape]))
    result = face.run(call, fetch if way == "plain" else fetch.call, ["bad", "good", "spare"])
    assert (result if way == "plain" else result.value) == "by good"
    assert seen.tried == ["bad", "good"]


@pytest.mark.parametrize("way", ["plain", "call"])
def test_the_values_may_come_from_a_default(way: str) -> None:
    seen = Recorder()

    def positional(prompt: str, model: Any = ("bad", "good")) -> Any:
        return seen(model)

    def positional_only(prompt: str, model: Any = ["bad", "good"], /) -> Any:  # noqa: B006
        return seen(model)

    def keyword_only(prompt: str, *, model: Any = ("bad", "good")) -> Any:
        return seen(model)

    async def asynchronous(prompt: str, model: Any = ("bad", "good"), /) -> Any:
        return seen(model)

    decorate = opero(arg_fallback="model", **once)
    for body in (positional, positional_only, keyword_only):
        fetch = decorate(body)
        (fetch if way == "plain" else fetch.call)("hi")
    fetch = decorate(asynchronous)
    asyncio.run((fetch if way == "plain" else fetch.call)("hi"))
    assert seen.tried == ["bad", "good"] * 4


def test_on_methods_the_instance_stays_where_it_is(face: Any) -> None:
    seen = Recorder()

    class Client:
        def fetch(self, prompt: str, model: Any = ("bad", "good")) -> Any:
            return self, seen(model)

    decorated = opero(arg_fallback="model", **once)(face.of(Client.fetch))
    client = Client()
    assert face.run(functools.partial(decorated, client), "hi") == (client, "by good")
    assert face.run(functools.partial(decorated, client), "hi", ["bad", "good"])[0] is client
    assert seen.tried == ["bad", "good"] * 2


def test_the_names_are_those_that_a_wrapped_function_shows(face: Any) -> None:
    seen = Recorder()

    def inner(prompt: str, model: Any = ("bad", "good")) -> Any:
        return seen(model)

    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    fetch = opero(arg_fallback="model", **once)(outer)
    assert fetch("hi") == fetch("hi", ["bad", "good"]) == fetch("hi", model=("bad", "good"))
    assert seen.tried == ["bad", "good"] * 3


@pytest.mark.parametrize("value", ["text", None, 0, {"a": 1}, {1, 2}], ids=repr)
def test_anything_but_a_list_is_the_single_value(face: Any, value: object) -> None:
    seen = Recorder(good=object())
    fetch = opero(arg_fallback="model", **once)(face.of(seen.ask))
    with pytest.raises(ConnectionError):
        face.run(fetch, value)
    assert seen.tried == [value]


def test_a_generator_is_handed_over_unread(face: Any) -> None:
    fetch = opero(arg_fallback="model", **once)(face.of(lambda model: [*model]))
    assert face.run(fetch, (n for n in range(3))) == [0, 1, 2]


def test_the_callers_list_is_never_changed(face: Any) -> None:
    given = [["bad"], ["good"]]
    before = copy.deepcopy(given)
    seen = Recorder(good=["good"])
    fetch = opero(arg_fallback="model", **quick)(face.of(seen.ask))
    assert face.run(fetch, given) == "by ['good']"
    assert given == before
    assert seen.tried[1] is given[1]


# --- what is no list of values --------------------------------------------------------------------


@pytest.mark.parametrize("empty", [[], ()], ids=repr)
def test_an_empty_list_is_an_error_at_once(face: Any, empty: Any) -> None:
    body = flaky("never", failures=99)
    fetch = opero(arg_fallback="model", **quick)(face.of(lambda model: body()))
    with pytest.raises(OperoUsageError, match=r"arg_fallback='model': the list of values is empty"):
        face.run(fetch, empty)
    assert (body.calls, fetch.stats.retries) == (0, 0)


def test_an_empty_default_is_an_error_at_decoration() -> None:
    with pytest.raises(OperoUsageError, match="the list of values is empty"):
        opero(arg_fallback="model")(lambda model=(): None)


def test_an_unknown_parameter_is_an_error_with_a_hint() -> None:
    with pytest.raises(OperoUsageError, match=r"no parameter 'modle'. Did you mean 'model'\?"):
        opero(arg_fallback="modle")(lambda prompt, model: None)


@pytest.mark.parametrize("name", ["args", "kwargs"])
def test_a_starred_parameter_holds_no_values(name: str) -> None:
    with pytest.raises(OperoUsageError, match=f"no parameter {name!r}"):
        opero(arg_fallback=name)(lambda *args, **kwargs: None)


@pytest.mark.parametrize("way", ["plain", "call"])
@pytest.mark.parametrize("options", [quick, {"arg_fallback": "model", **quick}], ids=len)
def test_a_missing_argument_is_the_functions_own_error(
    face: Any, way: str, options: dict[str, Any]
) -> None:
    body = flaky("fine", failures=0)

    def fetch(prompt: str, model: str) -> Any:
        return body()

    async def afetch(prompt: str, model: str) -> Any:
        return body()

    decorated = opero(**options)(afetch if face.asynchronous else fetch)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'model'"):
        face.run(decorated if way == "plain" else decorated.call, "hi")
    assert (body.calls, decorated.stats.calls, decorated.stats.failures) == (0, 0, 0)


# --- what moves on --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "tried"),
    [
        (Exception, ["bad", "worse", "good"]),
        (OSError, ["bad", "worse", "good"]),
        ((KeyError, ConnectionError), ["bad", "worse", "good"]),
        (BaseException, ["bad", "worse", "good"]),
        (KeyError, ["bad"]),
        (lambda error: str(error) == "bad", ["bad", "worse"]),
    ],
)
def test_fallback_on_decides(face: Any, wanted: Any, tried: list[str]) -> None:
    seen = Recorder()
    fetch = opero(arg_fallback="model", fallback_on=wanted, **once)(face.of(seen.ask))
    ends_well = contextlib.nullcontext() if "good" in tried else pytest.raises(ConnectionError)
    with ends_well:
        assert face.run(fetch, ["bad", "worse", "good"]) == "by good"
    assert seen.tried == tried


def test_a_broken_predicate_stays_with_the_value_and_warns(face: Any) -> None:
    seen = Recorder()
    fetch = opero(arg_fallback="model", fallback_on=lambda error: error.status, **once)(
        face.of(seen.ask)
    )
    with pytest.warns(OperoWarning, match="AttributeError"), pytest.raises(ConnectionError):
        face.run(fetch, ["bad", "good"])
    assert seen.tried == ["bad"]


def test_a_refusal_of_another_pipeline_moves_on_and_is_retried(face: Any, clock: FakeClock) -> None:
    def body(model: str) -> str:
        if model == "a":
            raise DeadlineError("an opero function further in was out of time")
        return model

    fetch = opero(arg_fallback="model", cache=False)(face.of(body))
    assert face.run(fetch, ["a", "b"]) == "b"
    with pytest.raises(DeadlineError):
        face.run(fetch, "a")
    assert fetch.stats.retries == 3


def test_a_usage_error_from_further_in_is_not_repaired(face: Any) -> None:
    tried = []

    def body(model: str) -> None:
        tried.append(model)
        raise OperoUsageError("wrong option")

    with pytest.raises(OperoUsageError):
        face.run(opero(arg_fallback="model", **quick)(face.of(body)), ["a", "b"])
    assert tried == ["a"]


def test_each_attempt_walks_the_values_once(face: Any, clock: FakeClock) -> None:
    seen = Recorder()
    fetch = opero(arg_fallback="model", cache=False, retries=2)(face.of(seen.ask))
    with pytest.raises(ConnectionError, match="b"):
        face.run(fetch, ["a", "b"])
    assert seen.tried == ["a", "b"] * 3
    assert len(clock.sleeps) == 2
    assert (fetch.stats.calls, fetch.stats.fallbacks, fetch.stats.retries) == (6, 3, 2)


def test_retry_on_sees_every_error_of_the_walk(face: Any, clock: FakeClock) -> None:
    tried = []

    def body(model: str) -> str:
        tried.append(model)
        if len(tried) == 5:
            return model
        raise TimeoutError if model == "a" else ValueError

    fetch = opero(arg_fallback="model", cache=False, retry_on=TimeoutError)(face.of(body))
    assert face.run(fetch, ["a", "b"]) == "a"
    assert tried == ["a", "b", "a", "b", "a"]


def test_the_next_attempt_forgets_the_walk_before(face: Any, clock: FakeClock) -> None:
    errors = iter([TimeoutError(), ValueError(), ValueError(), ValueError()])

    def body(model: str) -> None:
        raise next(errors)

    fetch = opero(arg_fallback="model", cache=False, retry_on=TimeoutError)(face.of(body))
    with pytest.raises(ValueError, match="gave up after 2 attempts"):
        face.run(fetch, ["a", "b"])
    assert fetch.stats.calls == 4


def test_a_rejected_result_moves_to_the_next_value_then_to_the_next_attempt(
    face: Any, clock: FakeClock
) -> None:
    tried = []

    def body(model: str) -> int:
        tried.append(model)
        return len(tried)

    fetch = opero(arg_fallback="model", cache=False, retries=1, retry_if_result=lambda n: n < 4)(
        face.of(body)
    )
    receipt = face.run(fetch.call, ["a", "b"])
    assert tried == ["a", "b", "a", "b"]
    assert (receipt.value, receipt.rejected, receipt.fallback) == (4, False, "b")
    tried.clear()
    receipt = face.run(fetch.with_options(retry_if_result=lambda n: True).call, ["a", "b"])
    assert (receipt.value, receipt.rejected, receipt.attempts) == (4, True, 2)


def test_a_rejected_result_moves_on_whatever_fallback_on_says(face: Any) -> None:
    fetch = opero(
        arg_fallback="model", fallback_on=KeyError, retry_if_result=lambda r: r == "a", **once
    )(face.of(lambda model: model))
    assert face.run(fetch, ["a", "b"]) == "b"


def test_fallback_works_while_opero_is_switched_off(face: Any) -> None:
    seen = Recorder()
    with set_disabled():
        fetch = opero(arg_fallback="model", cache=False)(face.of(seen.ask))
        assert face.run(fetch, ["bad", "good"]) == "by good"


def test_the_stage_alone_tries_each_value_once(face: Any) -> None:
    seen = Recorder(good="none of them")
    fetch = get_fallback_decorator(arg_fallback="model")(face.of(seen.ask))
    with pytest.raises(ConnectionError):
        face.run(fetch, ["a", "b"])
    assert seen.tried == ["a", "b"]


# --- what is told ---------------------------------------------------------------------------------


def test_listeners_hear_of_each_further_value(face: Any) -> None:
    seen = Recorder(good="c")
    fetch = opero(arg_fallback="model", **once)(face.of(seen.ask))
    with capture_events(FallbackUsed) as events:
        face.run(fetch, ["a", "b", "c"])
    assert [(e.value, e.index) for e in events] == [("model='b'", 1), ("model='c'", 2)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("default", "line"),
    [
        (("a", "b"), "model: 'a' → 'b', up to 2 values per attempt"),
        ("a", "model: 'a', one value; give a list for more"),
        (None, "model: None, one value"),
    ],
)
def test_explain_shows_the_values_of_the_default(default: Any, line: str) -> None:
    assert line in opero(arg_fallback="model", **once)(lambda model=default: None).explain()


def test_explain_counts_the_worst_case() -> None:
    reported = opero(arg_fallback="model", **quick)(lambda model=("a", "b", "c"): None).explain()
    assert "worst case 12 calls" in reported
    assert "4 × values" in opero(arg_fallback="model", **quick)(lambda model: None).explain()
