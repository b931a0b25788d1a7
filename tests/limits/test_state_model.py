# this_file: tests/limits/test_state_model.py
"""A state in a file against one in memory: the same, also when the file is opened anew."""

from __future__ import annotations

import gc
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from opero.limits import limiter_state, state_file
from opero.limits.gcra import SECOND
from opero.limits.limiter_state import LimiterState, TakenSlot
from opero.limits.windows import UNIT, CombinedLimit, combined
from opero.utils.units import parse_windows

pytestmark = [pytest.mark.internal, pytest.mark.timeout(120)]

HOUR = 3600 * SECOND
RULES = [
    combined(parse_windows(text), burst=burst, smooth=None, cap=cap)
    for text, burst, cap in [
        ("10/s", 1, None),
        ("3/hour", 1, None),
        ("4/s & 9/10s", 0, None),
        ("3 calls/s & 20 tokens/10s", 1, None),
        ("20 tokens/s", 1, 100 * UNIT),
    ]
]


class InAFileAndInMemory(RuleBasedStateMachine):
    """Does the same to both, on one clock, and opens the file again now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.wall = 10**15, 10**18
        self.real_time = limiter_state.time
        limiter_state.time = SimpleNamespace(  # type: ignore[assignment]  # the two readings it takes
            monotonic_ns=lambda: self.now, time_ns=lambda: self.wall
        )
        self.folder = Path(tempfile.mkdtemp(prefix="opero-model-"))
        self.path = str(self.folder / "slot")
        self.marks: list[tuple[TakenSlot, TakenSlot]] = []

    @initialize(rule=st.sampled_from(RULES))
    def start(self, rule: object) -> None:
        self.rule = rule
        self.memory = LimiterState(rule, lambda: self.now)  # type: ignore[arg-type]  # one of RULES
        self.file: LimiterState = self.opened()

    def opened(self) -> LimiterState:
        return LimiterState(self.rule).move(self.path, create=True)  # type: ignore[arg-type]  # as above

    @rule(pause=st.integers(0, 200))
    def time_passes(self, pause: int) -> None:
        self.now += pause * SECOND // 50
        self.wall += pause * SECOND // 50

    @rule(hours=st.sampled_from([-8, 0, 8]))
    def another_program_opens_the_file_after_the_wall_clock_was_set(self, hours: int) -> None:
        self.wall += hours * HOUR
        state_file._open_files.files.pop(self.path)
        del self.file
        gc.collect(0)
        self.file = self.opened()

    @rule()
    def take(self) -> None:
        assert self.file.take() == self.memory.take()

    @rule()
    def take_marked(self) -> None:
        (wait, one), (same, other) = self.file.take_marked(), self.memory.take_marked()
        assert wait == same
        if not wait:
            self.marks.append((one, other))

    @precondition(lambda self: self.marks)
    @rule()
    def give_back(self) -> None:
        one, other = self.marks.pop()
        assert self.file.give_back(one) == self.memory.give_back(other)

    @rule(cost=st.integers(0, 20), real=st.integers(0, 30))
    def spend_and_settle(self, cost: int, real: int) -> None:
        if not isinstance(self.rule, CombinedLimit):
            return
        waits = [slot.take_marked(cost * UNIT)[0] for slot in (self.file, self.memory)]
        assert waits[0] == waits[1]
        if not waits[0]:
            change = (real - cost) * UNIT
            for slot in (self.file, self.memory):
                slot.settle(TakenSlot(self.now, None), change)

    @rule(length=st.integers(1, 500))
    def pause(self, length: int) -> None:
        length *= SECOND // 100
        assert self.file.pause(length) == self.memory.pause(length)

    @rule()
    def resume(self) -> None:
        self.file.resume()
        self.memory.resume()

    @invariant()
    def both_say_the_same(self) -> None:
        if hasattr(self, "file"):
            assert self.file.wait_for() == self.memory.wait_for()
            assert self.file.paused() == self.memory.paused()

    def teardown(self) -> None:
        if hasattr(self, "file"):
            del self.file
        limiter_state.time = self.real_time
        gc.collect(0)
        shutil.rmtree(self.folder)


TestInAFileAndInMemory = InAFileAndInMemory.TestCase
TestInAFileAndInMemory.settings = settings(stateful_step_count=40)
