# this_file: src/opero/concurrency/executors/process/remote_error.py
"""Encode exceptions for another process: they keep their type wherever that is possible.

Pickle rebuilds an exception by calling its class with `args`, which fails for many constructors, and loses causes and
contexts. Here that is tried first, then the object is rebuilt without its constructor; of one that cannot be pickled
at all the text remains.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, Final

from opero.concurrency.executors.process.pickling import dumps
from opero.core.failures import read_marks, restore_marks
from opero.errors import RemoteError

__all__ = ["decode_error", "encode_error", "traceback_of"]

_DEEP: Final = 20
"""Most levels of causes that are included."""
_LONG: Final = 2000
"""Characters of text that stand for what cannot be pickled."""

Record = dict[str, Any]


def traceback_of(error: BaseException) -> str:
    """Return the traceback as Python prints it."""
    import traceback

    return "".join(traceback.format_exception(error))


def encode_error(error: BaseException) -> Record:
    """Return a record of an exception: texts, bytes, numbers and such records only."""
    return _encode(error, {}, _DEEP)


def _encode(error: BaseException, seen: dict[int, int], depth: int) -> Record:
    seen[id(error)] = len(seen)
    kind = type(error)
    record: Record = {
        "number": seen[id(error)],
        "name": f"{kind.__module__}.{kind.__qualname__}",
        "text": _safe(str, error),
        "args": _safe(repr, error.args),
        "ways": _ways(error),
        "suppress": error.__suppress_context__,
    }
    if isinstance(error, BaseExceptionGroup):
        record["members"] = [_link(e, seen, depth) for e in error.exceptions]
        record["message"] = error.message
    for name in ("__cause__", "__context__"):
        linked = getattr(error, name)
        if linked is not None:
            record[name] = _link(linked, seen, depth)
    # After the causes, which hold most of the earlier errors already.
    record["marks"] = [
        (owner, note, [_link(e, seen, depth) for e in earlier], inner)
        for owner, note, earlier, inner in read_marks(error)
    ]
    return record


def _link(error: BaseException, seen: dict[int, int], depth: int) -> Record:
    if id(error) in seen or not depth:
        return {"same": seen.get(id(error))}
    return _encode(error, seen, depth - 1)


def _safe(show: Callable[[Any], str], value: object) -> str:
    try:
        return show(value)[:_LONG]
    except Exception as error:  # noqa: BLE001 - a class may refuse anything
        return f"<{show.__name__}() raised {type(error).__name__}>"


def _ways(error: BaseException) -> list[bytes]:
    """Return pickles from which the exception can be rebuilt, the best first."""
    kind = type(error)
    ways = []
    if not isinstance(error, BaseExceptionGroup):
        try:
            data = dumps(error)
            copied = pickle.loads(data)  # noqa: S301 - made here
            # A constructor that writes its message would do so twice.
            if type(copied) is kind and str(copied) == str(error):
                ways.append(data)
        except Exception:  # noqa: BLE001, S110 - the other way is tried
            pass
    if not ways:
        args = (
            ()
            if isinstance(error, BaseExceptionGroup)
            else tuple(map(_picklable_or_text, error.args))
        )
        state = {name: v for name, v in vars(error).items() if _picklable(v)}
        try:
            ways.append(dumps((kind, args, state)))
        except Exception:  # noqa: BLE001, S110 - a class that cannot be pickled: its text remains
            pass
    return ways


def _picklable(value: object) -> bool:
    try:
        pickle.loads(dumps(value))  # noqa: S301 - made here
    except Exception:  # noqa: BLE001 - whatever a class raises
        return False
    return True


def _picklable_or_text(value: object) -> object:
    return value if _picklable(value) else _safe(repr, value)


def decode_error(record: Record) -> BaseException:
    """Rebuild an exception; a `RemoteError` with its text if that cannot be done."""
    return _decode(record, {})


def _decode(record: Record, made: dict[int, BaseException]) -> BaseException:
    members = [m for m in (_follow(r, made) for r in record.get("members", ())) if m is not None]
    error = _made(record, members)
    made[record["number"]] = error
    for name in ("__cause__", "__context__"):
        if name in record:
            # Past the class's own `__setattr__`, as the interpreter does it.
            BaseException.__setattr__(error, name, _follow(record[name], made))
    BaseException.__setattr__(error, "__suppress_context__", record["suppress"])
    marks = [
        (owner, note, tuple(e for e in (_follow(r, made) for r in earlier) if e is not None), inner)
        for owner, note, earlier, inner in record["marks"]
    ]
    restore_marks(error, marks)
    return error


def _follow(record: Record, made: dict[int, BaseException]) -> BaseException | None:
    if "same" in record:
        return made.get(record["same"])
    return _decode(record, made)


def _made(record: Record, members: list[BaseException]) -> BaseException:
    for data in record["ways"]:
        try:
            found = pickle.loads(data)  # noqa: S301 - from our own worker
            if isinstance(found, BaseException):
                return found
            kind, args, state = found
            error: BaseException
            if issubclass(kind, BaseExceptionGroup):
                error = kind.__new__(kind, record["message"], members)
            else:
                error = kind.__new__(kind, *args)
                error.args = args
            vars(error).update(state)
            return error
        except Exception:  # noqa: BLE001, S110 - a module that is missing here, say
            pass
    return RemoteError(record["name"], record["text"], record["args"])
