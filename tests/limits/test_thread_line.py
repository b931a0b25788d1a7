# this_file: tests/limits/test_thread_line.py
from __future__ import annotations

import threading
import time
from collections.abc import Callable

from opero.limits import thread_line
from opero.limits.thread_line import ThreadLine, Ticket


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_threads_are_served_in_order_of_arrival():
    line, first, served = ThreadLine(), Ticket(), []
    assert not line.enter(first)

    def stand(name: int) -> None:
        ticket = Ticket()
        assert line.enter(ticket)
        served.append(name)
        line.leave(ticket)

    threads = []
    for name in range(5):
        threads.append(threading.Thread(target=stand, args=(name,)))
        threads[-1].start()
        until(lambda: len(line.tickets) == name + 2)  # noqa: B023 - called in this very round
    assert served == []
    line.leave(first)
    for thread in threads:
        thread.join(10)
    assert served == list(range(5))
    assert not line.tickets


def test_who_comes_back_at_once_goes_to_the_end():
    line, first = ThreadLine(), Ticket()
    line.enter(first)
    served = []

    def stand() -> None:
        ticket = Ticket()
        line.enter(ticket)
        served.append("other")
        line.leave(ticket)

    thread = threading.Thread(target=stand)
    thread.start()
    until(lambda: len(line.tickets) == 2)
    line.leave(first)
    again = Ticket()
    line.enter(again)
    served.append("again")
    line.leave(again)
    thread.join(10)
    assert served == ["other", "again"]


def test_a_ticket_that_leaves_from_the_middle_changes_nothing_for_the_others():
    line = ThreadLine()
    first, gone, last = Ticket(), Ticket(), Ticket()
    line.enter(first)
    line.tickets.extend([gone, last])
    line.leave(gone)
    assert first.gate.locked()
    assert last.gate.locked()
    line.leave(first)
    assert not last.gate.locked()


def test_leaving_without_having_entered_does_nothing():
    line, first = ThreadLine(), Ticket()
    line.enter(first)
    line.leave(Ticket())
    assert list(line.tickets) == [first]


def test_a_wake_up_that_was_lost_is_made_up_for(monkeypatch):
    monkeypatch.setattr(thread_line, "_LOST_WAKE_UP", 0.005)
    line, first = ThreadLine(), Ticket()
    line.enter(first)
    thread = threading.Thread(target=line.enter, args=(Ticket(),))
    thread.start()
    until(lambda: len(line.tickets) == 2)
    time.sleep(0.02)
    assert thread.is_alive()
    line.tickets.popleft()
    thread.join(10)
    assert not thread.is_alive()
