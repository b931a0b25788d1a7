# this_file: src/opero/caching/codec/signals.py
"""The two ways in which a codec says no. Stores turn them into misses; no caller ever sees them."""

from __future__ import annotations

__all__ = ["Buffer", "NotPlain", "Undecodable", "Unencodable"]

Buffer = bytes | bytearray | memoryview
"""What holds bytes."""


class Unencodable(Exception):  # noqa: N818 - a signal between codec and store
    """A value cannot be stored; the message tells people why, and shows nothing of the value."""


class Undecodable(Exception):  # noqa: N818 - as above
    """What was read is no entry: truncated, tampered with, of another key or another format."""


class NotPlain(Exception):  # noqa: N818 - as above
    """A value holds something else than plain data."""
