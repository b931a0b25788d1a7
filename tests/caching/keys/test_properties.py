# this_file: tests/caching/keys/test_properties.py
"""Keys are equal exactly when content and types are."""

from __future__ import annotations

import math
import pickle
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opero.caching.keys import digest, encode

pytestmark = pytest.mark.internal

NAN_WITH_PAYLOAD = struct.unpack("<d", bytes.fromhex("010000000000f8ff"))[0]

# fmt: off
SCALARS = st.sampled_from([
    0, 1, -1, 2**63, -(2**64), True, False, None,
    0.0, -0.0, 1.0, math.nan, NAN_WITH_PAYLOAD, math.inf, 0j, 1j,
    "", "a", "1", "\0", "\ud800", "ab", "s\1\0\0\0\0\0\0\0a", b"", b"a", b"1", b"\0",
])
# fmt: on
HASHABLE = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
VALUES = st.recursive(
    SCALARS | HASHABLE,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(HASHABLE, inner, max_size=4)
        | st.dictionaries(st.sampled_from(["a", "b", "ab", "", "\ud800"]), inner, max_size=4)
        | st.sets(HASHABLE, max_size=4)
    ),
    max_leaves=8,
)
LONG = st.one_of(
    st.lists(element, min_size=14, max_size=19)
    for element in (
        st.sampled_from([0, 1, 2**62]),
        st.sampled_from([0, 2**63, True]),
        st.sampled_from([0.0, -0.0, 1.0]),
        st.sampled_from([math.nan, NAN_WITH_PAYLOAD, 0.0]),
        st.sampled_from(["", "a", "aa", "é", "\ud800"]),
        SCALARS,
    )
)


def same(left: Any, right: Any) -> bool:
    """Equality as keys mean it: by type and content, to any depth."""
    if type(left) is not type(right):
        return False
    if type(left) is float:
        if math.isnan(left) or math.isnan(right):
            return math.isnan(left) and math.isnan(right)
        return left == right and math.copysign(1, left) == math.copysign(1, right)
    if type(left) is complex:
        return same(left.real, right.real) and same(left.imag, right.imag)
    if type(left) in (list, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if type(left) is dict:
        return same_in_any_order(list(left.items()), list(right.items()))
    if type(left) in (set, frozenset):
        return same_in_any_order(list(left), list(right))
    return bool(left == right)


def same_in_any_order(left: list[Any], right: list[Any]) -> bool:
    rest = list(right)
    for item in left:
        twin = next((n for n, other in enumerate(rest) if same(item, other)), None)
        if twin is None:
            return False
        del rest[twin]
    return not rest


def rebuilt(value: Any) -> Any:
    """An equal value that shares nothing and was filled in the opposite order."""
    if type(value) is dict:
        return {rebuilt(k): rebuilt(v) for k, v in reversed(value.items())}
    if type(value) in (list, tuple):
        return type(value)([rebuilt(item) for item in value])
    if type(value) in (set, frozenset):
        return type(value)([rebuilt(item) for item in reversed(list(value))])
    if type(value) is str:
        return "".join(list(value))
    if type(value) is float and math.isnan(value):
        return -value
    return value


@given(VALUES | LONG, VALUES | LONG)
def test_keys_are_equal_exactly_when_content_and_types_are(left: Any, right: Any) -> None:
    one, other = encode(left), encode(right)
    assert (one == other) == same(left, right)
    # None begins with another, so that values in a row cannot be cut apart in two ways.
    assert one == other or not (one.startswith(other) or other.startswith(one))


@given(st.lists(SCALARS, max_size=3), st.lists(SCALARS, max_size=3))
def test_near_misses_differ(left: list[Any], right: list[Any]) -> None:
    for shape in (list, tuple, lambda items: dict(enumerate(items)), lambda items: [items, items]):
        assert (encode(shape(left)) == encode(shape(right))) == same(shape(left), shape(right))


@given(VALUES | LONG)
def test_rebuilding_a_value_keeps_its_key(value: Any) -> None:
    assert encode(rebuilt(value)) == encode(value)
    assert digest(rebuilt(value)) == digest(value)


@given(VALUES)
def test_encoding_changes_nothing(value: Any) -> None:
    before = pickle.dumps(value)
    encode(value)
    assert pickle.dumps(value) == before
