# this_file: tests/utils/test_record.py
"""Frozen records that cost nothing at import."""

from __future__ import annotations

import copy
import pickle

import pytest

from opero.utils.record import Record


class Point(Record):
    x: int
    y: int = 0


class Named(Point):
    name: str = "p"
    y: int = 5


def test_fields_are_given_by_keyword_and_have_defaults() -> None:
    point = Point(x=1)
    assert (point.x, point.y) == (1, 0)
    assert repr(point) == "Point(x=1, y=0)"


def test_a_subclass_adds_fields_and_may_change_defaults() -> None:
    assert repr(Named(x=1)) == "Named(x=1, y=5, name='p')"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "Point needs 'x'; its fields: x, y"),
        ({"x": 1, "z": 2}, "Point has no field 'z'; its fields: x, y"),
    ],
)
def test_a_wrong_field_is_refused_with_the_right_ones(given: dict[str, int], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Point(**given)


def test_a_record_is_frozen() -> None:
    point = Point(x=1)
    with pytest.raises(AttributeError, match="Point is frozen: 'x' cannot be set"):
        point.x = 2  # type: ignore[misc]
    with pytest.raises(AttributeError, match="Point is frozen: 'x' cannot be deleted"):
        del point.x


def test_records_are_equal_if_class_and_fields_are() -> None:
    assert Point(x=1) == Point(x=1, y=0)
    assert Point(x=1) != Point(x=2)
    assert Point(x=1, y=5) != Named(x=1)
    assert Point(x=1) != 1
    assert len({Point(x=1), Point(x=1), Point(x=2)}) == 2


def test_records_survive_pickle_and_copy() -> None:
    point = Point(x=1)
    assert pickle.loads(pickle.dumps(point)) == copy.deepcopy(point) == copy.copy(point) == point


def test_values_come_by_name() -> None:
    assert Named(x=1).as_dict() == {"x": 1, "y": 5, "name": "p"}
