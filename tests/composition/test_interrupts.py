# this_file: tests/composition/test_interrupts.py
"""Ctrl-C at each place where the interpreter looks for signals: nothing that a call had is lost."""

from __future__ import annotations

import contextlib
import dis
import functools
import itertools
import sys
import threading
from pathlib import Path

import pytest

import opero as package
from opero import ConcurrencyLimit, RateLimiter, opero, remaining

SOURCES = str(Path(package.__file__).parent)
LOOKS = {"CALL", "CALL_KW", "CALL_FUNCTION_EX", "JUMP_BACKWARD", "RESUME"}
"""Instructions after which signal handlers run."""


@functools.cache
def instructions(code):
    return {each.offset: each.opname for each in dis.get_instructions(code)}


class Interrupt:
    """Raises KeyboardInterrupt at one such place in opero's own code.

    Args:
        place: How many of them are passed before.
    """

    def __init__(self, place):
        self.left = place
        self.came = False
        self.last = {}

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.called)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def look(self):
        if not self.left:
            self.came = True
            sys.settrace(None)
            raise KeyboardInterrupt
        self.left -= 1

    def called(self, frame, event, arg):
        if self.came:
            return None
        # What returns from Python code looks at nothing.
        self.last[id(frame.f_back)] = None
        name = frame.f_code.co_filename
        if not name.startswith((SOURCES, "<opero")):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        self.look()
        return self.step

    def step(self, frame, event, arg):
        if event == "opcode" and not self.came:
            before = self.last.get(id(frame))
            self.last[id(frame)] = instructions(frame.f_code).get(frame.f_lasti)
            if before in LOOKS:
                self.look()
        return self.step


def in_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(20)
    return found


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"cache": True},
        {"cache": True, "retry_if_result": callable},  # through the stages, without a first call
        {"cache": False, "concurrency": 1},
        {"deadline": 60},
    ],
    ids=str,
)
def test_ctrl_c_at_any_place_leaves_nothing_behind(options, fails):
    failing = False

    def work(x):
        if failing:
            raise ValueError(x)
        return x

    f = opero(retries=0, **options)(work)

    def interrupted(x):
        """Return whether Ctrl-C came."""
        interrupt = Interrupt(x)
        with contextlib.suppress(KeyboardInterrupt, ValueError), interrupt:
            f(x)
        return interrupt.came

    assert f(-1) == -1
    # Of the long way of a failure some places only: each costs a run.
    place = 0
    for place in itertools.count(step=5 if fails else 1):
        failing = fails
        came = interrupted(place)
        failing = False
        assert in_thread(functools.partial(f, place)) == [place], place
        assert f.concurrency is None or f.concurrency.in_flight == 0
        assert remaining() is None
        if not came:
            break
    assert place > 1


def begin_and_end(limit, awaited):
    async def block():
        async with limit:
            pass

    if awaited:
        with contextlib.suppress(StopIteration):
            block().send(None)
    else:
        with limit:
            pass


@pytest.mark.parametrize("awaited", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_ctrl_c_at_any_place_of_a_block_gives_its_permit_back(shared, awaited):
    limit = ConcurrencyLimit(1)
    if shared:
        limit.share()
    for place in itertools.count(step=5 if shared else 1):
        interrupt = Interrupt(place)
        with contextlib.suppress(KeyboardInterrupt), interrupt:
            begin_and_end(limit, awaited)
        assert in_thread(limit.try_acquire) == [True], place
        limit.release()
        assert limit.in_flight == 0
        if not interrupt.came:
            break
    assert place > 1


def test_ctrl_c_at_any_place_leaves_a_shared_limiter_to_the_others():
    limiter = RateLimiter("1000000/s")
    limiter.share()
    for place in itertools.count():
        interrupt = Interrupt(place)
        with contextlib.suppress(KeyboardInterrupt), interrupt, limiter:
            pass
        assert in_thread(limiter.acquire), place
        if not interrupt.came:
            break
    assert place > 1
