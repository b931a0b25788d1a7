# this_file: tests/caching/keys/test_digest.py
"""Digests, and values that stand for themselves."""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import pytest

from opero.caching.keys import FAST_TYPES, digest, encode, fast_part
from opero.caching.keys.canonical import MAX_DEPTH, pair_head, pairs_digest
from opero.caching.keys.content import Unkeyable

pytestmark = pytest.mark.internal


class Text(str):
    """Not exactly a str."""

    __slots__ = ()


class Level(enum.IntEnum):
    ONE = 1


def test_digest_is_the_hash_of_the_encoding_for_small_and_large_values() -> None:
    from hashlib import blake2b

    for value in ["a", ("a", {"b": b"x" * 10}), {"data": b"x" * 200_000}, [np.arange(50_000.0), 1]]:
        assert digest(value) == blake2b(encode(value), digest_size=20).digest()


def test_digest_of_pairs_is_that_of_a_tuple_of_tuples() -> None:
    heads = [pair_head(name) for name in ("x", "y")]
    assert pairs_digest(heads, [1, [2.5]]) == digest((("x", 1), ("y", [2.5])))


def test_values_as_deep_as_allowed_have_a_digest() -> None:
    deep: list[Any] = []
    for _ in range(MAX_DEPTH - 1):
        deep = [deep]
    assert digest(deep)
    with pytest.raises(Unkeyable, match=r": list is nested deeper than 100 levels"):
        digest([deep])


class Odd(type):
    __hash__ = None  # type: ignore[assignment]


def test_what_breaks_while_it_is_read_has_no_digest() -> None:
    with pytest.raises(Unkeyable, match=r"^tests\..*test_digest\.Type could not .* \(TypeError\)$"):
        digest(Odd("Type", (), {"__module__": __name__})())


@pytest.mark.parametrize("value", [1, "a", b"a", True, None], ids=repr)
def test_plain_scalars_stand_for_themselves(value: Any) -> None:
    assert type(value) in FAST_TYPES
    assert fast_part(value) == (type(value), value)


def test_fast_parts_tell_equal_values_of_different_types_apart() -> None:
    parts = {
        fast_part(value) for value in (1, True, 1.0, Level.ONE, np.int64(1), 0, False, 0.0, -0.0)
    }
    assert len(parts) == 9


def test_fast_parts_of_other_values_are_their_digest() -> None:
    assert fast_part([1]) == digest([1])
    assert fast_part(Text("a")) == digest(Text("a"))
    assert fast_part(digest([1])) != fast_part([1])
