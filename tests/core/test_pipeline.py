# this_file: tests/core/test_pipeline.py
"""The pipeline: which stages stand around a function, what is shared, what is refused."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from opero import RateLimiter, opero
from opero.errors import OperoUsageError
from opero.testing import FakeClock, capture_events, flaky, set_disabled


def test_with_options_shares_counters_and_the_function(face: Any) -> None:
    body = flaky("never", failures=99)
    fetch = opero(cache=False, min_delay=0)(face.of(body))
    once = fetch.with_options(retries=0)
    with pytest.raises(ConnectionError):
        face.run(once)
    assert body.calls == 1
    assert once.stats is fetch.stats
    assert (once.options.retries, fetch.options.retries) == (0, 3)
    assert once.options.min_delay == 0


def test_with_options_shares_the_limiter_unless_it_changes() -> None:
    fetch = opero(cache=False, rate_limit="1/10s")(lambda: None)
    again, other = fetch.with_options(retries=0), fetch.with_options(rate_limit="1/10s")
    limiter = RateLimiter("1/10s")
    shared = fetch.with_options(rate_limit=limiter)

    def limiter_of(f: Any) -> Any:
        return f.call.__globals__["_opero_receipt"].__self__.rate_limit.limiter

    assert limiter_of(again) is limiter_of(fetch)
    assert limiter_of(other) is not limiter_of(fetch)
    assert limiter_of(shared) is limiter


def test_with_options_shares_entries_unless_the_store_changes(face: Any) -> None:
    body = flaky("fine", failures=0)
    fetch = opero(face.of(lambda x: body()))
    face.run(fetch, 1)
    face.run(fetch.with_options(retries=0, cache_ttl=5), 1)
    assert body.calls == 1
    face.run(fetch.with_options(cache_version=2), 1)
    assert body.calls == 2


def test_with_options_of_a_bound_method_stays_bound() -> None:
    class Client:
        @opero(cache=False)
        def fetch(self, x: int) -> tuple[Any, int]:
            return self, x

    client = Client()
    assert client.fetch.with_options(retries=0)(5) == (client, 5)
    assert client.fetch.with_options(retries=0).call(5).value == (client, 5)


def test_with_options_refuses_what_opero_refuses() -> None:
    with pytest.raises(OperoUsageError, match="Did you mean 'retries'"):
        opero(cache=False)(lambda: None).with_options(retires=3)


@pytest.mark.parametrize("option", ["secret", "cache_ignore"])
def test_names_of_parameters_must_exist(option: str) -> None:
    with pytest.raises(OperoUsageError, match=f"{option}='clint'.*Did you mean 'client'"):
        opero(**{option: ("clint",)})(lambda client: None)
    opero(**{option: ("clint",)})(lambda **anything: None)


def test_switching_off_from_another_thread_holds_everywhere(face: Any) -> None:
    body = flaky("never", failures=99)
    fetch = opero(cache=False, min_delay=0)(face.of(body))
    switch: list[set_disabled] = []

    def elsewhere(act: Any) -> None:
        thread = threading.Thread(target=act)
        thread.start()
        thread.join()

    elsewhere(lambda: switch.append(set_disabled()))
    try:
        with pytest.raises(ConnectionError):
            face.run(fetch)
        assert body.calls == 1
    finally:
        elsewhere(lambda: switch[0].__exit__(None, None, None))
    with pytest.raises(ConnectionError):
        face.run(fetch)
    assert body.calls == 5


def test_switching_off_ends_the_attempts_of_a_call_under_way(face: Any, clock: FakeClock) -> None:
    calls = 0

    def body() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            switches.append(set_disabled())
        raise ConnectionError

    switches: list[set_disabled] = []
    try:
        with pytest.raises(ConnectionError):
            face.run(opero(cache=False, retries=9)(face.of(body)))
    finally:
        switches[0].__exit__(None, None, None)
    assert calls == 2


def test_a_listener_that_comes_and_goes_changes_no_count(face: Any) -> None:
    fetch = opero(cache=False)(face.of(flaky("fine", failures=0)))
    for _ in range(2):
        face.run(fetch)
        with capture_events() as events:
            face.run(fetch)
        assert len(events) == 1
    assert fetch.stats.calls == 4


def test_a_function_without_cache_has_a_cache_handle_that_says_so() -> None:
    @opero(cache=False)
    def double(x: int) -> int:
        return 2 * x

    assert double.cache.clear() == 0
    assert not double.cache.invalidate(1)
    assert double.cache.refresh(2) == 4
    assert double.cache.info().backend == "off"
    assert repr(double.cache) == "<cache off>"
