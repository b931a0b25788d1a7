# this_file: tests/orchestrator/test_fallback_chain.py
"""Functions to fall back on: which are tried, and what is left of the failures."""

from __future__ import annotations

import asyncio
import functools
import gc
import threading
import weakref
from typing import Any

import pytest

from opero import FallbackChain, failures
from opero.errors import DeadlineError, OperoUsageError
from opero.events import FallbackUsed
from opero.testing import capture_events


def failing(error: Any, calls: list[str], name: str) -> Any:
    def body(*args: Any, **kwargs: Any) -> None:
        calls.append(name)
        raise error

    body.__name__ = name
    return body


def working(value: Any, calls: list[str], name: str) -> Any:
    def body(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return value, args, kwargs

    body.__name__ = name
    return body


def run(face: Any, chain: FallbackChain, *args: Any, **kwargs: Any) -> Any:
    return face.run(chain.execute if face.asynchronous else chain.execute_sync, *args, **kwargs)


def test_functions_are_tried_in_order_with_the_same_arguments(face: Any) -> None:
    calls: list[str] = []
    chain = FallbackChain(
        face.of(failing(ValueError(1), calls, "a")),
        [
            face.of(failing(KeyError(2), calls, "b")),
            face.of(working("c's", calls, "c")),
            face.of(working("d's", calls, "d")),
        ],
    )
    assert run(face, chain, 1, x=2) == ("c's", (1,), {"x": 2})
    assert calls == ["a", "b", "c"]


def test_fallbacks_are_one_function_several_or_none() -> None:
    assert FallbackChain(int, float).has_fallbacks()
    assert FallbackChain(int, [float]).has_fallbacks()
    assert not FallbackChain(int).has_fallbacks()
    assert not FallbackChain(int, []).has_fallbacks()
    assert not FallbackChain(int, None).has_fallbacks()
    assert repr(FallbackChain(int, functools.partial(float))) == "<FallbackChain int → float>"


def test_synchronous_and_asynchronous_functions_mix() -> None:
    where: list[int] = []

    def plain(x: int) -> None:
        where.append(threading.get_ident())
        raise ValueError(x)

    async def later(x: int) -> int:
        where.append(threading.get_ident())
        return x

    chain = FallbackChain(plain, later)
    assert asyncio.run(chain.execute(5)) == 5
    assert chain.execute_sync(5) == 5
    assert where[0] != where[1], "a synchronous function does not hold up the loop"


def test_when_all_fail_the_last_error_has_the_others_behind_it(face: Any) -> None:
    errors = [ValueError(1), KeyError(2), ConnectionError(3)]
    first, *rest = (face.of(failing(e, [], f"f{n}")) for n, e in enumerate(errors))
    chain = FallbackChain(first, rest)
    with pytest.raises(ConnectionError) as caught:
        run(face, chain)
    assert caught.value is errors[2]
    assert failures(caught.value) == errors
    assert caught.value.__context__ is errors[1]
    (note,) = caught.value.__notes__
    assert note.splitlines() == [
        "opero: f0() and its fallbacks failed, 3 functions",
        "  f0: ValueError",
        "  f1: KeyError",
        "  f2: ConnectionError",
    ]
    with pytest.raises(ConnectionError):
        run(face, chain)
    assert len(errors[2].__notes__) == 1, "notes are replaced, not piled up"


def test_a_single_function_raises_its_error_unchanged(face: Any) -> None:
    chain = FallbackChain(face.of(failing(ValueError(1), [], "a")))
    with pytest.raises(ValueError, match="1") as caught:
        run(face, chain)
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        SystemExit(),
        asyncio.CancelledError(),
        OperoUsageError("x"),
        DeadlineError("x"),
    ],
)
def test_what_no_fallback_can_help_passes_at_once(error: BaseException) -> None:
    calls: list[str] = []
    chain = FallbackChain(failing(error, calls, "a"), working(1, calls, "b"))
    with pytest.raises(type(error)):
        chain.execute_sync()
    assert calls == ["a"]


def test_fallback_used_is_sent_for_each_next_function(face: Any) -> None:
    calls: list[str] = []
    chain = FallbackChain(
        face.of(failing(ValueError(1), calls, "a")), face.of(working(1, calls, "b"))
    )
    with capture_events(FallbackUsed) as received:
        run(face, chain)
    assert [(e.function, e["value"], e["index"]) for e in received] == [("a", "b", 1)]


@pytest.mark.parametrize("wrong", [None, 5, "f"])
def test_what_is_no_function_is_refused(wrong: Any) -> None:
    with pytest.raises(OperoUsageError, match="primary="):
        FallbackChain(wrong)


def test_arguments_die_with_the_error() -> None:
    class Big:
        pass

    def body(big: Big) -> None:
        raise ValueError

    chain = FallbackChain(body, [body, body])
    gc.disable()
    try:
        big = Big()
        gone = weakref.ref(big)
        try:
            chain.execute_sync(big)
        except ValueError:
            pass
        del big
        assert gone() is None
    finally:
        gc.enable()


def test_parameters_may_have_any_name() -> None:
    def body(self: int, function: int, args: int) -> tuple[int, int, int]:
        return self, function, args

    chain = FallbackChain(body)
    assert chain.execute_sync(self=1, function=2, args=3) == (1, 2, 3)
    assert asyncio.run(chain.execute(self=1, function=2, args=3)) == (1, 2, 3)


def test_a_chain_is_called_like_its_first_function() -> None:
    async def fails(x: int, y: int = 0) -> int:
        raise ConnectionError(x)

    def adds(x: int, y: int = 0) -> int:
        return x + y

    inner = FallbackChain(fails, adds)
    outer = FallbackChain(fails, [fails, inner])
    assert asyncio.run(inner(1, y=2)) == asyncio.run(outer(1, y=2)) == 3
    assert outer.execute_sync(1, y=2) == 3
    assert asyncio.run(FallbackChain(adds)(1)) == 1
    assert (outer.primary, outer.fallbacks) == (fails, [fails, inner])
