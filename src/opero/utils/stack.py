# this_file: src/opero/utils/stack.py
"""Where the user's own code called opero."""

from __future__ import annotations

import sys
from types import FrameType

__all__ = ["users_stacklevel"]


def users_stacklevel() -> int:
    """Return the `stacklevel` with which a warning of the calling function points at the user's line."""
    level = 1
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - what `warnings` itself uses
    while frame is not None and frame.f_back is not None and _is_ours(frame):
        level, frame = level + 1, frame.f_back
    return level


def _is_ours(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__", "")
    return name.startswith("opero.") or frame.f_code.co_filename.startswith("<opero wrapper")
