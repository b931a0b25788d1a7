# this_file: tests/core/test_retry_budget.py
"""The retry budget: never more retries than a share of the calls in any window, plus a few."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from opero import RetryBudget
from opero.errors import OperoUsageError
from opero.testing import FakeClock
from opero.utils import ambient

pytestmark = pytest.mark.internal


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"ratio": -0.1}, "ratio"),
        ({"ratio": True}, "ratio"),
        ({"ratio": "10%"}, "ratio"),
        ({"ratio": float("nan")}, "ratio"),
        ({"minimum": -1}, "minimum"),
        ({"minimum": 1.5}, "minimum"),
        ({"window": 0}, "window"),
        ({"window": "soon"}, "window"),
        ({"name": ""}, "name"),
    ],
)
def test_wrong_values_are_refused_by_name(given, name):
    with pytest.raises(OperoUsageError, match=f"^{name}="):
        RetryBudget(**given)


def test_the_minimum_is_there_without_any_call(clock):
    budget = RetryBudget(ratio=0.1, minimum=2)
    assert [budget.withdraw() for _ in range(3)] == [True, True, False]
    assert (budget.retries, budget.left) == (2, 0)


@pytest.mark.parametrize("calls", [10, 30, 70, 90, 110])
def test_a_tenth_of_the_calls_is_a_tenth_of_the_calls(calls, clock):
    budget = RetryBudget(ratio=0.1, minimum=0)
    for _ in range(calls):
        budget.deposit()
    assert budget.left == calls // 10
    assert sum(budget.withdraw() for _ in range(calls)) == calls // 10


def test_what_is_older_than_the_window_is_forgotten(clock):
    budget = RetryBudget(ratio=1, minimum=0, window="10s")
    budget.deposit()
    clock.advance(8.9)
    assert budget.left == 1
    clock.advance(1.2)
    assert (budget.calls, budget.left) == (0, 0)


def test_retries_come_back_when_they_are_old(clock):
    budget = RetryBudget(ratio=0, minimum=1, window=10)
    assert [budget.withdraw(), budget.withdraw()] == [True, False]
    clock.advance(10.1)
    assert budget.withdraw()


def test_a_long_silence_leaves_nothing_behind(clock):
    budget = RetryBudget(ratio=1, minimum=0, window=1)
    budget.deposit()
    clock.advance(1000)
    assert budget.calls == 0


@pytest.mark.parametrize("uptime", [0.0, 0.4, 12.0])
def test_a_budget_counts_on_a_machine_that_has_just_started(uptime, monkeypatch):
    monkeypatch.setattr(ambient.RealClock, "monotonic", lambda _: uptime)
    budget = RetryBudget(ratio=0.5, minimum=1, window=10)
    assert (budget.calls, budget.retries, budget.left) == (0, 0, 1)
    budget.begin()
    for _ in range(4):
        budget.deposit()
    assert [budget.withdraw() for _ in range(4)] == [True, True, True, False]
    assert (budget.calls, budget.retries, budget.left) == (4, 3, 0)
    uptime += 10.5
    assert (budget.calls, budget.retries, budget.left) == (0, 0, 1)


def test_threads_never_get_more_than_there_is():
    budget = RetryBudget(ratio=0.5, minimum=0, window=3600)
    for _ in range(100):
        budget.deposit()
    got = []

    def work():
        got.extend(budget.withdraw() for _ in range(25))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(got) == 50


def test_a_copy_is_the_budget_itself_and_so_is_a_pickle():
    budget = RetryBudget(0.2, 3, 5, name="svc")
    assert copy.copy(budget) is copy.deepcopy(budget) is budget
    assert pickle.loads(pickle.dumps(budget)) is budget


OTHER = """
import pickle, sys
budget = pickle.load(sys.stdin.buffer)
for _ in range(10):
    budget.deposit()
print(budget.ratio, budget.minimum, budget.window, budget.name, budget.retries)
print([budget.withdraw() for _ in range(4)])
"""


def test_another_process_that_gets_it_counts_with_it():
    budget = RetryBudget(0.2, 3, 3600, name="svc")
    budget.withdraw()
    reported = subprocess.run(
        [sys.executable, "-c", OTHER],
        input=pickle.dumps(budget),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        check=True,
    )
    assert reported.stdout.decode().split("\n")[:2] == [
        "0.2 3 3600.0 svc 1",
        "[True, True, True, True]",
    ]
    assert (budget.calls, budget.retries, budget.left) == (10, 5, 0)
    budget.begin()
    assert (budget.calls, budget.retries, budget.left) == (0, 0, 3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_that_is_killed_while_it_counts_delays_no_other():
    budget = RetryBudget(ratio=0, minimum=2, window=3600)
    budget.deposit()
    assert budget.share()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        budget.withdraw()
        budget._exclusively(lambda: (os.write(writer, b"x"), time.sleep(60)))
        os._exit(0)
    assert os.read(reader, 1) == b"x"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(reader)
    os.close(writer)
    assert (budget.calls, budget.retries) == (1, 1)
    assert [budget.withdraw(), budget.withdraw()] == [True, False]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_begins_anew_though_the_lock_was_held():
    budget = RetryBudget(ratio=0, minimum=1, window=3600)
    budget.withdraw()
    held, release = threading.Event(), threading.Event()

    def hold():
        with budget._lock:
            held.set()
            release.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if budget.withdraw() else 1)
    release.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_it_says_what_it_is():
    budget = RetryBudget(ratio=0.25, minimum=3, window="1m", name="svc")
    assert budget.describe() == "3 + 0.25 × calls in 60 s (svc)"
    assert repr(budget) == "<RetryBudget 'svc': 0 retries for 0 calls in 60 s, 3 left>"


class BudgetMachine(RuleBasedStateMachine):
    """Against a list of all times, counted slice by slice."""

    ratio, minimum, window = 0.3, 2, 10.0

    def __init__(self):
        super().__init__()
        self.clock = FakeClock()
        self.before = ambient.install_clock(self.clock)
        self.budget = RetryBudget(self.ratio, self.minimum, self.window)
        self.calls, self.retries = [], []

    def teardown(self):
        ambient.install_clock(self.before)

    def slice(self):
        return int(self.clock.monotonic() / (self.window / 10))

    def recent(self, slices):
        return sum(1 for each in slices if each > self.slice() - 10)

    def allowed(self):
        return int(self.minimum + self.ratio * self.recent(self.calls) + 1e-9)

    @rule(n=st.integers(1, 8))
    def call(self, n):
        for _ in range(n):
            self.budget.deposit()
            self.calls.append(self.slice())

    @rule()
    def retry(self):
        room = self.recent(self.retries) < self.allowed()
        assert self.budget.withdraw() is room
        if room:
            self.retries.append(self.slice())

    @rule(seconds=st.floats(0.01, 15))
    def pass_time(self, seconds):
        self.clock.advance(seconds)

    @invariant()
    def counts_are_right(self):
        assert self.budget.calls == self.recent(self.calls)
        assert self.budget.retries == self.recent(self.retries)
        assert self.budget.left == max(0, self.allowed() - self.recent(self.retries))


BudgetMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30)
TestBudgetMachine = BudgetMachine.TestCase
