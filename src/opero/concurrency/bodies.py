# this_file: src/opero/concurrency/bodies.py
"""What stands in the frames of a chunk and of its results, packed on one side and opened on the other."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opero.concurrency.executors.base import Done, ItemOutcome, Parked, WorkerFacts
from opero.concurrency.parcel import PLAIN, Parcel, pack, put
from opero.concurrency.remote_error import decode_error, encode_error, traceback_of
from opero.concurrency.shipping import dumps
from opero.errors import ShippingError

if TYPE_CHECKING:
    from opero.concurrency.executors.base import Chunk
    from opero.concurrency.segment import Load, Segment
    from opero.events import Event

__all__ = ["open_done", "open_parked", "pack_chunk", "pack_done", "unopened"]

# --- to the worker --------------------------------------------------------------------------------


def pack_chunk(chunk: Chunk, segment: Segment | None = None) -> bytes:
    """Pack a chunk: the body of its frame; `segment` as for `pack`."""
    parked = None
    if chunk.parked:
        parked = {position: _pack_parked(one) for position, one in chunk.parked.items()}
    return pack(chunk.items, "item", parked, segment)


def open_parked(packed: dict[int, Any] | None) -> dict[int, Parked] | None:
    """Return what items of a chunk take with them from earlier attempts."""
    return packed and {position: _open_parked(one) for position, one in packed.items()}


def _pack_parked(parked: Parked) -> tuple[Parked, list[tuple[str | None, Any]]]:
    failures = [(label, encode_error(error)) for label, error in parked.failures]
    return dataclasses.replace(parked, failures=()), failures


def _open_parked(packed: tuple[Parked, list[tuple[str | None, Any]]]) -> Parked:
    parked, failures = packed
    errors = [(label, decode_error(record)) for label, record in failures]
    # Only failures of a function are kept, and these are exceptions.
    parked.failures = tuple((label, e) for label, e in errors if isinstance(e, Exception))
    return parked


# --- from the worker ------------------------------------------------------------------------------


def pack_done(
    done: Done,
    stats: dict[str, float],
    events: Sequence[Event],
    load: Load | tuple[()] = (),
    *,
    sealed: bool = False,
) -> bytes:
    """Pack results.

    Args:
        done: The results.
        stats: Counters of the calls.
        events: What happened with them.
        load: What is said of the segment that they were sealed in.
        sealed: Whether results that are no scalars were sealed already.
    """
    values, odd = done.values, None
    if done.odd:
        values = list(values)
        odd = {}
        for n, outcome in done.odd.items():
            values[n] = outcome.value
            odd[n] = _pack_outcome(outcome)
    more = (done.places, odd, done.busy_s, done.worker, stats, [_pack_event(e) for e in events])
    if not sealed:
        return pack(values, "result", more)
    return put(values, None if set(map(type, values)) <= PLAIN else load, more)


def open_done(parcel: Parcel, chunk: int, *, weight: int = 0) -> Done:
    """Open results of a chunk whose items weigh so many bytes; one that cannot be opened is the error of its item."""
    places, packed, busy_s, worker, stats, events = parcel.more
    odd = {} if packed is None else {n: _open_outcome(o) for n, o in packed.items()}
    values = parcel.entries
    if not parcel.plain:
        values = [_opened(parcel, n, odd) for n in range(len(values))]
    for n, outcome in odd.items():
        if outcome.error is None:
            outcome.value = values[n]
        values[n] = None
    facts = None
    if stats or events:
        facts = WorkerFacts(stats=stats, events=tuple(map(_open_event, events)))
    return Done(chunk, places, values, odd, busy_s, worker, facts, weight)


def _opened(parcel: Parcel, place: int, odd: dict[int, ItemOutcome]) -> Any:
    try:
        return parcel.open(place)
    except Exception as error:  # noqa: BLE001 - whatever a class raises when it is unpickled
        failed = unopened(error, "result")
        odd.setdefault(place, failed).error = failed.error
    return None


def unopened(error: Exception, what: str) -> ItemOutcome:
    """Return the outcome of an item that could not be pickled, or not be unpickled."""
    if isinstance(error, ShippingError):
        return ItemOutcome(error=error)
    told = f"{type(error).__name__}: {error}"
    made = ShippingError(f"the {what} cannot be unpickled on the other side ({told})")
    made.__cause__ = error
    return ItemOutcome(error=made)


def _pack_outcome(outcome: ItemOutcome) -> tuple[ItemOutcome, Any, Any, bytes | None]:
    error = outcome.error
    record = trace = None
    if error is not None:
        record, trace = encode_error(error), traceback_of(error)
    parked = None if outcome.parked is None else _pack_parked(outcome.parked)
    try:
        fallback = dumps(outcome.fallback)
    except Exception:  # noqa: BLE001 - it is told for information only, and its label comes along
        fallback = None
    bare = dataclasses.replace(
        outcome, value=None, error=None, trace=trace, parked=None, fallback=None
    )
    return bare, record, parked, fallback


def _open_outcome(packed: tuple[ItemOutcome, Any, Any, bytes | None]) -> ItemOutcome:
    outcome, record, parked, fallback = packed
    if record is not None:
        outcome.error = decode_error(record)
    if parked is not None:
        outcome.parked = _open_parked(parked)
    if fallback is not None:
        try:
            outcome.fallback = pickle.loads(fallback)  # noqa: S301 - from our own worker
        except Exception:  # noqa: BLE001, S110 - as above
            pass
    return outcome


def _pack_event(event: Event) -> tuple[bytes, Any]:
    error: BaseException | None = getattr(event, "error", None)
    if error is None:
        return dumps(event), None
    # Events are frozen dataclasses; those with an error have it as a field.
    change: dict[str, Any] = {"error": None}
    bare = dataclasses.replace(event, **change)
    return dumps(bare), encode_error(error)


def _open_event(packed: tuple[bytes, Any]) -> Event:
    data, record = packed
    event: Event = pickle.loads(data)  # noqa: S301 - from our own worker
    if record is None:
        return event
    change: dict[str, Any] = {"error": decode_error(record)}
    return dataclasses.replace(event, **change)
