# this_file: tests/core/test_function.py
"""What opero finds out about a callable before it wraps it."""

from __future__ import annotations

import asyncio
import functools
import inspect
import random
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any
from unittest import mock

import pytest
from tests.tables import rows

from opero import opero
from opero.core.function import FunctionInfo
from opero.errors import OperoUsageError
from opero.utils.parameters import ANYTHING, NoDefault, stars, unwrap_partial, write_parameters

pytestmark = pytest.mark.internal


def plain(x: int, /, y: int = 2, *rest: int, z: int, **more: int) -> int:
    return x


async def coroutine(x: int) -> int:
    return x


def generator(x: int) -> Iterator[int]:
    yield x


async def async_generator(x: int) -> AsyncIterator[int]:
    yield x


class Plain:
    """Called like a function."""

    def __call__(self, x: int) -> int:
        return x

    def method(self, x: int) -> int:
        return x

    async def amethod(self, x: int) -> int:
        return x


class Coroutine:
    async def __call__(self, x: int) -> int:
        return x


class Generator:
    def __call__(self, x: int) -> Iterator[int]:
        yield x


class AsyncGenerator:
    async def __call__(self, x: int) -> AsyncIterator[int]:
        yield x


@rows(
    ("fn", "kind"),
    [
        (plain, "sync"),
        (coroutine, "async"),
        (generator, "generator"),
        (async_generator, "async_generator"),
        (functools.partial(plain, 1), "sync"),
        (functools.partial(functools.partial(coroutine), 1), "async"),
        (functools.partial(generator), "generator"),
        (functools.partial(async_generator), "async_generator"),
        (Plain(), "sync"),
        (Coroutine(), "async"),
        (Generator(), "generator"),
        (AsyncGenerator(), "async_generator"),
        (functools.partial(Coroutine(), 1), "async"),
        (Plain, "sync"),
        (Coroutine, "sync"),
        (Plain().method, "sync"),
        (Plain().amethod, "async"),
        (len, "sync"),
        (dict, "sync"),
        ({}.get, "sync"),
        (lambda: 1, "sync"),
        (lambda: (yield), "generator"),
        (functools.lru_cache(plain), "sync"),
        (opero(cache=False)(coroutine), "async"),
    ],
)
def test_the_kind_says_how_it_is_called(fn: Callable[..., Any], kind: str) -> None:
    assert FunctionInfo(fn).kind == kind


@pytest.mark.skipif(sys.version_info < (3, 12), reason="functions cannot be marked before 3.12")
def test_a_function_marked_as_coroutine_function_is_one() -> None:
    marked = inspect.markcoroutinefunction(lambda: asyncio.sleep(0, "slept"))
    assert FunctionInfo(marked).kind == "async"
    assert asyncio.run(opero(cache=False)(marked)()) == "slept"


@pytest.mark.parametrize("wrong", [5, "fetch", None, [plain], object()])
def test_what_cannot_be_called_is_refused(wrong: Any) -> None:
    with pytest.raises(OperoUsageError, match="only decorate something callable, not"):
        FunctionInfo(wrong)


@pytest.mark.parametrize(
    ("fn", "name", "qualname", "module"),
    [
        (plain, "plain", "plain", __name__),
        (functools.partial(plain), "plain", "plain", __name__),
        (Plain().method, "method", "Plain.method", __name__),
        (Plain, "Plain", "Plain", __name__),
        (Plain(), "Plain", "Plain", __name__),
        (len, "len", "len", "builtins"),
        ({}.get, "get", "dict.get", "builtin_function_or_method"),
    ],
)
def test_it_goes_by_its_own_name(fn: Any, name: str, qualname: str, module: str) -> None:
    info = FunctionInfo(fn)
    assert (info.name, info.qualname) == (name, qualname)
    assert info.module in (module, "builtins")


def test_the_declared_signature_is_that_of_the_innermost_function() -> None:
    @functools.wraps(plain)
    def wrapped(*args: Any, **kwargs: Any) -> Any: ...

    info = FunctionInfo(wrapped)
    assert info.declared == inspect.signature(plain)
    assert info.calling == ANYTHING
    assert tuple(p.name for p in info.parameters) == ("x", "y", "rest", "z", "more")


def test_a_signature_that_a_function_claims_is_declared_and_its_code_is_called() -> None:
    def honest(client: object, x: int, *, y: int = 3) -> None: ...

    honest.__signature__ = inspect.signature(lambda x: ...)  # type: ignore[attr-defined]
    info = FunctionInfo(honest)
    assert str(info.declared) == "(x)"
    assert [p.name for p in info.calling] == ["client", "x", "y"]
    assert info.calling[2].default == 3


@pytest.mark.parametrize("fn", [{}.pop, dict.fromkeys, print, random.random, max, type, iter])
def test_a_builtin_without_signature_takes_anything(fn: Callable[..., Any]) -> None:
    assert FunctionInfo(fn).calling is not None


def test_a_parameter_that_cannot_be_written_down_makes_the_wrapper_take_anything() -> None:
    def fetch(_opero_run: int) -> int:
        return _opero_run

    info = FunctionInfo(fetch)
    assert info.calling == ANYTHING
    assert [p.name for p in info.parameters] == ["_opero_run"]


def in_a_function() -> type:
    class Inside:
        def method(self) -> None: ...

    return Inside


def test_a_function_from_a_class_body_is_known_as_such() -> None:
    def nested() -> None: ...

    def named() -> None: ...

    named.__qualname__ = "module_level"
    class_of = in_a_function()
    assert FunctionInfo(Plain.method).in_class
    assert FunctionInfo(class_of.method).in_class  # type: ignore[attr-defined]
    assert not FunctionInfo(nested).in_class
    assert not FunctionInfo(named).in_class
    assert not FunctionInfo(plain).in_class
    assert not FunctionInfo(Plain().method).in_class
    assert not FunctionInfo(functools.partial(Plain.method)).in_class


@pytest.mark.parametrize(
    "fn",
    [
        plain,
        coroutine,
        lambda: 1,
        lambda x, /: x,
        lambda *, z: z,
        lambda x=1, *, y, z=2: x,
        lambda x, /, *, z=0: x,
        lambda *rest, z=0: z,
        lambda x=(), /, y=[], **more: x,
        Plain.method,
    ],
)
def test_a_plain_function_has_the_parameters_that_inspect_finds(fn: Callable[..., Any]) -> None:
    info = FunctionInfo(fn)
    assert info.calling == info.parameters
    assert [
        (p.name, p.kind, inspect.Parameter.empty if p.default is NoDefault else p.default)
        for p in info.parameters
    ] == [(p.name, p.kind, p.default) for p in inspect.signature(fn).parameters.values()]
    unannotated = info.declared.replace(
        parameters=[
            p.replace(annotation=p.empty, default=p.empty)
            for p in info.declared.parameters.values()
        ],
        return_annotation=inspect.Signature.empty,
    )
    bare = [p._replace(default=NoDefault) for p in info.parameters]
    assert f"({write_parameters(bare)['parameters']})" == str(unannotated)


def test_stars_are_those_of_a_def() -> None:
    shown = [stars(p) for p in FunctionInfo(plain).parameters]
    assert shown == ["", "", "*", "", "**"]


def test_partials_are_looked_through_to_the_last() -> None:
    assert unwrap_partial(functools.partial(functools.partial(plain, 1), y=2)) is plain
    assert unwrap_partial(plain) is plain


def test_a_mock_can_be_decorated() -> None:
    fake = mock.Mock(return_value=5)
    assert opero(cache=False)(fake)(1, x=2) == 5
    fake.assert_called_once_with(1, x=2)


def test_an_async_mock_can_be_decorated() -> None:
    fake = mock.AsyncMock(side_effect=[OSError, 5])
    assert asyncio.run(opero(cache=False, min_delay=0)(fake)(1)) == 5
    assert fake.await_count == 2
