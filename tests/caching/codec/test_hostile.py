# this_file: tests/caching/codec/test_hostile.py
"""Whatever bytes lie in a store: reading them imports nothing, and costs no more than they are long."""

from __future__ import annotations

import json
import struct
import sys
import time
import tracemalloc
from typing import Any
from zlib import crc32

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.caching.codec.test_plain import OBJECTS, VALUES

from opero.caching.codec import Coder, read_plain, write_plain
from opero.caching.plain_types import Undecodable
from opero.durable.values import decode
from opero.errors import UnserializableError

pytestmark = [pytest.mark.internal, pytest.mark.timeout(120)]

FACTOR = 400
"""Bytes of memory for a byte of an entry: the smallest form of a deque takes six bytes."""
SPARE = 4_000_000
SECONDS = 10.0


def mark(number: int) -> msgpack.ExtType:
    return msgpack.ExtType(number, b"")


def nested(depth: int, width: int) -> bytes:
    """Return arrays within arrays, each of which announces more items than there are."""
    return (b"\xdd" + width.to_bytes(4, "big")) * depth


def within(depth: int, items: list[int]) -> list[Any]:
    """Return a tuple of items within as many tuples."""
    found: list[Any] = [mark(1), *items]
    for _ in range(depth):
        found = [mark(1), found]
    return found


def cost(message: bytes, behind: bytes = b"") -> tuple[int, float, Any]:
    before = set(sys.modules)
    tracemalloc.start()
    start = time.thread_time()
    try:
        made = read_plain(message, behind)
    except Exception as error:  # noqa: BLE001 - of whatever kind
        made = error
    seconds = time.thread_time() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert set(sys.modules) <= before | {"fractions", "zoneinfo", "ipaddress", "decimal", "uuid"}
    return peak, seconds, made


def check(message: bytes, behind: bytes = b"") -> Any:
    peak, seconds, made = cost(message, behind)
    assert peak < SPARE + FACTOR * (len(message) + len(behind)), peak
    assert seconds < SECONDS
    return made


ALIKE = 2**61 - 1  # whole numbers that differ by it have the same hash

INSERTED = [b"\xdd\x7f\xff\xff\xff", b"\xc7\x00\x06", b"\xcf" + b"\xff" * 8]

BOMBS: dict[str, Any] = {
    "arrays that announce more than there is": nested(200, 900) + b"\xc0",
    "many arrays that announce more than there is": nested(1000, 90_000) + bytes(90_000),
    "a map that announces more than there is": b"\xdf\xff\xff\xff\xff" + b"\x01" * 2000,
    "a text that announces more than there is": b"\xdb\xff\xff\xff\xff" + b"x" * 2000,
    "a bytearray of a number": [mark(6), 2_000_000_000],
    "bytes of a number": [mark(52), 2_000_000_000],
    "a deque of a range": [mark(11), [mark(7), 0, 10**12, 1], 0],
    "a set of a range": [mark(2), [mark(7), 0, 10**12, 1]],
    "an array of nothing": [mark(50), "|u1", [10**12], False, 0, 0],
    "an array of wide texts": [mark(50), "<U500000000", [1], False, 0, 0],
    "one buffer many times": ([[mark(0), 0, 500_000]] * 5_000, bytes(500_000)),
    "one array many times": (
        [[mark(50), "|u1", [500_000], False, 0, 500_000]] * 5_000,
        bytes(500_000),
    ),
    "a fraction of long numbers": [
        mark(31),
        msgpack.ExtType(4, b"\xfd" * 400_000),
        msgpack.ExtType(4, b"\xfb" * 399_999),
    ],
    "a decimal of many digits": [mark(30), "9" * 2_000_000],
    "an address of many letters": [mark(38), "1:" * 500_000],
    "an array with sides of many digits": [
        mark(50),
        "<i4",
        [1 << 3_000_000, 1 << 3_000_000, 0],
        False,
        0,
        0,
    ],
    "a long tuple within many tuples": [
        [[mark(1), n] for n in range(1100)],
        within(400, list(range(100_000))),
    ],
    "empty maps": [{}] * 100_000,
    "empty deques": [[mark(11), [], None]] * 20_000,
}


def packed(bomb: Any) -> tuple[bytes, bytes]:
    message, behind = bomb if type(bomb) is tuple else (bomb, b"")
    if type(message) is not bytes:
        message = msgpack.packb(message, default=big)
    return message, behind


def big(value: int) -> msgpack.ExtType:
    return msgpack.ExtType(4, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))


@pytest.mark.parametrize("name", BOMBS)
def test_no_entry_costs_more_than_its_length(name: str) -> None:
    check(*packed(BOMBS[name]))


@pytest.mark.parametrize("wrap", [lambda n: n, lambda n: [mark(1), n]], ids=["numbers", "tuples"])
@pytest.mark.parametrize("form", ["map", "set"])
def test_many_values_of_one_hash_are_refused(form: str, wrap: Any) -> None:
    values = [wrap(big(ALIKE * (2**64 + n) + 7)) for n in range(60_000)]
    if form == "set":
        message = msgpack.packb([mark(2), *values])
    else:
        header = b"\xdf" + len(values).to_bytes(4, "big")
        message = header + b"".join(msgpack.packb(value) + b"\x00" for value in values)
    assert isinstance(check(message), Exception)


@pytest.mark.parametrize("form", ["set", "frozenset", "dict"])
def test_many_values_of_one_hash_in_a_journal_are_refused(form: str) -> None:
    numbers = [n * ALIKE for n in range(20_000)]
    text = json.dumps({"$": form, "v": [[n, 0] for n in numbers] if form == "dict" else numbers})
    start = time.thread_time()
    with pytest.raises(UnserializableError, match="one hash"):
        decode(text)
    assert time.thread_time() - start < SECONDS


def test_many_large_numbers_are_read() -> None:
    numbers = (
        [2**100 + n for n in range(5_000)]
        + [(n, n + 2**70) for n in range(5_000)]
        + [(1, 2)] * 5_000
    )
    message, buffers = write_plain({"list": numbers, "set": set(numbers)})
    assert read_plain(message, b"".join(buffers)) == {"list": numbers, "set": set(numbers)}


@given(VALUES | st.sampled_from(OBJECTS), st.data())
def test_mutated_entries_cost_no_more_than_their_length(value: Any, data: Any) -> None:
    message = bytearray(write_plain(value)[0])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(message) - 1))
        change = data.draw(st.sampled_from(["flip", "insert", "double", "cut"]))
        if change == "flip":
            message[place] = data.draw(st.integers(0, 255))
        elif change == "insert":
            message[place:place] = data.draw(
                st.sampled_from([b"\xdd\x7f\xff\xff\xff", b"\xc7\x00\x06", b"\xcf" + b"\xff" * 8])
            )
        elif change == "double":
            message[place:place] = message[place:] * 3
        elif len(message) > 1:
            del message[place]
    check(bytes(message), bytes(20))


@given(st.binary(max_size=3_000))
def test_noise_costs_no_more_than_its_length(noise: bytes) -> None:
    check(noise)


@given(st.binary(max_size=200), st.sampled_from([b"p", b"s", b"u", b""]))
def test_noise_is_no_entry(noise: bytes, kind: bytes) -> None:
    for data in (kind + noise, kind + crc32(noise, crc32(b"key")).to_bytes(4, "little") + noise):
        try:
            Coder().decode(data, b"key")
        except Undecodable:
            pass


def test_an_array_is_read_only_where_numpy_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    message, buffers = write_plain(np.ones(3))
    monkeypatch.delitem(sys.modules, "numpy")
    with pytest.raises(Undecodable, match="needs numpy"):
        read_plain(message, b"".join(buffers))


def test_the_reason_for_an_unreadable_object_reaches_the_caller() -> None:
    message = msgpack.packb([mark(61), "turtle:Turtle", {}])
    body = struct.pack("<Q", len(message)) + message
    entry = b"p" + crc32(body, crc32(b"key")).to_bytes(4, "little") + body
    with pytest.raises(Undecodable, match="module turtle, which is not loaded"):
        Coder().decode(entry, b"key")
