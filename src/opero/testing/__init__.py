# this_file: src/opero/testing/__init__.py
"""Test code that uses opero: no sleeping, no network, flaky functions on demand.

    with opero.testing.set_disabled():      # no retries, no waits, no caches
    with opero.testing.fake_clock() as clock:      # every pause of opero's own takes no time
    with opero.testing.capture_events() as events:
    with opero.testing.record("calls.jsonl"):      # once, with the network
    with opero.testing.replay("calls.jsonl"):      # from then on, without

`OPERO_DISABLE=1` in the environment has the effect of `set_disabled()` for a whole program.
"""

from __future__ import annotations

from opero.testing.controls import FakeClock, capture_events, fake_clock, flaky, is_disabled
from opero.testing.controls import set_disabled as set_disabled
from opero.testing.recording import NotRecordedError, record, replay

__all__ = [
    "FakeClock", "NotRecordedError", "capture_events", "fake_clock", "flaky", "is_disabled", "record", "replay",
    "set_disabled",
]  # fmt: skip
