# this_file: tests/decorators/test_opero.py
"""`@opero` in all its forms."""

from __future__ import annotations

import inspect
import pickle
import pydoc
import threading
from typing import Any

import pytest

import opero as package
from opero import opero
from opero.decorators import opero as from_decorators
from opero.errors import OperoUsageError
from opero.testing import flaky


def double(x: int) -> int:
    return 2 * x


@pytest.mark.parametrize(
    "decorated",
    [opero(double), opero()(double), opero(retries=1)(double)],
    ids=["bare", "empty", "options"],
)
def test_it_works_bare_and_called(decorated: Any) -> None:
    assert decorated(2) == 4
    assert inspect.isfunction(decorated)


def test_bare_and_empty_mean_the_same() -> None:
    assert opero(double).options == opero()(double).options


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: opero(double, 3),  # type: ignore[call-overload]
        lambda: opero(double, retries=3),  # type: ignore[call-overload]
        lambda: opero(None, 3),  # type: ignore[call-overload]
    ],
)
def test_a_function_and_options_at_once_are_refused_with_both_right_forms(wrong: Any) -> None:
    with pytest.raises(OperoUsageError, match=r"write @opero\(retries=3\).*opero\(retries=3\)\(f"):
        wrong()


@pytest.mark.parametrize("wrong", [3, "memory", [double], {"retries": 3}])
def test_an_option_without_its_name_is_refused_with_the_right_form(wrong: Any) -> None:
    with pytest.raises(OperoUsageError, match=r"not \w+. Options are keyword-only"):
        opero(wrong)


def test_a_decorator_can_be_used_for_many_functions() -> None:
    once = opero(cache=False, retries=0)
    first, second = once(double), once(double)
    first(1)
    assert (first.stats.calls, second.stats.calls) == (1, 0)
    assert first.options is second.options


def test_help_names_every_option_its_default_and_meaning() -> None:
    text = pydoc.render_doc(opero, renderer=pydoc.plaintext)
    for line in (
        "cache: 'bool' = True",
        "cache: Cache results.",
        "retries: 'int' = 3",
        "retries: Calls made after the first one failed: 1 + 3.",
        "retry_on: Type, tuple of types, or predicate: exactly that",
        "rate_limit: Calls per second",
    ):
        assert line in text
    assert all(f"    {name}: " in text for name in list(inspect.signature(opero).parameters)[1:])


def test_it_says_where_users_get_it() -> None:
    assert (opero.__name__, opero.__qualname__) == ("opero", "opero")  # type: ignore[attr-defined]
    assert opero.__module__ == "opero"
    assert from_decorators is opero is package.opero
    assert pickle.loads(pickle.dumps(opero)) is opero


def test_with_options_changes_what_is_named_and_keeps_the_rest() -> None:
    fetch = opero(cache=False, retries=5, min_delay=0)(flaky("ok", failures=3))
    patient = fetch.with_options(retries=2)
    assert (fetch.options.retries, patient.options.retries) == (5, 2)
    assert patient.options.min_delay == 0
    with pytest.raises(ConnectionError):
        patient()
    assert fetch() == "ok"


def test_with_options_checks_like_the_decorator() -> None:
    fetch = opero(double)
    with pytest.raises(OperoUsageError, match="Did you mean 'retries'"):
        fetch.with_options(retires=1)
    with pytest.raises(OperoUsageError, match="retries=-1"):
        fetch.with_options(retries=-1)


def test_with_options_shares_counters_cache_and_limiter() -> None:
    fetch = opero(rate_limit="1000/s")(double)
    other = fetch.with_options(retries=0)
    assert (fetch(1), other(1)) == (2, 2)
    assert fetch.stats is other.stats
    assert fetch.stats.hits == 1


def test_with_options_of_a_changed_cache_shares_no_entries() -> None:
    fetch = opero(double)
    fetch(1)
    fetch.with_options(cache_version=2)(1)
    assert fetch.stats.hits == 0


def test_decorating_in_many_threads_works() -> None:
    made: list[Any] = []

    def work() -> None:
        for n in range(30):
            scope: dict[str, Any] = {}
            exec(f"def fetch(a, b{n}): return a", scope)
            made.append(opero(cache=False)(scope["fetch"]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [fetch(1, 2) for fetch in made] == [1] * 120
