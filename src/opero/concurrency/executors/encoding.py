# this_file: src/opero/concurrency/executors/encoding.py
"""Encode items, results, exceptions and events for another process.

Values are encoded so that a bad one spoils no other: scalars stand as they are, everything else in a pickle of its own,
which is opened only when its turn comes.
"""

from __future__ import annotations

import io
import mmap
import pickle
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pickle import PickleBuffer
from typing import TYPE_CHECKING, Any, Final

from opero.concurrency.executors.base import Done, ItemOutcome, WorkerFacts
from opero.concurrency.executors.pickling import PROTOCOL, dumps
from opero.core.failures import read_marks, restore_marks
from opero.errors import RemoteError, ShippingError
from opero.utils.exceptions import new_error, set_directly, take_apart, text_of

if TYPE_CHECKING:
    from opero.concurrency.executors.base import Chunk
    from opero.events import Event


PLAIN: Final = frozenset({int, float, complex, str, bytes, bool, type(None)})
"""Types whose instances can always be pickled and opened again."""


# --- shared memory --------------------------------------------------------------------------------
#
# New memory is what costs: the kernel clears and maps each of its pages, which takes many times as long as a copy to
# pages that are there already. So a few buffers of fixed size are used in turn, one for each chunk: the pool writes
# its items into it and the worker its results behind them, and each copies out what the other one has written. What
# does not fit goes through the pipe. A file without a name lies behind them.

LARGE: Final = 1 << 16
"""Bytes from which a buffer goes through shared memory."""
_ALIGNED: Final = 64

Span = tuple[int, int]
"""Where something lies in a buffer's memory: its first byte and the one after its last."""


class SharedBuffer:
    """Bytes of a sender, one span after the other.

    Args:
        mapped: The memory.
        start: Its first byte in the memory.
        size: Its length.
        used: Bytes in use.

    Attributes:
        start, size, used: As above.
    """

    __slots__ = ("_mapped", "size", "start", "used")

    def __init__(self, mapped: mmap.mmap, start: int, size: int, used: int = 0) -> None:
        self._mapped = mapped
        self.start: int = start
        self.size: int = size
        self.used: int = used

    def add(self, part: PickleBuffer, spans: list[Span]) -> bool:
        """Copy a part of a value behind the others and note its place; return whether it is small, or has no room."""
        with part.raw() as raw:
            size = raw.nbytes
            if size < LARGE or self.used + size > self.size:
                return True
            start = self.start + self.used
            self._mapped[start : start + size] = raw
        self.used += size + -size % _ALIGNED
        spans.append((start, start + size))
        return False


def copy_span(mapped: mmap.mmap, span: Span) -> bytearray:
    """Return a copy of what a sender has put into shared memory, for the receiver, which may write to it."""
    with memoryview(mapped) as view, view[span[0] : span[1]] as part:
        return bytearray(part)


# --- values ---------------------------------------------------------------------------------------


def encode_value(value: Any, what: str, buffer: SharedBuffer | None) -> Any:
    """Return what stands for a value in a message.

    Args:
        value: The value.
        what: What it is, for the message about one that cannot be pickled: "item" or "result".
        buffer: Takes large parts of it; without one everything stands in the message.

    Returns:
        The value itself if it is plain; else a pickle and the places of its parts; else a text that says why not.
    """
    if type(value) in PLAIN:
        return value
    before = 0 if buffer is None else buffer.used
    spans: list[Span] = []

    def begin() -> Callable[[PickleBuffer], bool] | None:
        if buffer is None:
            return None
        buffer.used = before
        spans.clear()
        return partial(buffer.add, spans=spans)

    try:
        return dumps(value, begin, home=what == "result"), spans
    except Exception as error:  # noqa: BLE001 - whatever a user's `__reduce__` raises
        begin()
        kind, reason = type(value), f"{type(error).__name__}: {error}"
        return (
            f"the {what}, a {kind.__module__}.{kind.__qualname__}, cannot travel between processes ({reason})",
        )


def decode_value(
    entry: Any, what: str, copy: Callable[[Span], Any] | None = None
) -> tuple[Any, ItemOutcome | None]:
    """Return a value, or the outcome of an item that could not be pickled, or cannot be unpickled.

    Args:
        entry: What stands for it.
        what: What it is, for the message: "item" or "result".
        copy: Copies a part of it out of the shared buffer.
    """
    if type(entry) is not tuple:
        return entry, None
    if len(entry) == 1:
        return None, ItemOutcome(error=ShippingError(entry[0]))
    data, spans = entry
    try:
        return pickle.loads(data, buffers=map(copy, spans) if copy else ()), None  # noqa: S301 - from our own worker or pool
    except Exception as error:  # noqa: BLE001 - whatever its class raises then
        reason = f"{type(error).__name__}: {error}"
        made = ShippingError(f"the {what} cannot be unpickled on the other side ({reason})")
        made.__cause__ = error
        return None, ItemOutcome(error=made)


# --- chunks and results ---------------------------------------------------------------------------


def encode_chunk(chunk: Chunk, buffer: SharedBuffer | None = None) -> tuple[Any, ...]:
    """Return the content of a chunk: the items, and what they bring from earlier attempts, pickled.

    The items are a list if all are plain, else a tuple of what stands for them.

    Args:
        chunk: The chunk.
        buffer: Takes large parts of the items; without one everything stands in the message.
    """
    items: Sequence[Any] = chunk.items
    if not PLAIN.issuperset(map(type, items)):
        items = tuple([encode_value(item, "item", buffer) for item in items])
    return items, dumps_with_errors(chunk.parked) if chunk.parked else None


def encode_done(
    done: Done, stats: dict[str, float], events: Iterable[Event], *, plain: bool = False
) -> tuple[Any, ...]:
    """Return the content of results.

    Args:
        done: The results; each value is encoded, also those of outcomes, which stand among the others.
        stats: Counters of the calls.
        events: What happened with them.
        plain: Whether no value is anything but plain.
    """
    for outcome in done.odd.values():
        if outcome.error is not None:
            outcome.trace = traceback_of(outcome.error)
        outcome.fallback = encode_value(outcome.fallback, "fallback", None)
    odd = dumps_with_errors(done.odd) if done.odd else None
    values = done.values if plain else tuple(done.values)
    return (
        done.places, values, odd, done.busy_s, done.weight, stats, [*map(_dump_event, events)]
    )  # fmt: skip


def decode_done(
    chunk: int, content: tuple[Any, ...], copy: Callable[[Span], Any] | None = None
) -> Done:
    """Return results; one that cannot be opened is the error of its item.

    Args:
        chunk: Id of the chunk.
        content: What `encode_done` has returned.
        copy: Copies parts of values out of the shared buffer.
    """
    places, values, pickled, busy_s, weight, stats, events = content
    odd: dict[int, ItemOutcome] = pickle.loads(pickled) if pickled else {}  # noqa: S301 - from our own worker
    if type(values) is tuple:
        values = list(values)
        for n, entry in enumerate(values):
            values[n], failed = decode_value(entry, "result", copy)
            if failed is not None:
                odd.setdefault(n, failed).error = failed.error
    for n, outcome in odd.items():
        if outcome.error is None:
            outcome.value = values[n]
        values[n] = None
        # It is for information only, and its label comes along.
        outcome.fallback, _ = decode_value(outcome.fallback, "fallback")
    facts = None
    if stats or events:
        loaded = tuple(map(pickle.loads, events))
        facts = WorkerFacts(stats=stats, events=loaded)
    return Done(chunk, places, values, odd, busy_s, facts, weight)


def _dump_event(event: Event) -> bytes:
    try:
        return dumps_with_errors(event)
    except Exception:  # noqa: BLE001 - one that a program has defined may go by value only
        return dumps(event)


# --- exceptions -----------------------------------------------------------------------------------
#
# Pickle rebuilds an exception by calling its class with `args`, which fails for many constructors, and loses causes and
# contexts. Here that is tried first, then the object is rebuilt without its constructor; of one that cannot be pickled
# at all the text remains.

_DEEP: Final = 20
"""Most levels of causes that are included."""


def traceback_of(error: BaseException) -> str:
    """Return the traceback as Python prints it."""
    import traceback

    return "".join(traceback.format_exception(error))


def dumps_with_errors(value: object) -> bytes:
    """Pickle a value of ours with the exceptions in it, whatever their classes are like; `pickle.loads` opens it.

    Raises:
        Exception: It contains something else that cannot be pickled.
    """
    file = io.BytesIO()
    _ErrorPickler(file, PROTOCOL).dump(value)
    return file.getvalue()


class _ErrorPickler(pickle.Pickler):
    """Pickles exceptions with their causes, contexts and earlier errors."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self._depths: dict[int, int] = {}
        self._groups: set[int] = set()

    def reducer_override(self, obj: Any) -> Any:
        """Return how an exception is rebuilt; all else is pickled as always."""
        if not isinstance(obj, BaseException):
            return NotImplemented
        kind = type(obj)
        members: tuple[BaseException, ...] = ()
        if isinstance(obj, BaseExceptionGroup):
            # It is made from its members, so none of them may lead back to it.
            self._groups.add(id(obj))
            members = self._linked(obj, obj.exceptions)
        texts = f"{kind.__module__}.{kind.__qualname__}", text_of(obj), text_of(obj.args, repr)
        causes = [self._linked(obj, [one]) for one in (obj.__cause__, obj.__context__)]
        marks = [
            (owner, note, self._linked(obj, earlier), inner)
            for owner, note, earlier, inner in read_marks(obj)
        ]
        state = causes, obj.__suppress_context__, marks
        return _rebuild, (_way(obj), texts, members), state, None, None, _link

    def _linked(
        self, error: BaseException, others: Iterable[BaseException | None]
    ) -> tuple[BaseException, ...]:
        """Return which other exceptions go along with one; chains without end are cut off."""
        depth = self._depths.get(id(error), 0) + 1
        found = [one for one in others if one is not None and id(one) not in self._groups]
        return tuple(one for one in found if self._depths.setdefault(id(one), depth) <= _DEEP)


def _way(error: BaseException) -> bytes:
    """Return a pickle from which an exception can be rebuilt; empty if there is none."""
    try:
        if not isinstance(error, BaseExceptionGroup):
            data = dumps(error)
            copied = pickle.loads(data)  # noqa: S301 - made here
            # A constructor that writes its message would do so twice.
            if type(copied) is type(error) and str(copied) == str(error):
                return data
    except Exception:  # noqa: BLE001, S110 - the other way is tried
        pass
    try:
        args, attributes = take_apart(error, _tested)
        shown = [
            dumps(text_of(value, repr)) if data is None else data
            for data, value in zip(args, error.args, strict=False)
        ]
        return dumps((type(error), shown, attributes))
    except Exception:  # noqa: BLE001 - a class that cannot be pickled: its text remains
        return b""


def _tested(value: object) -> bytes:
    data = dumps(value)
    pickle.loads(data)  # noqa: S301 - made here
    return data


def _rebuild(
    way: bytes, texts: tuple[str, str, str], members: tuple[BaseException, ...]
) -> BaseException:
    """Rebuild an exception; a `RemoteError` with its text if that cannot be done."""
    try:
        found = pickle.loads(way)  # noqa: S301 - from our own worker
        if isinstance(found, BaseException):
            return found
        kind, args, attributes = found
        error: BaseException = new_error(
            kind, args, attributes, pickle.loads, members=members, trusted=True
        )
    except Exception:  # noqa: BLE001 - a module that is missing here, say
        return RemoteError(*texts)
    return error


def _link(error: BaseException, state: tuple[Any, bool, Any]) -> None:
    """Give a rebuilt exception its causes."""
    causes, suppress, marks = state
    for name, found in zip(("__cause__", "__context__"), causes, strict=True):
        if found:
            set_directly(error, name, found[0])
    set_directly(error, "__suppress_context__", suppress)
    restore_marks(error, marks)
