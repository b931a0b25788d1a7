# this_file: tests/caching/keys/test_arrays.py
"""Keys of numpy and pandas values."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests.caching.keys.entries import entry

from opero.errors import UnkeyableError

ARRAYS: dict[str, list[Any]] = {
    "dtypes": [
        np.zeros(2, t)
        for t in ("i1", "u1", "?", "i8", "f2", "f4", "f8", "c8", "c16", "S1", "U1", "V1")
    ],
    "titles, gaps and notes of dtypes": [
        np.zeros(2, [("a", "i1")]),
        np.zeros(2, [(("title", "a"), "i1")]),
        np.zeros(2, [(("other", "a"), "i1")]),
        *(
            np.zeros(2, {"names": ["a"], "formats": ["i1"], "offsets": [n], "itemsize": 4})
            for n in (0, 1)
        ),
        np.zeros(2, np.dtype("i1", metadata={"unit": "m"})),
        np.zeros(2, np.dtype("i1", metadata={"unit": "km"})),
    ],
    "shapes": [np.zeros(s) for s in ((), (1,), (4,), (2, 2), (4, 1), (0,), (0, 2))],
    "scalar or not": [np.float64(1), np.array(1.0), np.array([1.0]), 1.0, [1.0]],
    "one byte": [np.zeros(1, "i1"), np.ones(1, "i1")],
    "long items": [np.array(["abcdefgh"]), np.array(["abcdefgi"]), np.zeros(1, "V40")],
    "signed zeros": [np.array([0.0]), np.array([-0.0])],
    "times": [
        np.array(["2024-01-01"], "M8[D]"),
        np.array(["2024-01-01"], "M8[s]"),
        np.array(["NaT"], "M8[D]"),
        np.array([1], "m8[D]"),
    ],
    "objects": [np.array(v, dtype=object) for v in ([1], [True], [1.0], ["1"], [[1]], [None])],
    "structured": [
        np.array([(1, 2.0)], "i4,f8"),
        np.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]),
        np.array([(1, 3.0)], "i4,f8"),
        np.array([((1, 2),)], [("a", "i4", (2,))]),
    ],
    "masked": [
        np.ma.masked_array([1, 2], [False, True]),
        np.ma.masked_array([1, 2], [True, False]),
        np.ma.masked_array([1, 2]),
        np.ma.masked,
        np.array([1, 2]),
    ],
    "flavours": [
        np.array([[1]]).view(np.matrix),
        np.array([[1]]),
        np.array([[1]]).view(np.recarray),
    ],
    "numpy types": [np.dtype("f8"), np.dtype("f4"), np.float64, np.dtype("i4,f8")],
    "frames": [
        pd.DataFrame({"a": [1, 2]}),
        pd.DataFrame({"b": [1, 2]}),
        pd.DataFrame({"a": [1.0, 2.0]}),
        pd.DataFrame({"a": [2, 1]}),
        pd.DataFrame({"a": [1, 2]}, index=[1, 2]),
        pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}),
        pd.DataFrame([[1, 1], [2, 2]], columns=["a", "a"]),
        pd.DataFrame(),
    ],
    "series": [
        pd.Series([1, 2]),
        pd.Series([1, 2], name="a"),
        pd.Series([1, 2], dtype="Int64"),
        pd.Series([1, None], dtype="Int64"),
        pd.Series(["1", "2"], dtype="string"),
        pd.Series(["1", "2"], dtype=object),
        pd.Series([1, 2], dtype=object),
        pd.Series(["1", "2"], dtype="category"),
        pd.Series(["3", "4"], dtype="category"),
        pd.Series(["1", "2"], dtype=pd.CategoricalDtype(["2", "1"])),
        pd.Series(["1", "2"], dtype=pd.CategoricalDtype(["1", "2"], ordered=True)),
        pd.Series([pd.Interval(0, 1), pd.Interval(1, 2)]),
        pd.Series(pd.period_range("2024-01", periods=2, freq="M")),
    ],
    "indexes": [
        pd.Index([0, 1]),
        pd.Index([0, 1], name="a"),
        pd.RangeIndex(2),
        pd.Index(["a", "b"]),
        pd.date_range("2024-01-01", periods=2, freq="D"),
        pd.DatetimeIndex(["2024-01-01", "2024-01-02"]),
        pd.MultiIndex.from_tuples([(1, "a"), (2, "b")]),
        pd.MultiIndex.from_tuples([(1, "a"), (2, "b")], names=["x", "y"]),
    ],
    "zones in pandas": [
        pd.Series(pd.date_range("2024-01-01", periods=2, tz=zone))
        for zone in (None, "UTC", "Europe/Berlin", "Europe/Rome")
    ],
    "pandas scalars": [
        pd.NA,
        pd.NaT,
        None,
        pd.Timestamp(0),
        pd.Timestamp(1),
        pd.Timestamp(0, tz="UTC"),
        pd.Timedelta(0),
        pd.Timedelta(1),
        pd.Period("2024-01"),
        pd.Interval(0, 1),
        pd.Interval(0, 1, closed="left"),
    ],
}


@pytest.mark.parametrize("values", ARRAYS.values(), ids=ARRAYS)
def test_arrays_and_frames_differ_by_content_and_type(values: list[Any]) -> None:
    assert len({entry(value) for value in values}) == len(values)


@pytest.mark.parametrize("values", ARRAYS.values(), ids=ARRAYS)
def test_copies_of_arrays_and_frames_have_their_keys(values: list[Any]) -> None:
    copies = pickle.loads(pickle.dumps(values))
    assert [entry(copy) for copy in copies] == [entry(value) for value in values]


def test_gaps_between_fields_do_not_count() -> None:
    aligned = np.dtype([("a", "i1"), ("b", "i8")], align=True)
    left, right = np.zeros(2, aligned), np.full(32, 0xFF, np.uint8).view(aligned)
    right["a"] = right["b"] = 0
    assert left.tobytes() != right.tobytes()
    assert entry(left) == entry(right)


def test_levels_that_no_row_uses_do_not_count() -> None:
    rows = pd.MultiIndex.from_tuples([(1, "a"), (2, "b")])
    assert entry(rows[:1]) == entry(pd.MultiIndex.from_tuples([(1, "a")]))


@pytest.mark.skipif(np.dtype("g").itemsize == 8, reason="longdouble is a plain double here")
@pytest.mark.parametrize("code", "gG")
def test_padded_floats_have_no_key(code: str) -> None:
    reason = r"numpy\.c?longdouble, which pads its items with arbitrary bytes\."
    with pytest.raises(UnkeyableError, match=reason):
        entry(np.zeros(2, code))


def test_a_subclass_of_an_array_counts_its_attributes() -> None:
    class Quantity(np.ndarray):
        unit: str

    metres, feet = np.arange(2).view(Quantity), np.arange(2).view(Quantity)
    metres.unit, feet.unit = "m", "ft"
    assert len({entry(v) for v in (metres, feet, np.arange(2))}) == 3
