# this_file: tests/utils/test_ambient.py
"""What surrounds every call: a flag that several holders keep on, a warning for waits that block a loop."""

from __future__ import annotations

import asyncio
import sys
import threading

import pytest

from opero.errors import OperoWarning
from opero.utils import ambient
from opero.utils.ambient import Switch

pytestmark = pytest.mark.internal


def test_switch_is_on_while_it_is_held() -> None:
    switch = Switch()
    seen = [bool(switch.on)]
    for change in (switch.turn_on, switch.turn_on, switch.turn_off, switch.turn_off):
        change()
        seen.append(bool(switch.on))
    assert seen == [False, True, True, True, False]


def test_holders_in_many_threads_are_all_counted() -> None:
    switch = Switch()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:

        def work() -> None:
            for _ in range(1000):
                switch.turn_on()
                switch.turn_off()
            switch.turn_on()

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert len(switch.on) == 4


def test_a_synchronous_wait_in_the_thread_of_a_running_loop_warns_once(monkeypatch) -> None:
    monkeypatch.setattr(ambient, "_warned", set())
    ambient.warn_on_loop("a permit")

    async def main():
        with pytest.warns(OperoWarning, match=r"waits for a permit.*asyncio.to_thread"):
            ambient.warn_on_loop("a permit")
        ambient.warn_on_loop("a permit")

    asyncio.run(main())
