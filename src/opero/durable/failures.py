# this_file: src/opero/durable/failures.py
"""Errors in the journal: written so that the same type can be raised again, without running its code."""

from __future__ import annotations

import json
import sys
from typing import Any, Final

from opero.durable.values import decode, encode
from opero.errors import ActivityError, UnserializableError

__all__ = ["keepable", "message_of", "pack_error", "unpack_error"]

_LONGEST: Final = 10_000
"""Characters of a message or a note that are kept."""


def keepable(error: Exception) -> Exception:
    """Return the error if its type can be raised again, else an `ActivityError` that stands for it.

    It is asked in the first run too, so that the first run and every replay raise the same type.

    Example:
        >>> keepable(KeyError("x"))
        KeyError('x')
        >>> def local():
        ...     class Odd(Exception): pass
        ...     return Odd("here")
        >>> keepable(local())
        ActivityError('Odd', 'here')
    """
    if type(unpack_error(pack_error(error))) is type(error):
        return error
    stand_in = ActivityError(type(error).__name__, str(error)[:_LONGEST])
    stand_in.__cause__ = error
    return stand_in


def pack_error(error: Exception) -> str:
    """Return an error as JSON text: type, message, notes, and of its arguments and attributes what can be kept."""
    cls = type(error)
    kept = [_encoded(argument) for argument in error.args]
    # An argument that cannot be kept is replaced by the message: most are responses and requests.
    args = kept if None not in kept else [encode(str(error)[:_LONGEST])]
    attributes = {name: _encoded(value) for name, value in vars(error).items()}
    made_from = args
    if isinstance(error, OSError) and error.filename is not None and len(args) == 2:
        # It hides the names of files from its arguments.
        made_from = [*args, encode(str(error.filename))]
    return json.dumps(
        {
            "made_from": made_from,
            "type": f"{cls.__module__}:{cls.__qualname__}",
            "message": str(error)[:_LONGEST],
            "args": args,
            "attributes": {name: text for name, text in attributes.items() if text is not None},
            "notes": [str(note)[:_LONGEST] for note in getattr(error, "__notes__", ())],
        }
    )


def _encoded(value: object) -> str | None:
    try:
        return encode(value)
    except UnserializableError:
        return None


def unpack_error(text: str) -> Exception:
    """Return the error that `pack_error` has written; its constructor is not run.

    An `ActivityError` stands for one whose class is gone, or cannot be made so.
    """
    kept = json.loads(text)
    made = _made(_class_of(kept["type"]), kept)
    if made is None:
        made = ActivityError(kept["type"].rpartition(".")[2], kept["message"])
        made.__notes__ = kept["notes"]
    return made


def _made(cls: type[Exception] | None, kept: dict[str, Any]) -> Exception | None:
    if cls is None:
        return None
    try:
        args = tuple(decode(text) for text in kept["args"])
        try:
            # What built-in errors keep outside their attributes (`OSError.errno`) is set here.
            made = cls.__new__(cls, *(decode(text) for text in kept["made_from"]))
        except TypeError:
            made = cls.__new__(cls)
        made.args = args
        for name, text in kept["attributes"].items():
            vars(made)[name] = decode(text)
    except Exception:  # noqa: BLE001 - whatever its class does, the error itself is told
        return None
    return made


def message_of(text: str | None) -> str | None:
    """Return the message of a packed error, or a plain text as it is."""
    if text is None or not text.startswith("{"):
        return text
    kept = json.loads(text)
    name = kept["type"].rpartition(":")[2]
    return f"{name}: {kept['message']}" if kept["message"] else str(name)


def _class_of(name: str) -> type[Exception] | None:
    module, _, qualname = name.partition(":")
    if module not in sys.modules:
        import importlib

        try:
            importlib.import_module(module)
        except ImportError:
            return None
    found: Any = sys.modules[module]
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and issubclass(found, Exception) else None
