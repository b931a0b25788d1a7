# this_file: src/opero/concurrency/parcel.py
"""Items on their way to a worker and values on their way back, packed so that a bad one spoils no other.

Scalars stand in one pickle for all. Everything else is sealed, each in a pickle of its own, which is opened only when
its turn comes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, Final

from opero.concurrency.segment import LARGE, Intake, Load, Segment, Span
from opero.concurrency.executors.process.pickling import dumps
from opero.errors import ShippingError

__all__ = ["PLAIN", "Parcel", "pack", "put", "seal"]

PLAIN: Final = frozenset({int, float, complex, str, bytes, bool, type(None)})
"""Types whose instances can always be pickled and opened again."""


def pack(
    values: Sequence[Any], what: str, more: object = None, segment: Segment | None = None
) -> bytes:
    """Pack values for a frame.

    Args:
        values: The values.
        what: What they are, for the message about one that cannot be pickled: "item" or "result".
        more: Something picklable that travels with them.
        segment: Takes large buffers; without one everything stands in the body.
    """
    if set(map(type, values)) <= PLAIN:
        return put(values, None, more)
    entries = [v if type(v) in PLAIN else seal(v, what, segment) for v in values]
    return put(entries, _load(segment), more)


def put(entries: Sequence[Any], load: Load | tuple[()] | None, more: object = None) -> bytes:
    """Return the body of a frame.

    Args:
        entries: Scalars, and what was sealed.
        load: What is said of the segment; empty without one, None if nothing was sealed.
        more: As for `pack`.
    """
    return pickle.dumps((entries, load, more), 5)


def _load(segment: Segment | None) -> Load | tuple[()]:
    return segment.load if segment is not None and segment.used else ()


def seal(value: Any, what: str, segment: Segment | None) -> tuple[Any, ...]:
    """Return what stands for a value that is no scalar; see `pack`."""
    before = 0 if segment is None else segment.used
    spans: list[Span] = []

    def stays(buffer: pickle.PickleBuffer) -> bool:
        if segment is None:
            return True
        with buffer.raw() as view:
            if view.nbytes < LARGE:
                return True
        spans.append(segment.add(buffer))
        return False

    def again() -> None:
        if segment is not None:
            segment.used = before
        spans.clear()

    try:
        data = dumps(value, stays, again, home=what == "result")
    except Exception as error:  # noqa: BLE001 - whatever a user's `__reduce__` raises
        again()
        return (_unshippable(what, value, error),)
    return data, spans


def _unshippable(what: str, value: object, error: BaseException) -> str:
    kind = type(value)
    told = f"{type(error).__name__}: {error}"
    return f"the {what}, a {kind.__module__}.{kind.__qualname__}, cannot travel between processes ({told})"


class Parcel:
    """What arrived, opened piece by piece.

    Args:
        body: Body of the frame.
        fd: Its descriptor.
        intake: What is known of the sender's segments.

    Attributes:
        more: What travelled with the values.
        plain: Whether all values are scalars, so that `entries` are the values.
        kept: Whether its buffers lie where the sender will write again.
        entries: What stands for each value; see `open`.
    """

    __slots__ = ("_take", "entries", "kept", "more", "plain")

    def __init__(
        self, body: bytes | memoryview, fd: int | None = None, intake: Intake | None = None
    ) -> None:
        entries, load, self.more = pickle.loads(body)  # noqa: S301 - from our own worker or map
        self.entries: list[Any] = entries
        self.plain: bool = load is None
        self.kept: bool = bool(load) and load[2]
        self._take: Callable[[Span], Any] | None = None
        if load and intake is not None:
            self._take = intake.open(load, fd)

    def open(self, position: int) -> Any:
        """Return a value.

        Raises:
            ShippingError: It could not be pickled.
            Exception: It cannot be unpickled; whatever its class raises then.
        """
        entry = self.entries[position]
        if type(entry) is not tuple:
            return entry
        if len(entry) == 1:
            raise ShippingError(entry[0])
        data, spans = entry
        if not spans or self._take is None:
            return pickle.loads(data)  # noqa: S301 - as above
        return pickle.loads(data, buffers=map(self._take, spans))  # noqa: S301 - as above
