# this_file: benchmarks/bodies.py
"""The functions that are decorated, as cheap as can be: the decorator is what the clock shall see.

Each maker returns a new function, because contenders must not share one.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.candidates import Function


def identity() -> Function:
    def body(x: Any) -> Any:
        return x

    return body


def identity_async() -> Function:
    async def body(x: Any) -> Any:
        return x

    return body


def pair() -> Function:
    def body(x: Any, y: Any) -> Any:
        return x

    return body


def pair_async() -> Function:
    async def body(x: Any, y: Any) -> Any:
        return x

    return body


def model_call() -> Function:
    def body(x: int, model: Any = ("a", "b")) -> int:
        return x

    return body


def model_call_async() -> Function:
    async def body(x: int, model: Any = ("a", "b")) -> int:
        return x

    return body


def small_dict() -> Function:
    def body(x: int) -> dict[str, Any]:
        return {
            "id": x,
            "name": "Berlin",
            "geo": {"lat": 52.5, "lon": 13.4},
            "tags": ["city", "capital"],
        }

    return body


def takes_a_turn_async() -> Function:
    async def body(x: Any) -> Any:
        await asyncio.sleep(0)
        return x

    return body


def fails_twice() -> Function:
    calls = 0

    def body(x: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 3:
            raise ValueError(x)
        return x

    return body


def fails_twice_async() -> Function:
    calls = 0

    async def body(x: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 3:
            raise ValueError(x)
        return x

    return body
