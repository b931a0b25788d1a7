# this_file: tests/caching/test_weight.py
"""How heavy results are, roughly."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest

from opero.caching.memory import weigh

pytestmark = pytest.mark.internal


@dataclasses.dataclass
class Loose:
    value: object


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        (None, 1, 100),
        ("x" * 100_000, 100_000, 101_000),
        (["x" * 1000 for _ in range(1000)], 1_000_000, 1_200_000),
        (dict.fromkeys(range(1000), "x" * 1000), 1_000_000, 1_300_000),
        ({"x" * 1000 + str(n) for n in range(1000)}, 1_000_000, 1_300_000),
        (np.zeros(100_000), 800_000, 801_000),
        ([np.zeros(1000)] * 10, 80_000, 90_000),
        (Loose("x" * 10_000), 10_000, 11_000),
        (pd.DataFrame({"a": np.zeros(10_000)}), 80_000, 90_000),
        (pd.DataFrame({"a": ["x" * 1000] * 100}), 100_000, 130_000),
        (pd.Series(np.zeros(10_000)), 80_000, 90_000),
        (memoryview(bytes(5000)), 100, 6000),
    ],
    ids=lambda value: type(value).__name__,
)
def test_weights_are_sane(value, least, most):
    assert least <= weigh(value) <= most


def test_slots_count():
    @dataclasses.dataclass(slots=True)
    class Slotted:
        text: str

    assert weigh(Slotted("x" * 5000)) > 5000


def test_weighing_something_huge_looks_at_little_of_it():
    class Spy:
        looked = 0

        def __sizeof__(self) -> int:
            Spy.looked += 1
            return 100

    weight = weigh([[Spy() for _ in range(100)] for _ in range(1000)])
    assert Spy.looked <= 1000
    assert weight > 100_000


def test_a_size_that_raises_is_guessed():
    class Broken:
        def __sizeof__(self) -> int:
            raise RuntimeError

        @property
        def nbytes(self) -> int:
            raise RuntimeError

    assert weigh(Broken()) > 0


def test_data_that_contains_itself_has_a_weight():
    loop: list = []
    loop.append(loop)
    assert 50 < weigh(loop) < 1_000_000
