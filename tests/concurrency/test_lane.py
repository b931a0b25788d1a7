# this_file: tests/concurrency/test_lane.py
from __future__ import annotations

import pytest

from opero.concurrency.lane import Held, verdict
from opero.concurrency.tally import Tally


@pytest.mark.parametrize(
    ("done", "begun", "barren", "several", "expected"),
    [
        ([], 0, False, False, (0, "crash")),
        ([0, 1], 5, False, False, (5, "crash")),
        ([0, 1], 2, False, False, (2, "crash")),
        # It had finished and reported what it began: nobody is to blame.
        ([0, 1, 2], 2, False, False, (None, "stopped")),
        ([], None, False, False, (None, "stopped")),
        # Worker after worker dies of the chunk itself.
        ([], None, True, False, (0, "crash")),
        # Of several at once all that began and were not reported are suspects.
        ([0, 2], 3, False, True, (None, "crash")),
        ([0, 1, 3], 3, False, True, (2, "crash")),
        ([0, 1], 1, False, True, (None, "stopped")),
    ],
)
def test_who_is_to_blame(
    done: list[int],
    begun: int | None,
    barren: bool,
    several: bool,
    expected: tuple[int | None, str],
) -> None:
    held = Held(7, b"", Tally(8))
    held.tally.report(done)
    lost = verdict(held, begun, why="crash", barren=barren, several=several)
    assert (lost.chunk, lost.culprit, lost.why) == (7, *expected)
