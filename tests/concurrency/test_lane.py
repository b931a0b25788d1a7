# this_file: tests/concurrency/test_lane.py
from __future__ import annotations

import pytest

from opero.concurrency.engine import GaveBack, Lost
from opero.concurrency.lane import Held, verdict


@pytest.mark.parametrize(
    ("n_done", "begun", "barren", "expected"),
    [
        (0, 0, False, Lost(7, 0, 0, "crash")),
        (2, 5, False, Lost(7, 2, 5, "crash")),
        (2, 2, False, Lost(7, 2, 2, "crash")),
        # It had finished and reported what it began: nobody is to blame.
        (3, 2, False, GaveBack(7, 3)),
        (0, None, False, GaveBack(7, 0)),
        # Worker after worker dies of the chunk itself.
        (0, None, True, Lost(7, 0, 0, "crash")),
    ],
)
def test_who_is_to_blame(
    n_done: int, begun: int | None, barren: bool, expected: Lost | GaveBack
) -> None:
    held = Held(7, b"", None, n_done)
    assert verdict(held, begun, why="crash", barren=barren) == expected
