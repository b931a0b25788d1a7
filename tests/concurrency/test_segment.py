# this_file: tests/concurrency/test_segment.py
"""Memory in which large buffers travel is written again, and what was received from it never changes."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from pickle import PickleBuffer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opero.concurrency import segment as room
from opero.concurrency.arena import Arena
from opero.concurrency.segment import CAN_PASS, Intake, Load, Segment, Span, Supply

pytestmark = pytest.mark.skipif(not CAN_PASS, reason="descriptors cannot be sent here")


def filled(supply: Supply, *contents: bytes) -> tuple[Segment, list[Span]]:
    segment = supply.take()
    return segment, [segment.add(PickleBuffer(content)) for content in contents]


def copied(buffer: memoryview) -> bytearray:
    return bytearray(buffer)


def in_use() -> int:
    gc.collect()
    return len(room._live)


@given(st.lists(st.lists(st.binary(min_size=1), min_size=1, max_size=4), max_size=8))
def test_what_was_copied_out_stays_when_the_segment_is_written_again(
    messages: list[list[bytes]],
) -> None:
    supply, intake = Supply(2), Intake(copied)
    shown: dict[int, int] = {}
    received: list[tuple[bytearray, bytes]] = []
    for contents in messages:
        segment, spans = filled(supply, *contents)
        take = intake.open(segment.load, segment.descriptor(shown))
        received += zip(map(take, spans), contents, strict=True)
        supply.give_back(segment)
    supply.close()
    assert all(found == sent for found, sent in received)
    assert len(shown) <= 1


def test_a_descriptor_is_sent_once_and_again_when_there_is_more() -> None:
    supply, intake = Supply(1), Intake(copied)
    shown: dict[int, int] = {}
    sent = []
    for size in (100, 50, 100, 200, 10):
        segment, (span,) = filled(supply, bytes([size]) * size)
        fd = segment.descriptor(shown)
        sent.append(fd is not None)
        assert intake.open(segment.load, fd)(span) == bytes([size]) * size
        supply.give_back(segment)
    supply.close()
    assert sent == [True, False, False, True, False]


def test_each_receiver_gets_a_descriptor() -> None:
    supply = Supply(1)
    segment, (span,) = filled(supply, b"for both")
    for intake in (Intake(copied), Intake(copied)):
        assert intake.open(segment.load, segment.descriptor({}))(span) == b"for both"
    supply.close()


def given_away(supply: Supply, content: bytes) -> tuple[Load, int | None, Span]:
    segment, (span,) = filled(supply, content)
    assert not segment.kept
    told = segment.load, segment.descriptor({}), span
    supply.drop(segment)
    return told


def test_while_none_is_free_a_segment_is_given_away() -> None:
    supply = Supply(1)
    under_way, _ = filled(supply, b"still under way")
    load, fd, span = given_away(supply, b"given away")
    assert Intake(copied).open(load, fd)(span) == b"given away"
    supply.give_back(under_way)
    assert supply.take() is under_way
    supply.close()


def test_what_is_very_large_is_given_away_and_lives_with_its_views(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "_KEPT", 1000)
    before = in_use()
    supply = Supply(1)
    segment, _ = filled(supply, bytes(500))
    assert segment.kept
    supply.give_back(segment)
    load, fd, span = given_away(supply, bytes(1001))
    view = Intake(copied).open(load, fd)(span)
    assert isinstance(view, memoryview)
    assert len(view) == 1001
    assert in_use() == before + 1
    view[:5] = b"taken"
    del view
    assert in_use() == before
    assert supply.take().kept


def test_too_many_mappings_are_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MOST_MAPS", 0)
    monkeypatch.setattr(room, "_KEPT", 1)
    load, fd, span = given_away(Supply(0), b"copied")
    before = in_use()
    assert Intake(copied).open(load, fd)(span) == b"copied"
    block = Arena().copy(memoryview(bytes(1 << 18)))
    assert len(block) == 1 << 18
    assert in_use() == before


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="nobody can tell")
def test_no_descriptor_stays_open() -> None:
    before = descriptors()
    supply = Supply(2)
    shown: dict[int, int] = {}
    intake = Intake(copied)
    for n in range(10):
        segment, _ = filled(supply, bytes(100 * n + 1))
        intake.open(segment.load, segment.descriptor(shown))
        if n % 3:
            supply.give_back(segment)
    supply.close()
    del intake, segment
    assert descriptors() == before


def test_without_buffers_there_is_no_file() -> None:
    supply = Supply(1)
    segment = supply.take()
    assert segment.descriptor({}) is None
    supply.give_back(segment)
    assert supply.take() is segment


# --- the memory of results ------------------------------------------------------------------------


def test_copies_are_apart_from_each_other_and_from_where_they_came() -> None:
    chance = random.Random(1)
    arena, source = Arena(), bytearray(5 << 20)
    copies: list[tuple[memoryview, int]] = []
    for n in range(60):
        size = chance.choice([1, 1000, 1 << 17, 1 << 18, (1 << 20) + 1, 1 << 21, 5 << 20])
        source[:size] = bytes([n]) * size
        copies.append((arena.copy(memoryview(source)[:size]), n))
    for copy, n in copies:
        assert copy == bytes([n]) * len(copy)
        copy[:] = bytes(len(copy))


def test_a_block_is_given_back_with_its_last_result() -> None:
    arena = Arena()
    before = in_use()
    first, second = (arena.copy(memoryview(bytes(2 << 20))) for _ in range(2))
    assert in_use() == before + 1
    third = arena.copy(memoryview(bytes(2 << 20)))
    assert in_use() == before + 2
    del first
    assert in_use() == before + 2
    del second
    assert in_use() == before + 1
    del third, arena
    assert in_use() == before
