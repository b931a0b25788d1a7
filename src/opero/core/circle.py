# this_file: src/opero/core/circle.py
"""Calls that would wait for themselves: how many permits the calls around one hold."""

from __future__ import annotations

from types import CodeType, FrameType

__all__ = ["held_around"]


def held_around(frame: FrameType | None, code: CodeType, limit: object) -> int:
    """Count the permits of a limit that the calls around one hold, in its thread or task.

    Args:
        frame: Where to begin; what is around it is looked at.
        code: That of the stage's adapter, whose frames are calls that hold a permit.
        limit: The limit.
    """
    held = 0
    while frame is not None:
        held += _holds(frame, code, limit)
        frame = frame.f_back
    return held


def _holds(frame: FrameType, code: CodeType, limit: object) -> bool:
    """Tell whether a frame is that of a call that holds a permit: in the stage, or on its express lane."""
    if frame.f_code is code:
        return frame.f_locals.get("limit") is limit
    mine = frame.f_globals.get("_opero_limit") is limit
    return mine and bool(frame.f_locals.get("_opero_held"))
