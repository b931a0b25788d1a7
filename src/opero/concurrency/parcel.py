# this_file: src/opero/concurrency/parcel.py
"""Items on their way to a worker and values on their way back, packed so that a bad one spoils no other.

Scalars stand in one pickle for all. Everything else is sealed, each in a pickle of its own, which is opened only when
its turn comes.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Sequence
from typing import Any, Final

from opero.concurrency import buffers
from opero.concurrency.shipping import dumps
from opero.errors import ShippingError

__all__ = ["Parcel", "pack"]

_PLAIN: Final = frozenset({int, float, complex, str, bytes, bool, type(None)})
"""Types whose instances can always be pickled and opened again."""


def pack(
    values: Sequence[Any], what: str, more: object = None, *, whole: bool = False
) -> tuple[bytes, int | None]:
    """Pack values for a frame.

    Args:
        values: The values.
        what: What they are, for the message about one that cannot be pickled: "item" or "result".
        more: Something picklable that travels with them.
        whole: Whether everything must stand in the body, because no descriptor can travel.

    Returns:
        The body of the frame, and the descriptor that goes with it or None.
    """
    if set(map(type, values)) <= _PLAIN:
        return pickle.dumps((values, None, more), 5), None
    large: list[pickle.PickleBuffer] = []
    entries = [v if type(v) in _PLAIN else _seal(v, large, what, whole=whole) for v in values]
    if not large:
        return pickle.dumps((entries, [], more), 5), None
    fd, spans = buffers.write_segment(large)
    return pickle.dumps((entries, spans, more), 5), fd


def _seal(
    value: Any, large: list[pickle.PickleBuffer], what: str, *, whole: bool
) -> tuple[Any, ...]:
    begin = len(large)
    may_pass = buffers.CAN_PASS and not whole

    def stays(buffer: pickle.PickleBuffer) -> bool:
        with buffer.raw() as view:
            beside = may_pass and view.nbytes >= buffers.LARGE
        if beside:
            large.append(buffer)
        return not beside

    try:
        again = functools.partial(large.__delitem__, slice(begin, None))
        return (dumps(value, stays, again, home=what == "result"), begin, len(large))
    except Exception as error:  # noqa: BLE001 - whatever a user's `__reduce__` raises
        del large[begin:]
        return (_unshippable(what, value, error),)


def _unshippable(what: str, value: object, error: BaseException) -> str:
    kind = type(value)
    told = f"{type(error).__name__}: {error}"
    return f"the {what}, a {kind.__module__}.{kind.__qualname__}, cannot travel between processes ({told})"


class Parcel:
    """What arrived, opened piece by piece.

    Args:
        body: Body of the frame.
        fd: Its descriptor.

    Attributes:
        more: What travelled with the values.
        plain: Whether all values are scalars, so that `entries` are the values.
        entries: What stands for each value; see `open`.
    """

    __slots__ = ("_segment", "_spans", "entries", "more", "plain")

    def __init__(self, body: bytes | memoryview, fd: int | None) -> None:
        self._segment = None if fd is None else buffers.map_segment(fd)
        entries, spans, self.more = pickle.loads(body)  # noqa: S301 - from our own worker or map
        self.entries: list[Any] = entries
        self.plain: bool = spans is None
        self._spans: list[buffers.Span] = spans or []

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
        data, begin, end = entry
        if begin == end or self._segment is None:
            return pickle.loads(data)  # noqa: S301 - as above
        views = [self._segment[at : at + size] for at, size in self._spans[begin:end]]
        return pickle.loads(data, buffers=views)  # noqa: S301 - as above
