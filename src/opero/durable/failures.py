# this_file: src/opero/durable/failures.py
"""Write errors to the journal so that the same type can be raised again, without running its constructor."""

from __future__ import annotations

import json
from typing import Any, Final

from opero.durable.values import decode, encode, find_class
from opero.errors import ActivityError, UnserializableError

__all__ = ["keepable", "message_of", "pack_error", "rebuild_error", "unpack_error"]

_LONGEST: Final = 10_000
"""Characters of a message or a note that are kept."""


def keepable(error: Exception) -> Exception:
    """Return the error if a replay can raise it alike, else an error that stands for it.

    Called in the first run too, so that the first run and every replay raise the same type with the
    same message. For an error that cannot be rebuilt, an `ActivityError`; for a group, one whose members
    can be.

    Example:
        >>> keepable(KeyError("x"))
        KeyError('x')
        >>> def local():
        ...     class Odd(Exception): pass
        ...     return Odd("here")
        >>> keepable(local())
        ActivityError('Odd', 'here')
    """
    if isinstance(error, ExceptionGroup):
        kept = [keepable(member) for member in error.exceptions]
        if any(new is not old for new, old in zip(kept, error.exceptions, strict=True)):
            group = error.derive(kept)
            group.__notes__ = list(getattr(error, "__notes__", ()))
            group.__cause__ = error
            error = group
    if _survives(error):
        return error
    stand_in = ActivityError(type(error).__name__, str(error)[:_LONGEST])
    stand_in.__cause__ = error
    return stand_in


def _survives(error: Exception) -> bool:
    """Return whether an error is rebuilt with its type and message."""
    try:
        rebuilt = rebuild_error(pack_error(error))
        return type(rebuilt) is type(error) and str(rebuilt)[:_LONGEST] == str(error)[:_LONGEST]
    except Exception:  # noqa: BLE001 - whatever the class does, the error itself is reported
        return False


def pack_error(error: Exception) -> str:
    """Return an error as JSON text: type, message, notes, and of its arguments and attributes what can be kept."""
    return json.dumps(_packed(error))


def _packed(error: Exception) -> dict[str, Any]:
    cls = type(error)
    message = str(error)[:_LONGEST]
    if isinstance(error, ExceptionGroup):
        members = [_packed(member) for member in error.exceptions]
        made_from = args = [encode(error.message)]
    else:
        members = None
        kept = [_encoded(argument) for argument in error.args]
        # An argument that cannot be kept is replaced by the message: most are responses and requests.
        args = [encode(message)] if None in kept else [text for text in kept if text is not None]
        made_from = args
        if isinstance(error, OSError) and error.filename is not None and len(args) == 2:
            # It hides the names of files from its arguments.
            made_from = [*args, encode(str(error.filename))]
    attributes = {name: _encoded(value) for name, value in vars(error).items()}
    packed = {
        "made_from": made_from,
        "type": f"{cls.__module__}:{cls.__qualname__}",
        "message": message,
        "args": args,
        "attributes": {name: text for name, text in attributes.items() if text is not None},
        "notes": [str(note)[:_LONGEST] for note in getattr(error, "__notes__", ())],
    }
    return packed if members is None else {**packed, "members": members}


def _encoded(value: object) -> str | None:
    try:
        return encode(value)
    except UnserializableError:
        return None


def unpack_error(text: str) -> Exception:
    """Return the error that `pack_error` has written; an `ActivityError` where it cannot be rebuilt."""
    try:
        return rebuild_error(text)
    except UnserializableError as reason:
        try:
            kept = json.loads(text)
            stand_in = ActivityError(kept["type"].rpartition(".")[2], kept["message"])
            stand_in.__notes__ = kept["notes"]
        except (ValueError, LookupError, TypeError, AttributeError):
            return ActivityError("Error", str(reason))  # the row is damaged
        return stand_in


def rebuild_error(text: str) -> Exception:
    """Return the error that `pack_error` has written; its constructor is not run, and nothing is imported.

    Raises:
        UnserializableError: Its class is gone, or cannot be made so.
    """
    try:
        return _rebuilt(json.loads(text))
    except UnserializableError:
        raise
    except Exception as error:
        raise UnserializableError(
            f"a journaled error cannot be rebuilt ({type(error).__name__}: {error})"
        ) from error


def _rebuilt(kept: dict[str, Any]) -> Exception:
    cls = find_class(kept["type"])
    if not issubclass(cls, Exception):
        raise UnserializableError(f"{kept['type'].replace(':', '.')} is no longer an error.")
    members = [_rebuilt(member) for member in kept.get("members", ())]
    made_from = [decode(text) for text in kept["made_from"]]
    if members:
        made: Exception = cls.__new__(cls, *made_from, members)
        made.args = (*made_from, members)
    else:
        try:
            # What built-in errors keep outside their attributes (`OSError.errno`) is set here.
            made = cls.__new__(cls, *made_from)
        except TypeError:
            made = cls.__new__(cls)
        made.args = tuple(decode(text) for text in kept["args"])
    for name, text in kept["attributes"].items():
        vars(made)[name] = decode(text)
    return made


def message_of(text: str | None) -> str | None:
    """Return the message of a packed error, or a plain text as it is."""
    if text is None or not text.startswith("{"):
        return text
    try:
        kept = json.loads(text)
        name = kept["type"].rpartition(":")[2]
        return f"{name}: {kept['message']}" if kept["message"] else str(name)
    except (ValueError, LookupError, TypeError, AttributeError):
        return text  # the row is damaged
