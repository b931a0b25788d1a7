# this_file: tests/utils/test_named_tuple.py
"""Named tuples behave like those of `typing`."""

from __future__ import annotations

import pickle
import typing

import pytest

from opero.utils.lazy import NamedTuple

pytestmark = pytest.mark.internal


class Ours(NamedTuple):
    name: str
    size: int = 0
    parts: tuple[Ours, ...] | None = None


class Theirs(typing.NamedTuple):
    name: str
    size: int = 0
    parts: tuple[Theirs, ...] | None = None


CALLS = {
    "in order": lambda kind: kind("a", 1, ()),
    "with defaults": lambda kind: kind("a"),
    "by name": lambda kind: kind(size=2, name="a"),
    "replaced": lambda kind: kind("a")._replace(size=3),
    "from a list": lambda kind: kind(*["a", 4]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_values_are_those_of_typing(call: typing.Any) -> None:
    ours, theirs = call(Ours), call(Theirs)
    assert ours == theirs
    assert hash(ours) == hash(theirs)
    assert repr(ours) == repr(theirs).replace("Theirs", "Ours")
    assert ours._asdict() == theirs._asdict()
    assert (ours.name, ours.size, ours.parts) == tuple(theirs)


def test_fields_and_defaults_are_those_of_typing() -> None:
    assert Ours._fields == Theirs._fields
    assert Ours._field_defaults == Theirs._field_defaults
    assert Ours.__match_args__ == Theirs.__match_args__


@pytest.mark.parametrize(
    "values", [((), {}), (("a", 1, None, 2), {}), (("a",), {"other": 1}), (("a",), {"name": "b"})]
)
def test_wrong_arguments_are_a_type_error(values: typing.Any) -> None:
    args, named = values
    with pytest.raises(TypeError, match=r"Ours\.__new__"):
        Ours(*args, **named)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_keeps_class_and_fields(protocol: int) -> None:
    back = pickle.loads(pickle.dumps(Ours("a", 1), protocol))
    assert type(back) is Ours
    assert back == Ours("a", 1)
