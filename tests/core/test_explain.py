# this_file: tests/core/test_explain.py
"""`explain()`: what it says, and that its worst case is the one that happens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import tenacity

from opero import RateLimiter, opero
from opero.core import get_retry_decorator

if TYPE_CHECKING:
    from opero.testing import FakeClock


THING = object()


def text(*lines: str) -> str:
    return "\n".join(lines)


def test_with_every_default() -> None:
    @opero
    def fetch(url: str) -> str: ...

    assert fetch.explain() == text(
        "fetch(url)  [sync]",
        "├─ cache       memory, for 1 h; at most 10,000 entries, 256 MB",
        "├─ retry       1 + 3 attempts on any error but final answers, pause 0.1 s to 0.15, 0.225, 0.338 s",
        "└─ fetch()  worst case 4 calls and 0.3 s to 0.713 s of pauses, then the last error",
    )


def test_with_every_stage() -> None:
    @opero(
        cache_ttl="1d",
        retries=2,
        retry_on=(ConnectionError, TimeoutError),
        jitter=False,
        min_delay=1,
        backoff_factor=2,
        arg_fallback="model",
        rate_limit="100/minute",
        retry_if_result=lambda answer: not answer,
    )
    async def ask(prompt: str, *, model: Any = ("big", "small"), api_key: str = "sk-1") -> str: ...

    limit = next(line for line in ask.explain().splitlines() if "rate limit" in line)
    assert ask.explain() == text(
        "ask(prompt, model=('big', 'small'), api_key=…)  [async]",
        "├─ cache       memory, for 1 d; at most 10,000 entries, 256 MB",
        "├─ retry       1 + 2 attempts on ConnectionError or TimeoutError, pause 1, 2 s",
        "├─ fallback    model: 'big' → 'small', up to 2 values per attempt",
        limit,
        "└─ ask()  worst case 6 calls and 3 s of pauses, then the last error",
    )
    assert limit.startswith("├─ rate limit  100 per minute")


def test_with_everything_off() -> None:
    @opero(cache=False, retries=0)
    def fetch() -> None: ...

    assert fetch.explain() == text("fetch()  [sync]", "└─ fetch()  worst case 1 call")


def test_with_one_stage_alone() -> None:
    @get_retry_decorator(retries=1, min_delay=0)
    def fetch() -> None: ...

    assert fetch.explain() == text(
        "fetch()  [sync]",
        "├─ retry       1 + 1 attempts on any error but final answers, no pauses",
        "└─ fetch()  worst case 2 calls, then the last error",
    )


def test_strategies_of_the_users_are_not_predicted() -> None:
    @opero(cache=False, stop=tenacity.stop_after_delay(60), wait=tenacity.wait_fixed(1))
    def fetch() -> None: ...

    assert fetch.explain() == text(
        "fetch()  [sync]",
        "├─ retry       until the given stop on any error but final answers, pauses by the given wait",
        "└─ fetch()  worst case calls until the given stop, then the last error",
    )


def test_values_that_only_the_caller_knows() -> None:
    @opero(cache=False, retries=1, arg_fallback="model", min_delay=0)
    def ask(model: object) -> None: ...

    assert ask.explain() == text(
        "ask(model)  [sync]",
        "├─ retry       1 + 1 attempts on any error but final answers, no pauses",
        "├─ fallback    model: the values of the list that the caller gives, in order",
        "└─ ask()  worst case 2 × values calls, then the last error",
    )


@pytest.mark.parametrize(
    ("fn", "kind"),
    [
        (lambda: 1, "sync"),
        (lambda: (yield), "generator"),
    ],
)
def test_the_kind_is_named(fn: Any, kind: str) -> None:
    assert f"[{kind}]" in opero(fn).explain()


def test_an_async_generator_is_named_in_two_words() -> None:
    @opero
    async def stream() -> AsyncIterator[int]:
        yield 1

    assert "[async generator]" in stream.explain()
    assert "cache" not in stream.explain()


def test_a_generator_has_no_cache() -> None:
    @opero
    def stream() -> Iterator[int]:
        yield 1

    assert "cache" not in stream.explain()


def test_a_shared_limiter_is_shown_with_its_rate() -> None:
    @opero(rate_limit=RateLimiter("5/s"))
    def fetch() -> None: ...

    assert "5 per second" in fetch.explain()


def test_stars_and_defaults_are_shown_as_in_a_def() -> None:
    @opero(cache=False)
    def fetch(
        a: int, b: int = 2, *rest: int, c: Any = None, d: Any = THING, **more: int
    ) -> None: ...

    assert fetch.explain().startswith("fetch(a, b=2, *rest, c=None, d=…, **more)  [sync]\n")


# --- secrets --------------------------------------------------------------------------------------


def test_no_secret_is_shown_anywhere() -> None:
    @opero(arg_fallback="token", secret=("pin",))
    def fetch(
        token: object = ("hunter-a", "hunter-b"),
        api_key: str = "hunter-c",
        pin: str = "hunter-d",
        db: str = "postgres://me:hunter-e@host/x",
        urls: object = ("redis://:hunter-f@host",),
    ) -> None: ...

    assert "hunter" not in fetch.explain()
    assert "token: token[0] → token[1]" in fetch.explain()
    assert "db='postgres://***@host/x'" in fetch.explain()


def test_only_plain_and_short_defaults_are_shown() -> None:
    class Loud:
        def __repr__(self) -> str:
            return "hunter"

    loud = Loud()

    @opero(cache=False)
    def fetch(a: object = loud, b: str = "x" * 100, c: object = (loud,)) -> None: ...

    assert fetch.explain().startswith("fetch(a=…, b=…, c=…)")


# --- the worst case is the one that happens -------------------------------------------------------


def worst_calls(function: Any) -> int:
    line = function.explain().splitlines()[-1]
    return int(line.split("worst case ")[1].split()[0])


@pytest.mark.parametrize("retries", [0, 1, 3])
@pytest.mark.parametrize("values", [1, 2, 3])
def test_the_worst_case_is_the_one_that_happens(
    retries: int, values: int, clock: FakeClock
) -> None:
    @opero(cache=False, retries=retries, arg_fallback="x", jitter=False, min_delay="100ms")
    def fail(x: object = tuple(range(values))) -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        fail()
    assert fail.stats.calls == worst_calls(fail) == (1 + retries) * values
    assert clock.elapsed == pytest.approx(sum([0.1, 0.15, 0.225][:retries]))


def test_nested_decorators_multiply(clock: FakeClock) -> None:
    @opero(cache=False, retries=1, jitter=False, min_delay=1)
    @opero(cache=False, retries=2, jitter=False, min_delay=10, backoff_factor=1, arg_fallback="x")
    def fail(x: object = (1, 2)) -> None:
        raise ConnectionError

    inner = fail.__wrapped__
    with pytest.raises(ConnectionError):
        fail()
    assert inner.stats.calls == worst_calls(fail) == 2 * 3 * 2
    assert clock.elapsed == 1 + 2 * 20
    assert "12 calls and 41 s of pauses" in fail.explain()


def test_nested_decorators_multiply_what_the_caller_gives() -> None:
    @opero(cache=False, retries=1)
    @opero(cache=False, retries=2, arg_fallback="x")
    def fail(x: object) -> None: ...

    assert "worst case 6 × values calls" in fail.explain()


# --- the text itself ------------------------------------------------------------------------------


def test_it_is_text_that_shows_itself_in_a_notebook() -> None:
    @opero(cache=False)
    def fetch() -> None: ...

    reported = fetch.explain()
    assert isinstance(reported, str)
    assert repr(reported) == str(reported)
    assert repr(type(reported)("a\nb")) == "a\nb"
