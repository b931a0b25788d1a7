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

from typing import TYPE_CHECKING

from opero.utils.lazy import export_lazily

if TYPE_CHECKING:
    from opero.testing.controls import FakeClock as FakeClock
    from opero.testing.controls import capture_events as capture_events
    from opero.testing.controls import fake_clock as fake_clock
    from opero.testing.controls import flaky as flaky
    from opero.testing.controls import is_disabled as is_disabled
    from opero.testing.controls import set_disabled as set_disabled
    from opero.testing.recording import NotRecordedError as NotRecordedError
    from opero.testing.recording import record as record
    from opero.testing.recording import replay as replay

export_lazily(
    __name__,
    {
        "opero.testing.controls": (
            "FakeClock", "capture_events", "fake_clock", "flaky", "is_disabled", "set_disabled",
        ),
        "opero.testing.recording": ("NotRecordedError", "record", "replay"),
    },
)  # fmt: skip
