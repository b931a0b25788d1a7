# this_file: src/opero/durable/values.py
"""Write values and errors as JSON that gives back the same value and type, and compare arguments by a digest.

Types that JSON does not have are written as `{"$": kind, "v": content}`. Reading executes nothing and
imports nothing: enums and dataclasses are found among the modules that the program has loaded, and
their fields are set without calling their code. Errors are made again without running their constructors.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import functools
import inspect
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterator
from hashlib import blake2b
from json.encoder import encode_basestring_ascii as _quoted
from types import NoneType
from typing import Any, Final

from opero.caching.keys import Unkeyable, digest
from opero.caching.plain_types import (
    BY_NAME,
    BY_NUMBER,
    NotPlain,
    Undecodable,
    find_class,
    make_instance,
    of_type,
    own_dict,
    refuse_alike,
)
from opero.errors import ActivityError, OperoUsageError, UnserializableError
from opero.utils.exceptions import LONGEST, new_error, set_directly, take_apart, text_of

_MAX_DEPTH: Final = 200
_SMALL: Final = 1 << 63
"""Integers beyond it are written in hexadecimal: Python limits the digits of decimal ones."""

_read_json: Final = json.JSONDecoder().raw_decode
"""A quarter of what `json.loads` costs for a number."""

_Pack = Callable[[Any], Any]
_custom: Final[dict[type, tuple[str, _Pack]]] = {}
_custom_readers: Final[dict[str, _Pack]] = {}


def encode(value: object, what: str = "value") -> str:
    """Return a value as JSON text.

    Args:
        value: None, bool, int, float (also NaN and infinite), str, bytes, list, tuple, set, frozenset, dict, date,
            time, datetime, timedelta, Decimal, UUID, Path, complex, range, enums, dataclasses, models of
            pydantic, named tuples, registered types; nested as you like.
        what: What it is, for the error ("result of charge()").

    Raises:
        UnserializableError: Some part is of another type; the message names it.

    Example:
        >>> encode({"a": (1, 2)})
        '{"a": {"$": "tuple", "v": [1, 2]}}'
    """
    return json.dumps(_pack(value, what, "", 0), ensure_ascii=True)


def decode(text: str) -> Any:
    """Return the value that `encode` has written.

    Raises:
        UnserializableError: It cannot be rebuilt: a type that it names is gone or has changed, or the
            text is damaged.

    Example:
        >>> decode(encode({"a": (1, 2)}))
        {'a': (1, 2)}
    """
    try:
        loaded, end = _read_json(text)
        if end != len(text):
            loaded = json.loads(text)
        return _unpack(loaded) if '"$"' in text else loaded
    except UnserializableError:
        raise
    except Exception as error:
        raise UnserializableError(
            f"a journaled value is damaged, or its type has changed ({type(error).__name__}: {error})"
        ) from error


def register_type(cls: type, to_plain: _Pack, from_plain: _Pack) -> None:
    """Let values of a class of yours be written to the journal.

    Args:
        cls: The class itself; subclasses are registered on their own.
        to_plain: Turns a value into one that the journal knows.
        from_plain: Turns that back.

    Example:
        >>> class Celsius:
        ...     def __init__(self, degrees):
        ...         self.degrees = degrees
        >>> register_type(Celsius, lambda value: value.degrees, Celsius)
        >>> decode(encode(Celsius(21.5))).degrees
        21.5
    """
    if not isinstance(cls, type):
        raise OperoUsageError(f"register_type({cls!r}): give a class.")
    name = f"{cls.__module__}:{cls.__qualname__}"
    _custom[cls] = (name, to_plain)
    _custom_readers[name] = from_plain


# --- writing ------------------------------------------------------------------------------------------------------


def _pack(value: Any, what: str, at: str, depth: int) -> Any:
    kind = type(value)
    if kind is str or kind is bool or value is None:
        return value
    if kind is int:
        return value if -_SMALL < value < _SMALL else {"$": "int", "v": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"$": "float", "v": repr(value)}
    if depth >= _MAX_DEPTH:
        raise UnserializableError(
            f"{what}{at}: nested deeper than {_MAX_DEPTH}, or contains itself."
        )
    deeper = depth + 1
    if kind is list:
        return [_pack(item, what, f"{at}[{i}]", deeper) for i, item in enumerate(value)]
    if kind is dict:
        if "$" not in value and all(type(key) is str for key in value):
            return {k: _pack(v, what, f"{at}[{k!r}]", deeper) for k, v in value.items()}
        pairs = [
            [_pack(k, what, f"{at} key", deeper), _pack(v, what, f"{at}[…]", deeper)]
            for k, v in value.items()
        ]
        return {"$": "dict", "v": pairs}
    if kind in _SEQUENCES:
        packed = [_pack(item, what, f"{at}[…]", deeper) for item in value]
        return {"$": _SEQUENCES[kind], "v": packed}
    if kind is bytes:
        return {"$": "bytes", "v": base64.b64encode(value).decode()}
    if kind in _custom:
        name, to_plain = _custom[kind]
        return {"$": "type", "t": name, "v": _pack(to_plain(value), what, at, deeper)}
    return _pack_named(value, what, at, deeper)


def _pack_named(value: Any, what: str, at: str, depth: int) -> Any:
    """Write a value whose type is found again by its name."""
    kind = type(value)
    if isinstance(value, pathlib.PurePath):
        pure = not isinstance(value, pathlib.Path)
        return {"$": kind.__name__ if pure else "Path", "v": str(value)}
    name = f"{kind.__module__}:{kind.__qualname__}"
    try:
        found = find_class(name) is kind
    except Undecodable:
        found = False
    if found and isinstance(value, enum.Enum):
        return {"$": "enum", "t": name, "v": _pack_enum(value, what, at, depth)}
    if found and dataclasses.is_dataclass(kind):
        fields = {
            f.name: _pack(getattr(value, f.name), what, f"{at}.{f.name}", depth)
            for f in dataclasses.fields(value)
            if hasattr(value, f.name)
        }
        for other in own_dict(value).keys() - fields.keys():
            if not isinstance(getattr(kind, other, None), functools.cached_property):
                raise UnserializableError(
                    f"{what}{at} is a {kind.__module__}.{kind.__qualname__} with the attribute {other!r} beside its "
                    "fields, which the journal cannot keep. Make it a field or a property."
                )
        return {"$": "data", "t": name, "v": fields}
    if found and isinstance(value, tuple) and hasattr(kind, "_fields"):
        packed = [_pack(item, what, f"{at}[{i}]", depth) for i, item in enumerate(value)]
        return {"$": "named", "t": name, "v": packed}
    row = of_type(kind)
    if row is not None and row.number is not None and row.split is not None:
        try:
            parts = [_pack(part, what, f"{at}[…]", depth + 1) for part in row.split(value)]
            return {"$": "plain", "t": row.name, "v": parts}
        except NotPlain:
            pass
    hint = (
        "" if found else f" {kind.__qualname__} cannot be found by its name in {kind.__module__}."
    )
    raise UnserializableError(
        f"{what}{at} is a {kind.__module__}.{kind.__qualname__}, which the journal cannot keep.{hint} "
        "Return plain data, a dataclass or an enum, or call opero.durable.register_type()."
    )


def _pack_enum(value: enum.Enum, what: str, at: str, depth: int) -> Any:
    """Write a member by its name; combined flags, which have none, by their value."""
    if type(value).__members__.get(value.name) is value:
        return value.name
    return {"value": _pack(value.value, what, at, depth)}


_SEQUENCES: Final[dict[type, str]] = {tuple: "tuple", set: "set", frozenset: "frozenset"}

# --- reading ------------------------------------------------------------------------------------------------------


def _unpack(plain: Any) -> Any:
    if type(plain) is list:
        return [_unpack(item) for item in plain]
    if type(plain) is not dict:
        return plain
    kind = plain.get("$")
    if kind is None:
        return {key: _unpack(value) for key, value in plain.items()}
    content = plain["v"]
    if kind in _READERS:
        return _READERS[kind](content)
    name = plain["t"]
    if kind == "type":
        if name not in _custom_readers:
            raise UnserializableError(
                f"{name.replace(':', '.')} is in the journal, but not registered in this program: "
                "call opero.durable.register_type() first."
            )
        return _custom_readers[name](_unpack(content))
    if kind == "plain":
        return _rebuild_plain(name, _unpack(content))
    cls = _find_class(name)
    if kind == "enum" and issubclass(cls, enum.Enum):
        return cls[content] if isinstance(content, str) else cls(_unpack(content["value"]))
    if kind == "named" and issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return _rebuild_named_tuple(cls, _unpack(content))
    if kind == "data" and dataclasses.is_dataclass(cls):
        fields = {field.name: field for field in dataclasses.fields(cls)}
        return make_instance(cls, {n: _unpack(value) for n, value in content.items()}, fields)
    raise UnserializableError(f"{name.replace(':', '.')} is no longer what the journal says.")


def _rebuild_plain(name: str, parts: list[Any]) -> Any:
    """Make a value of a type in the table of plain types from its parts."""
    # Some builtins have a number only.
    row = BY_NAME.get(name) or next((r for r in BY_NUMBER.values() if r.name == name), None)
    if row is None or row.join is None:
        raise Undecodable("it is no plain type of this version of opero")
    return row.join(parts)


def _rebuild_named_tuple(cls: Any, items: list[Any]) -> Any:
    """Make a named tuple; fields that were added at the end get their defaults."""
    missing = cls._fields[len(items) :]
    if len(items) > len(cls._fields) or any(name not in cls._field_defaults for name in missing):
        raise Undecodable(
            f"it has {len(items)} fields in the journal, and {len(cls._fields)} in its class"
        )
    return tuple.__new__(cls, (*items, *(cls._field_defaults[name] for name in missing)))


def _find_class(name: str) -> type:
    """Return the class of a name "module:Qualified.Name"; nothing is imported.

    Raises:
        UnserializableError: Its module is not loaded, or has no such class.
    """
    try:
        return find_class(name)
    except Undecodable as reason:
        raise UnserializableError(
            f"{name.replace(':', '.')} of a journaled value cannot be found: {reason}. Unless it is gone (renamed, "
            f"moved, removed), import the module {name.partition(':')[0]!r} before the Orchestrator is started."
        ) from reason


def _join_dict(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    refuse_alike([key for key, _ in pairs])
    return dict(pairs)


def _join_set(items: list[Any]) -> set[Any]:
    refuse_alike(items)
    return set(items)


_READERS: Final[dict[str, _Pack]] = {
    "int": lambda v: int(v, 16),
    "float": float,
    "dict": lambda v: _join_dict([(_unpack(key), _unpack(value)) for key, value in v]),
    "tuple": lambda v: tuple(_unpack(item) for item in v),
    "set": lambda v: _join_set([_unpack(item) for item in v]),
    "frozenset": lambda v: frozenset(_join_set([_unpack(item) for item in v])),
    "bytes": base64.b64decode,
    "Path": pathlib.Path,
    "PurePath": pathlib.PurePath,
    "PurePosixPath": pathlib.PurePosixPath,
    "PureWindowsPath": pathlib.PureWindowsPath,
}

# --- arguments ----------------------------------------------------------------------------------------------------


def _small(value: int) -> str:
    if not -_SMALL < value < _SMALL:
        raise LookupError
    return repr(value)


_PLAIN: Final[dict[type, Callable[[Any], str]]] = {
    int: _small,
    str: _quoted,
    bool: {True: "true", False: "false"}.__getitem__,
    NoneType: {None: "null"}.__getitem__,
}
"""Types whose values are compared as JSON, and what writes it."""
_VARIADIC: Final = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_DIGEST_SIZE: Final = 20
_MAX_DEFAULTS: Final = 8
"""Defaults that are tried as given and as left out when a digest differs: 2 to the power of it."""


class Parameters:
    """Bind the arguments of calls to one function's signature, and compare them by a digest.

    Args:
        signature: The function's.
        what: The function, for errors ("activity charge()").
    """

    __slots__ = ("_heads", "_least", "_names", "_signature", "_what")

    def __init__(self, signature: inspect.Signature, what: str) -> None:
        self._signature = signature
        self._what = what
        known = signature.parameters.values()
        plain = all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in known)
        self._names: tuple[str, ...] = tuple(signature.parameters) if plain else ()
        self._heads = {name: f"{_quoted(name)}:" for name in signature.parameters}
        # Without names no call has this few arguments, and each is bound by the signature.
        self._least = sum(p.default is inspect.Parameter.empty for p in known) if plain else 1

    def digest(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Return the digest of a call's arguments as they are given, by name and without defaults.

        So a new optional parameter changes nothing for the calls that are recorded.

        Raises:
            TypeError: They do not fit.
            UnserializableError: One has no content.
        """
        if not kwargs and self._least <= len(args) <= len(self._names):
            given = dict(zip(self._names, args, strict=False))
        else:
            given = self._signature.bind(*args, **kwargs).arguments
        return self._digest(given)

    def matches(self, recorded: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a recorded digest is that of the same call, with some defaults spelled out or left out.

        For calls whose own digest differs; raises as `digest` does.
        """
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        parameters = self._signature.parameters
        # `*args` and `**kwargs` without content are never recorded.
        given = {
            n: v for n, v in bound.arguments.items() if v or parameters[n].kind not in _VARIADIC
        }
        optional = [n for n, v in given.items() if _same(v, parameters[n].default)][:_MAX_DEFAULTS]
        return any(
            self._digest({n: v for n, v in given.items() if n not in left_out}) == recorded
            for left_out in _subsets(optional)
        )

    def _digest(self, given: dict[str, Any]) -> str:
        try:
            # Most arguments are such; JSON keeps their types apart, and costs a tenth.
            heads = self._heads
            content = [heads[n] + _PLAIN[type(v)](v) for n, v in given.items()]
        except LookupError:
            pass
        else:
            text = f"{{{','.join(content)}}}"
            return blake2b(text.encode(), digest_size=_DIGEST_SIZE).hexdigest()
        try:
            return digest(tuple(given.items())).hex()
        except Unkeyable as error:
            raise UnserializableError(
                f"{self._what} was called with something that has no content to compare on replay: {error}"
            ) from error


def _subsets(names: list[str]) -> Iterator[tuple[str, ...]]:
    return itertools.chain.from_iterable(
        itertools.combinations(names, size) for size in range(len(names) + 1)
    )


def _same(value: object, default: object) -> bool:
    if value is default:
        return True
    try:
        return type(value) is type(default) and digest((value,)) == digest((default,))
    except Unkeyable:
        return False


# --- errors -------------------------------------------------------------------------------------------------------

_LONGEST_CHAIN: Final = 8
"""Errors behind an error that are kept."""


def keepable(error: BaseException, *, chain: bool = True) -> Any:
    """Return the error if a replay can raise it alike, else an error that stands for it.

    Called in the first run too, so that the first run and every replay raise the same type with the
    same message, and the same errors behind it. For an error that cannot be rebuilt, an `ActivityError`;
    for a group, one whose members can be.

    Args:
        error: The error.
        chain: Whether the errors behind it are replaced too, where they cannot be rebuilt.

    Example:
        >>> keepable(KeyError("x"))
        KeyError('x')
        >>> def local():
        ...     class Odd(Exception): pass
        ...     return Odd("here")
        >>> keepable(local())
        ActivityError('Odd', 'here')
    """
    made = error
    if isinstance(error, ExceptionGroup):
        kept = [keepable(member, chain=chain) for member in error.exceptions]
        if any(new is not old for new, old in zip(kept, error.exceptions, strict=True)):
            made = error.derive(kept)
            made.__notes__ = list(getattr(error, "__notes__", ()))
    if not _survives(made):
        made = ActivityError(type(error).__name__, text_of(error))
    before = made
    for link, behind in _chain(error) if chain else ():
        one = keepable(behind, chain=False)
        name = "__cause__" if type(before) is ActivityError else link
        if getattr(before, name) is not one:
            set_directly(before, name, one)
        before = one
    return made if made is error else made.with_traceback(error.__traceback__)


def _chain(error: BaseException) -> list[tuple[str, BaseException]]:
    """Return the errors behind an error, as tracebacks show them, each with the attribute that leads to it."""
    found: list[tuple[str, BaseException]] = []
    while len(found) < _LONGEST_CHAIN:
        name, behind = "__cause__", error.__cause__
        # The context of a stand-in is what it stands for.
        if behind is None and not (error.__suppress_context__ or type(error) is ActivityError):
            name, behind = "__context__", error.__context__
        if behind is None:
            break
        found.append((name, behind))
        error = behind
    return found


def _survives(error: BaseException) -> bool:
    """Return whether an error is rebuilt with its type and message."""
    try:
        rebuilt = _rebuilt(json.loads(json.dumps(_packed(error, chain=False))), BaseException)
        return type(rebuilt) is type(error) and str(rebuilt)[:LONGEST] == str(error)[:LONGEST]
    except Exception:  # noqa: BLE001 - whatever the class does, the error itself is reported
        return False


def pack_error(error: Exception) -> str:
    """Return an error as JSON text: type, message, notes, and of its arguments and attributes what can be kept.

    The same of the errors behind it.
    """
    return json.dumps(_packed(error))


def _packed(error: BaseException, *, chain: bool = True) -> dict[str, Any]:
    cls, message = type(error), text_of(error)
    args, attributes = take_apart(error, encode)
    if isinstance(error, AttributeError):
        attributes.pop("obj", None)  # an object of the program's, which pickles leave out too
    packed: dict[str, Any] = {
        "type": f"{cls.__module__}:{cls.__qualname__}",
        "message": message,
        # An argument that cannot be kept is replaced by the message: most are responses and requests.
        "args": [encode(message)] if None in args else args,
        "attributes": attributes,
        "notes": [text_of(note) for note in getattr(error, "__notes__", ())],
        "behind": [(n, _packed(one, chain=False)) for n, one in (_chain(error) if chain else ())],
    }
    if isinstance(error, ExceptionGroup):
        packed["members"] = [_packed(member, chain=chain) for member in error.exceptions]
    return packed


def unpack_error(text: str) -> Exception:
    """Return the error that `pack_error` has written; an `ActivityError` where it cannot be rebuilt."""
    try:
        return rebuild_error(text)
    except UnserializableError as reason:
        try:
            return _stand_in(json.loads(text))
        except (ValueError, LookupError, TypeError, AttributeError):
            return ActivityError("Error", str(reason))  # the row is damaged


def _stand_in(kept: dict[str, Any]) -> ActivityError:
    stand_in = ActivityError(kept["type"].rpartition(".")[2], kept["message"])
    stand_in.__notes__ = kept["notes"]
    return stand_in


def rebuild_error(text: str) -> Exception:
    """Return the error that `pack_error` has written; its constructor is not run, and nothing is imported.

    Raises:
        UnserializableError: Its class is gone, or cannot be made so.
    """
    try:
        rebuilt: Exception = _rebuilt(json.loads(text))
    except UnserializableError:
        raise
    except Exception as error:
        raise UnserializableError(
            f"a journaled error cannot be rebuilt ({type(error).__name__}: {error})"
        ) from error
    return rebuilt


def _rebuilt(kept: dict[str, Any], base: type[BaseException] = Exception) -> Any:
    cls = _find_class(kept["type"])
    if not issubclass(cls, base):
        raise UnserializableError(f"{kept['type'].replace(':', '.')} is no longer an error.")
    members = [_rebuilt(member) for member in kept.get("members", ())]
    made = new_error(cls, kept["args"], kept["attributes"], decode, members=members)
    before = made
    for name, packed in kept.get("behind", ()):
        try:
            behind: BaseException = _rebuilt(packed, BaseException)
        except Exception:  # noqa: BLE001 - it must not cost the error before it
            behind = _stand_in(packed)
        set_directly(before, name, behind)
        before = behind
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
