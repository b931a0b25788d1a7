# this_file: tests/utils/test_threads.py
"""Spare threads: reused, never exhausted, never in the way, and no trace of what ran in them."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import gc
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest

from opero.utils import threads as spare_threads
from opero.utils.threads import ThreadCall, run_in_thread

pytestmark = pytest.mark.internal


def until(condition):
    """Wait until another thread has got there."""
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def do(work):
    """Run `work` in a spare thread and return what it gives."""
    job = ThreadCall(work)
    run_in_thread(job)
    assert job.wait(10)
    return job.outcome()


def spares():
    return [thread for thread in threading.enumerate() if thread.name == "opero-call"]


class Argument:
    """Something whose end can be watched."""


@pytest.fixture
def no_collector():
    """What dies here dies by reference count alone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def none_idle(monkeypatch):
    """A pool of its own, whose threads wait for no longer than a moment."""
    monkeypatch.setattr(spare_threads, "_idle", [])
    monkeypatch.setattr(spare_threads, "_IDLE_SECONDS", 0.005)


# --- what comes back ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [7, None, KeyError("a value, not an error")], ids=repr)
def test_a_value_comes_back(value):
    assert do(lambda: value) is value


@pytest.mark.parametrize(
    "kind", [KeyError, TimeoutError, StopIteration, KeyboardInterrupt, SystemExit, GeneratorExit]
)
def test_an_error_comes_back_as_itself(kind):
    error = kind("so")

    def fail():
        raise error

    with pytest.raises(kind) as caught:
        do(fail)
    assert caught.value is error
    assert "fail" in [entry.name for entry in caught.traceback]


def test_an_error_does_not_end_its_thread():
    def fail():
        raise SystemExit

    with pytest.raises(SystemExit):
        do(fail)
    thread = do(threading.current_thread)
    with pytest.raises(SystemExit):
        do(fail)
    assert do(threading.current_thread) is thread


def test_context_variables_reach_the_work_but_do_not_come_back():
    variable = contextvars.ContextVar("variable", default="outside")
    token = variable.set("mine")
    seen = []

    def work():
        seen.append(variable.get())
        variable.set("theirs")

    do(work)
    assert seen == ["mine"]
    assert variable.get() == "mine"
    variable.reset(token)
    # The next job in the same thread has nothing of the last one.
    do(work)
    assert seen == ["mine", "outside"]


# --- threads --------------------------------------------------------------------------------------


def test_one_thread_serves_a_thousand_quick_calls():
    do(int)
    before = set(spares())
    idents = {do(threading.get_ident) for _ in range(1000)}
    assert len(idents) == 1
    assert set(spares()) <= before


def test_a_thread_is_idle_before_its_caller_knows(none_idle):
    job, seen = ThreadCall(int), []
    job.then(lambda: seen.extend(spare_threads._idle))
    run_in_thread(job)
    until(lambda: seen)


def test_ten_hung_calls_do_not_stop_the_eleventh():
    end = threading.Event()
    hung = [ThreadCall(lambda: end.wait(20)) for _ in range(10)]
    for job in hung:
        run_in_thread(job)
    assert do(lambda: "done") == "done"
    assert not any(job.wait(0) for job in hung)
    end.set()
    until(lambda: all(job._done for job in hung))
    # They are idle now and serve again.
    before = set(spares())
    assert do(threading.current_thread) in before


def test_many_at_once_have_a_thread_each():
    together = threading.Barrier(20, timeout=10)
    jobs = [ThreadCall(together.wait) for _ in range(20)]
    for job in jobs:
        run_in_thread(job)
    assert all(job.wait(10) for job in jobs)
    assert sorted(job.outcome() for job in jobs) == list(range(20))


def test_an_idle_thread_ends_after_a_while(none_idle):
    thread = do(threading.current_thread)
    thread.join(10)
    assert not thread.is_alive()
    assert not spare_threads._idle
    assert do(threading.current_thread) is not thread


def test_threads_that_are_about_to_end_lose_no_job(none_idle):
    for _ in range(20):
        assert do(lambda: "done") == "done"
        time.sleep(0.005)


def test_a_thread_that_is_called_while_it_ends_stays(none_idle):
    jobs, tries = [ThreadCall(lambda: "first"), ThreadCall(lambda: "second")], []
    promised = list(jobs)

    class Late:
        """The time is over just when a job has been promised, and again when it comes."""

        def get(self, timeout=None):
            if timeout is None:
                return promised.pop(0)
            tries.append(timeout)
            if promised and self in spare_threads._idle:
                spare_threads._idle.remove(self)
            raise queue.Empty

    spare_threads._serve(Late())
    assert [job.outcome() for job in jobs] == ["first", "second"]
    assert len(tries) == 3
    assert not spare_threads._idle


def test_without_a_thread_the_caller_gets_an_error(none_idle, monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        run_in_thread(ThreadCall(int))
    assert not spare_threads._idle


# --- the end of a job -----------------------------------------------------------------------------


def test_a_callback_is_called_when_the_work_is_over():
    end, called = threading.Event(), threading.Event()
    job = ThreadCall(lambda: end.wait(10))
    run_in_thread(job)
    assert not job.wait(0)
    job.then(called.set)
    assert not called.is_set()
    end.set()
    assert called.wait(10)


def test_a_callback_is_called_at_once_when_the_work_is_over_already():
    job, called = ThreadCall(int), []
    job.run()
    job.finish()
    job.then(lambda: called.append(True))
    assert called == [True]


def test_a_callback_is_called_once_however_the_end_and_the_request_meet():
    for _ in range(50):
        job, called = ThreadCall(int), []
        run_in_thread(job)
        job.then(lambda called=called: called.append(True))
        until(lambda called=called: called)
        job.wait(10)
        assert called == [True]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals between threads")
def test_an_interrupt_reaches_the_waiter():
    me, end = threading.main_thread().ident, threading.Event()

    def interrupt():
        # Between two looks, it would be seen at the next one only.
        time.sleep(0.01)
        signal.pthread_kill(me, signal.SIGINT)
        end.wait(10)

    def wait():
        run_in_thread(job)
        job.wait(20)

    job = ThreadCall(interrupt)
    # Whenever it comes, even before the wait begins, it is expected.
    with pytest.raises(KeyboardInterrupt):
        wait()
    end.set()
    until(lambda: job._done)


# --- nothing stays --------------------------------------------------------------------------------


def test_nothing_stays_of_a_call_that_ended_in_time(no_collector):
    argument = Argument()
    watch = weakref.ref(argument)
    variable = contextvars.ContextVar("variable")
    token = variable.set(argument)
    assert do(lambda argument=argument: type(argument)) is Argument
    variable.reset(token)
    del argument, token
    until(lambda: watch() is None)


def test_nothing_stays_of_a_call_that_failed(no_collector):
    argument = Argument()
    watch = weakref.ref(argument)

    def fail(argument=argument):
        raise KeyError

    # By hand, because pytest keeps what it catches.
    with contextlib.suppress(KeyError):
        do(fail)
    del argument, fail
    until(lambda: watch() is None)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("patience_ends", ["long before", "just before", "just after"])
def test_nothing_stays_of_a_call_that_was_left_behind(no_collector, fails, patience_ends):
    argument, end = Argument(), threading.Event()
    watch = weakref.ref(argument)
    variable = contextvars.ContextVar("variable")
    token = variable.set(argument)

    def work(argument=argument):
        end.wait(10)
        if fails:
            raise KeyError(argument)
        return argument

    job = ThreadCall(work)
    variable.reset(token)
    if patience_ends == "long before":
        run_in_thread(job)
        assert not job.wait(0)
        end.set()
    else:
        end.set()
        job.run()
        steps = [job.abandon, job.finish]
        for step in steps if patience_ends == "just before" else reversed(steps):
            step()
    del argument, work, token
    until(lambda: watch() is None)
    assert job._error is None
    assert job._value is None


def test_an_error_that_is_kept_keeps_nothing_but_its_frames(no_collector):
    argument, within = Argument(), Argument()
    watches = [weakref.ref(argument), weakref.ref(within)]
    variable = contextvars.ContextVar("variable")
    token = variable.set(within)

    def fail(argument):
        del argument
        raise KeyError

    job = ThreadCall(functools.partial(fail, argument))
    variable.reset(token)
    del argument, within, token
    run_in_thread(job)
    assert job.wait(10)
    kept = None
    try:
        job.outcome()
    except KeyError as error:
        kept = error
    assert [watch() for watch in watches] == [None, None]
    assert kept is not None


def test_an_idle_thread_keeps_no_job(no_collector):
    def jobs():
        return [each for each in gc.get_objects() if type(each) is ThreadCall]

    before = {id(each): each for each in jobs()}  # calls that other tests have left hanging
    do(int)
    until(lambda: all(id(each) in before for each in jobs()))


def test_a_job_keeps_neither_value_nor_error():
    job = ThreadCall(lambda: "value")
    job.run()
    job.finish()
    assert job.outcome() == "value"
    assert job.outcome() is None


# --- processes ------------------------------------------------------------------------------------


def run(code):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        check=True,
        timeout=20,
        capture_output=True,
        text=True,
    )


def test_a_hung_call_does_not_keep_the_interpreter_alive():
    done = run("""
import threading, time
from opero.utils.threads import ThreadCall, run_in_thread
job = ThreadCall(lambda: time.sleep(3600))
run_in_thread(job)
assert not job.wait(0.01)
print("over")
""")
    assert done.stdout == "over\n"
    assert done.stderr == ""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_has_threads_of_its_own():
    done = run("""
import os, threading
from opero.utils.threads import ThreadCall, run_in_thread
def do(work):
    job = ThreadCall(work)
    run_in_thread(job)
    assert job.wait(10)
    return job.outcome()
parent = do(threading.current_thread)
child = os.fork()
if not child:
    assert do(threading.current_thread) is not parent
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert do(threading.current_thread) is parent
print("over")
""")
    assert done.stdout == "over\n"
