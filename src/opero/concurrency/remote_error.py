# this_file: src/opero/concurrency/remote_error.py
"""Exceptions on their way from one process to another: the same type wherever that is possible.

Pickle makes an exception again by calling its class with `args`, which fails for many a constructor, and loses causes
and contexts. Here that is tried first, then the object is put together without its constructor, and what is left of
one that cannot travel at all is its story.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, Final

from opero.concurrency.shipping import dumps
from opero.core.failures import read_marks, restore_marks
from opero.errors import RemoteError

__all__ = ["decode_error", "encode_error", "traceback_of"]

_DEEP: Final = 20
"""Causes of causes that are brought along."""
_LONG: Final = 2000
"""Characters of text that stand for what cannot travel."""

Record = dict[str, Any]


def traceback_of(error: BaseException) -> str:
    """Return the traceback as Python prints it."""
    import traceback

    return "".join(traceback.format_exception(error))


def encode_error(error: BaseException) -> Record:
    """Return what makes an exception again elsewhere: only texts, bytes, numbers and such records."""
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
        "quiet": error.__suppress_context__,
    }
    if isinstance(error, BaseExceptionGroup):
        record["members"] = [_link(e, seen, depth) for e in error.exceptions]
        record["message"] = error.message
    for name in ("__cause__", "__context__"):
        behind = getattr(error, name)
        if behind is not None:
            record[name] = _link(behind, seen, depth)
    # Behind the causes, among which the earlier errors are found already.
    record["told"] = [
        (owner, note, [_link(e, seen, depth) for e in earlier], inner)
        for owner, note, earlier, inner in read_marks(error)
    ]
    return record


def _link(error: BaseException, seen: dict[int, int], depth: int) -> Record:
    if id(error) in seen or not depth:
        return {"same": seen.get(id(error))}
    return _encode(error, seen, depth - 1)


def _safe(tell: Callable[[Any], str], value: object) -> str:
    try:
        return tell(value)[:_LONG]
    except Exception as error:  # noqa: BLE001 - a class may refuse anything
        return f"<{tell.__name__}() raised {type(error).__name__}>"


def _ways(error: BaseException) -> list[bytes]:
    """Return pickles that give the exception back, the best first."""
    kind = type(error)
    ways = []
    if not isinstance(error, BaseExceptionGroup):
        try:
            data = dumps(error)
            twin = pickle.loads(data)  # noqa: S301 - made here
            # A constructor that writes its message would do so twice.
            if type(twin) is kind and str(twin) == str(error):
                ways.append(data)
        except Exception:  # noqa: BLE001, S110 - the other way is tried
            pass
    if not ways:
        args = () if isinstance(error, BaseExceptionGroup) else tuple(map(_movable, error.args))
        state = {name: v for name, v in vars(error).items() if _moves(v)}
        try:
            ways.append(dumps((kind, args, state)))
        except Exception:  # noqa: BLE001, S110 - a class that cannot travel: its story does
            pass
    return ways


def _moves(value: object) -> bool:
    try:
        pickle.loads(dumps(value))  # noqa: S301 - made here
    except Exception:  # noqa: BLE001 - whatever a class raises
        return False
    return True


def _movable(value: object) -> object:
    return value if _moves(value) else _safe(repr, value)


def decode_error(record: Record) -> BaseException:
    """Make an exception again; a `RemoteError` that tells its story if that cannot be done."""
    return _decode(record, {})


def _decode(record: Record, made: dict[int, BaseException]) -> BaseException:
    members = [m for m in (_follow(r, made) for r in record.get("members", ())) if m is not None]
    error = _made(record, members)
    made[record["number"]] = error
    for name in ("__cause__", "__context__"):
        if name in record:
            # Past the class's own `__setattr__`, as the interpreter does it.
            BaseException.__setattr__(error, name, _follow(record[name], made))
    BaseException.__setattr__(error, "__suppress_context__", record["quiet"])
    told = [
        (owner, note, tuple(e for e in (_follow(r, made) for r in earlier) if e is not None), inner)
        for owner, note, earlier, inner in record["told"]
    ]
    restore_marks(error, told)
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
