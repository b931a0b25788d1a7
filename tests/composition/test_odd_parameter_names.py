# this_file: tests/composition/test_odd_parameter_names.py
"""A user's parameter may have any name, also those that opero uses inside."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.tables import rows

from opero import opero, operomap

names = [
    "func", "fn", "self", "cls", "key", "args", "kwargs", "timeout", "call", "options",
    "value", "error", "stats", "function", "pipeline", "run", "item", "items", "step", "given",
    "source", "started", "proceed", "cache", "name", "event", "instance", "by", "result",
    "type", "id", "_wrapper",
]  # fmt: skip

everything: dict[str, Any] = {"retries": 1, "min_delay": 0, "rate_limit": 1e6}

shapes = [
    "def f({n}): return {n}",
    "def f(*, {n}): return {n}",
    "def f({n}=5): return {n}",
    "def f(first=1, *rest, {n}=5, **more): return {n}",
    "def f(**more): return more[{n!r}]",
    "async def f({n}): return {n}",
    "async def f(*, {n}=5): return {n}",
    "def f({n}):\n yield {n}",
    "def f(*, {n}):\n yield {n}",
    "def f(**more):\n yield more[{n!r}]",
    "async def f(*, {n}):\n yield {n}",
    "async def f(**more):\n yield more[{n!r}]",
]


def defined(shape: str, name: str) -> Any:
    exec(shape.format(n=name), scope := {})
    return scope["f"]


def outcome(begun: Any) -> Any:
    """The result of a function of any kind."""

    async def first() -> Any:
        return await anext(begun)

    if hasattr(begun, "__anext__"):
        return asyncio.run(first())
    if hasattr(begun, "__next__"):
        return next(begun)
    return asyncio.run(begun) if hasattr(begun, "__await__") else begun


@rows("name", names)
@rows("options", [{"cache": False}, {}, everything])
def test_any_name_works_in_any_shape(name: str, options: dict[str, Any]) -> None:
    for shape in shapes:
        fetch = opero(**options)(defined(shape, name))
        assert outcome(fetch(**{name: 7})) == 7


@rows("name", names)
def test_any_name_may_hold_the_fallback_values(name: str) -> None:
    for shape in (s for s in shapes if "**more)" not in s):
        fetch = opero(arg_fallback=name, cache=False)(defined(shape, name))
        assert outcome(fetch(**{name: [7, 8]})) == 7


@rows("name", names)
def test_any_name_works_with_a_receipt(name: str) -> None:
    for shape in (s for s in shapes if "yield" not in s):
        begun = opero(cache=False)(defined(shape, name)).call(**{name: 7})
        assert outcome(begun).value == 7


@rows("name", names)
def test_further_arguments_of_a_map_may_have_any_name(name: str) -> None:
    f = operomap(sequential=True, progress=False)(defined("def f(first, {n}=1): return {n}", name))
    more = {name: 5}
    assert f([0], **more) == list(f.stream([0], **more)) == f.map([0], **more).values == [5]
    assert f.one(0, **more) == 5
