# this_file: src/opero/testing/tape.py
"""Read and write recordings: one JSON object a line, readable where that is possible.

    {"opero recording": 1}
    {"function": "shop:price", "call": "4f0c…", "result": {"EUR": 12.5}}
    {"function": "shop:price", "call": "93b1…", "error": {"type": "builtins:ConnectionError", …}}
    {"function": "shop:chart", "call": "07aa…", "encoded": "b3AB…"}
    {"function": "shop:ask", "call": "1be8…", "stream": [{"result": "Hel"}, {"result": "lo"}, {"result": null}]}
    {"function": "shop:open", "call": "cc02…", "missing": "its result (socket) cannot be pickled"}

A call is identified by its function and a digest of its arguments. A recording is made on one machine, perhaps
with a real client and a real password, and replayed on another one without: secrets and arguments without content
are no part of the digest, and secrets are not written.

A value that JSON cannot express is encoded as a disk cache does it: arrays in MessagePack, other objects as a
signed pickle. Reading executes nothing but such pickles, and imports nothing.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import WeakKeyDictionary

from opero.caching.codec import Coder
from opero.caching.keys import Unkeyable, digest
from opero.caching.keys.function_keys import bound_to
from opero.caching.plain_types import Undecodable, Unencodable, field_names
from opero.durable.values import decode, encode, pack_error, rebuild_error
from opero.errors import OperoUsageError, UnkeyableError, UnserializableError
from opero.utils.secrets import hide, looks_secret, mask_text

if TYPE_CHECKING:
    from opero.core.call import Call
    from opero.core.function import FunctionInfo
    from opero.core.options import Options


# --- which call -------------------------------------------------------------------------------------------------------


class CallIdentity(NamedTuple):
    """The name of a call.

    Attributes:
        function: Module and qualified name, and what distinguishes two functions of one name.
        call: Digest of the arguments.
    """

    function: str
    call: str

    def __str__(self) -> str:
        return f"{self.function} {self.call}"


def _function_name(info: FunctionInfo) -> str:
    """Return the name of a function, with a digest of what it is bound to or closes over, if anything."""
    # Computed once, because what it closes over may change.
    with suppress(TypeError):  # an object without a hash
        known = _names.get(info.fn)
        if known is not None:
            return known
    name = f"{info.module}:{info.qualname}"
    bound = list(_digests(_bound_names(info.fn)))
    if bound:
        name = f"{name}#{digest(bound).hex()[:_SHORT]}"
    with suppress(TypeError):  # one that cannot be referred to weakly
        _names[info.fn] = name
    return name


_names: Final[WeakKeyDictionary[Any, str]] = WeakKeyDictionary()


def identify(info: FunctionInfo, options: Options, call: Call) -> CallIdentity | None:
    """Return the name of a call; None if its arguments do not fit the function.

    Args:
        info: The function.
        options: Its `cache_key`, or `cache_ignore` and `secret`.
        call: The call.

    Raises:
        UnkeyableError: `cache_key` returns something without content.
    """
    arguments = _arguments(info, call)
    if arguments is None:
        return None
    function = _function_name(info)
    if options.cache_key is not None:
        made = options.cache_key(*call.args, **call.kwargs)
        try:
            return CallIdentity(function, digest(made).hex()[:_LENGTH])
        except Unkeyable as signal:
            raise UnkeyableError(
                f"{info.name}() cannot be recorded: what cache_key returns must have content: {signal}."
            ) from None
    left_out, secret = frozenset(options.cache_ignore), frozenset(options.secret)
    kept = (
        (name, value)
        for name, value in arguments
        if name not in left_out and not looks_secret(name, secret)
    )
    return CallIdentity(function, digest(list(_digests(kept))).hex()[:_LENGTH])


def secrets_of(info: FunctionInfo, options: Options, call: Call) -> list[str]:
    """Return the texts among the arguments that must not be written: those of secret parameters, also as bytes."""
    secret = frozenset(options.secret)
    return [
        text
        for name, value in _arguments(info, call) or ()
        if looks_secret(name, secret)
        for text in _texts(value, _DEEPEST)
        if len(text) >= _SHORTEST_SECRET
    ]


def _texts(value: Any, depth: int) -> Iterator[str]:
    """Yield the texts that a secret argument holds, in containers, declared fields and wrappers such as `SecretStr`."""
    if isinstance(value, str | bytes | bytearray):
        yield value if isinstance(value, str) else value.decode("utf-8", "replace")
    elif depth:
        names = field_names(type(value)) or ()
        parts: Iterable[Any] = [getattr(value, name, None) for name in names]
        if isinstance(value, list | tuple | set | frozenset | dict):
            parts = value.values() if isinstance(value, dict) else value
        elif hasattr(value, "get_secret_value"):
            parts = [value.get_secret_value()]
        for part in parts:
            yield from _texts(part, depth - 1)


_DEEPEST: Final = 8
_SHORT: Final = 12
_LENGTH: Final = 24
"""Digits of a digest, four bits each: enough for one file."""

_SHORTEST_SECRET: Final = 4
"""Shorter texts are parts of other texts, so that they can not be hidden."""


def _arguments(info: FunctionInfo, call: Call) -> list[tuple[str, Any]] | None:
    """Return names and values of a call's arguments, defaults filled in and `**kwargs` one by one."""
    try:
        bound = info.declared.bind(*call.args, **call.kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    found: list[tuple[str, Any]] = []
    for name, value in bound.arguments.items():
        if info.declared.parameters[name].kind is info.declared.parameters[name].VAR_KEYWORD:
            found += sorted(value.items())
        else:
            found.append((name, value))
    return found


def _digests(named: Any) -> Iterator[tuple[str, bytes]]:
    """Return digests of the values that have content."""
    for name, value in named:
        try:
            yield name, digest(value)
        except Unkeyable:
            continue


def _bound_names(fn: Any) -> Iterator[tuple[str, Any]]:
    """Return names and values of what a function is bound to, one by one: some of them may have no content."""
    for bound in bound_to(fn):
        if type(bound) is tuple:
            args, keywords = bound
            yield "", args
            yield from sorted(keywords.items())
        elif type(bound) is dict:
            yield from sorted(bound.items())
        else:
            yield "self", bound


# --- what it returned or raised ---------------------------------------------------------------------------------------

HEADER: Final = '{"opero recording": 1}'

_KINDS: Final = ("result", "error", "encoded", "missing", "stream")
_coder: Final = Coder("auto")


class Unreadable(Exception):  # noqa: N818 - a signal; users get a `NotRecordedError`
    """An outcome is in the recording, but cannot be restored; the message says why."""


class _HoldsSecret(Exception):  # noqa: N818 - a signal
    """Bytes in a result hold a secret: to replace it would damage them."""


@dataclass(frozen=True, slots=True)
class RecordedOutcome:
    """Outcome of one call.

    Attributes:
        kind: One of `_KINDS`.
        data: It, in the form of the file; of a "stream" those of its items and of its end, as `{kind: data}` each.
        awaited: Whether a plain function returned an awaitable.
    """

    kind: str
    data: Any
    awaited: bool = False

    @property
    def parts(self) -> list[RecordedOutcome]:
        """The outcomes that a stream consists of: its items, then its end."""
        return [RecordedOutcome(*found) for part in self.data for found in part.items()]

    @staticmethod
    def of_stream(parts: Iterable[RecordedOutcome]) -> RecordedOutcome:
        """Return the outcome of a call of a generator."""
        return RecordedOutcome("stream", [{part.kind: part.data} for part in parts])

    @staticmethod
    def of_value(value: object, secrets: Sequence[str], identity: CallIdentity) -> RecordedOutcome:
        """Return the outcome of a call that returned; a "missing" one if the value cannot be written."""
        try:
            return RecordedOutcome("result", _without(json.loads(encode(value)), secrets))
        except _HoldsSecret:
            return RecordedOutcome("missing", "its result holds a secret argument as bytes")
        except UnserializableError:
            pass
        try:
            data = b"".join(_coder.encode(value, _context(identity)))
        except Unencodable as signal:
            return RecordedOutcome("missing", str(signal))
        kind, text = type(value).__qualname__, repr(data)
        if hide(text, secrets) != text:
            return RecordedOutcome("missing", f"its result ({kind}) holds a secret argument")
        return RecordedOutcome("encoded", base64.b64encode(data).decode())

    @staticmethod
    def of_error(error: Exception, secrets: Sequence[str]) -> RecordedOutcome:
        """Return the outcome of a call that failed."""
        try:
            data = _without(json.loads(pack_error(error)), secrets, mask=True)
        except _HoldsSecret:
            return RecordedOutcome("missing", "its error holds a secret argument as bytes")
        return RecordedOutcome("error", data)

    def open(self, identity: CallIdentity) -> tuple[Any, Exception | None]:
        """Return the value anew, or the error.

        Raises:
            Unreadable: It cannot be restored here; the message says why.
        """
        if self.kind in ("missing", "stream"):
            raise Unreadable(self.data if self.kind == "missing" else "it is a stream")
        try:
            return self._read(identity)
        except UnserializableError as error:
            # It names the class, and speaks of a journal.
            raise Unreadable(f"it cannot be read: {error.__cause__ or error}") from error
        except Exception as error:
            why = f": {error}" if isinstance(error, Undecodable) else f" ({type(error).__name__})"
            raise Unreadable(f"it cannot be read{why}") from error

    def _read(self, identity: CallIdentity) -> tuple[Any, Exception | None]:
        if self.kind == "error":
            return None, rebuild_error(json.dumps(self.data))
        if self.kind == "result":
            return decode(json.dumps(self.data)), None
        return _coder.decode(base64.b64decode(self.data), _context(identity)), None


def write_line(identity: CallIdentity, outcome: RecordedOutcome) -> str:
    """Return the line for an outcome."""
    data = {"function": identity.function, "call": identity.call, outcome.kind: outcome.data}
    if outcome.awaited:
        data["awaited"] = True
    return json.dumps(data, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def _read_line(line: str) -> tuple[CallIdentity, RecordedOutcome]:
    """Return what stands in a line.

    Raises:
        ValueError: It is no line of a recording.
    """
    data = json.loads(line)
    identity = CallIdentity(str(data["function"]), str(data["call"]))
    kind = _kind(data)
    if kind == "stream" and not (data[kind] and all(_kind(part) for part in data[kind])):
        raise ValueError("it holds a stream without an end")
    return identity, RecordedOutcome(kind, data[kind], bool(data.get("awaited")))


def _kind(data: dict[str, Any]) -> str:
    kind = next((kind for kind in _KINDS if kind in data), None)
    if kind is None:
        raise ValueError("it holds no outcome")
    return kind


def read_tape(content: bytes, name: str) -> dict[CallIdentity, list[RecordedOutcome]]:
    """Return the outcomes of each call, in the order in which they were recorded.

    Raises:
        OperoUsageError: The content is no recording; the message names the file and the line.
    """
    first, _, remainder = content.partition(b"\n")
    if first.strip() != HEADER.encode():
        raise OperoUsageError(f"{name} is no recording of opero's: make one with record().")
    found: dict[CallIdentity, list[RecordedOutcome]] = {}
    for number, line in enumerate(remainder.split(b"\n"), 2):
        if line.strip():
            try:
                identity, outcome = _read_line(line.decode())
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                raise OperoUsageError(f"{name}, line {number}, cannot be read: {error}.") from None
            found.setdefault(identity, []).append(outcome)
    return found


def _context(identity: CallIdentity) -> bytes:
    return f"opero recording {identity}".encode("utf-8", "surrogatepass")


def _without(data: Any, secrets: Sequence[str], *, mask: bool = False) -> Any:
    """Return JSON data without secrets, and with masked URLs and fields if wanted.

    Raises:
        _HoldsSecret: Encoded bytes hold one.
    """
    if type(data) is str:
        inner = _json_of(data) if mask else None
        if inner is not None:
            # Arguments of an error are JSON within JSON.
            return json.dumps(_without(inner, secrets, mask=mask), ensure_ascii=False)
        hidden = hide(data, secrets)
        return mask_text(hidden) if mask else hidden
    if type(data) is list:
        return [_without(item, secrets, mask=mask) for item in data]
    if type(data) is dict:
        if data.get("$") == "bytes" and _hides_bytes(data, secrets):
            raise _HoldsSecret
        return {
            _without(key, secrets, mask=mask): _without(value, secrets, mask=mask)
            for key, value in data.items()
        }
    return data


def _json_of(text: str) -> Any:
    """Return the list or dict that a text encodes; None if it is any other text."""
    if text[:1] not in ("[", "{"):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return None


def _hides_bytes(node: dict[str, Any], secrets: Sequence[str]) -> bool:
    try:
        text = repr(base64.b64decode(node.get("v", "")))
    except (TypeError, ValueError):
        return False
    return hide(text, secrets) != text
