# this_file: src/opero/limits/circle.py
"""Calls that would wait for themselves: how many permits the calls around one hold."""

from __future__ import annotations

from types import CodeType, FrameType
from typing import Protocol

from opero.utils.threads import job_in

__all__ = ["held_around"]


class _Limit(Protocol):
    def release(self) -> None: ...


def held_around(frame: FrameType | None, code: CodeType, limit: _Limit) -> int:
    """Count the permits of a limit that the calls around one hold.

    They are in its thread or task, and in those that wait for it because of a `timeout`.

    Args:
        frame: Where to begin; what is around it is looked at.
        code: That of the stage's adapter, whose frames are calls that hold a permit.
        limit: The limit.
    """
    held = 0
    while frame is not None:
        held += _holds(frame, code, limit)
        job = job_in(frame)
        if job is None:
            frame = frame.f_back
            continue
        # A call that was left behind has taken the permit over.
        held += job.calls_then(limit.release)
        frame = job.asker()
    return held


def _holds(frame: FrameType, code: CodeType, limit: _Limit) -> bool:
    """Tell whether a frame is that of a call that holds a permit: in the stage, or on its express lane."""
    if frame.f_code is code:
        return frame.f_locals.get("limit") is limit
    mine = frame.f_globals.get("_opero_limit") is limit
    return mine and bool(frame.f_locals.get("_opero_held"))
