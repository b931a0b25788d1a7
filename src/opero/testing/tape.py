# this_file: src/opero/testing/tape.py
"""What stands in a recording: one JSON object a line, readable where that can be.

    {"opero recording": 1}
    {"function": "shop:price", "call": "4f0c…", "result": {"EUR": 12.5}}
    {"function": "shop:price", "call": "93b1…", "error": {"type": "builtins:ConnectionError", …}}
    {"function": "shop:chart", "call": "07aa…", "encoded": "b3AB…"}
    {"function": "shop:open", "call": "cc02…", "missing": "its result (socket) cannot be pickled"}

What JSON cannot tell is encoded as a disk cache does it: arrays in MessagePack, other objects as a
pickle that is signed. Reading executes nothing but such pickles, and imports nothing: a file
is no reason to load a module.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from opero.caching.codec import Coder, Undecodable, Unencodable
from opero.durable.failures import pack_error, unpack_error
from opero.durable.values import decode, encode
from opero.errors import ActivityError, OperoUsageError, UnserializableError
from opero.testing.identity import Identity
from opero.utils.secrets import mask_url

__all__ = ["HEADER", "Outcome", "Untold", "read_tape", "write_line"]

HEADER: Final = '{"opero recording": 1}'

_HIDDEN: Final = "***"
_coder: Final = Coder("auto")


class Untold(Exception):  # noqa: N818 - a signal; what users see is a `NotRecordedError`
    """An outcome is in the recording, but cannot be told; the message says why."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one call.

    Attributes:
        kind: "result", "error", "encoded" or "missing".
        told: It, as it stands in the file.
        awaited: Whether a plain function returned an awaitable.
    """

    kind: str
    told: Any
    awaited: bool = False

    @staticmethod
    def of_value(value: object, secrets: Sequence[str], who: Identity) -> Outcome:
        """Return the outcome of a call that gave a value; one that is missing if that cannot be written."""
        try:
            return Outcome("result", _without(json.loads(encode(value)), secrets))
        except UnserializableError:
            pass
        try:
            data = b"".join(_coder.encode(value, _context(who)))
        except Unencodable as signal:
            return Outcome("missing", str(signal))
        if any(secret.encode("utf-8", "surrogatepass") in data for secret in secrets):
            kind = type(value).__qualname__
            return Outcome("missing", f"its result ({kind}) holds a secret argument")
        return Outcome("encoded", base64.b64encode(data).decode())

    @staticmethod
    def of_error(error: Exception, secrets: Sequence[str]) -> Outcome:
        """Return the outcome of a call that failed."""
        return Outcome("error", _without(json.loads(pack_error(error)), secrets, urls=True))

    def open(self, who: Identity) -> tuple[Any, Exception | None]:
        """Return the value anew, or the error.

        Raises:
            Untold: It cannot be told here; the message says why.
        """
        if self.kind == "missing":
            raise Untold(self.told)
        try:
            strange = sorted({name for name in _modules(self) if name not in sys.modules})
            if not strange:
                return self._read(who)
        except Untold:
            raise
        except Exception as error:
            why = f": {error}" if isinstance(error, Undecodable) else f" ({type(error).__name__})"
            raise Untold(f"it cannot be read{why}") from error
        raise Untold(f"it needs {', '.join(strange)}: import that before the replay")

    def _read(self, who: Identity) -> tuple[Any, Exception | None]:
        if self.kind == "error":
            return None, self._error()
        if self.kind == "result":
            return decode(json.dumps(self.told)), None
        return _coder.decode(base64.b64decode(self.told), _context(who)), None

    def _error(self) -> Exception:
        error = unpack_error(json.dumps(self.told))
        if isinstance(error, ActivityError) and not self.told["type"].endswith(":ActivityError"):
            raise Untold(f"its error ({error.type}) cannot be made again")
        return error


def write_line(who: Identity, outcome: Outcome) -> str:
    """Return the line for an outcome."""
    told = {"function": who.function, "call": who.call, outcome.kind: outcome.told}
    if outcome.awaited:
        told["awaited"] = True
    return json.dumps(told, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def _read_line(line: str) -> tuple[Identity, Outcome]:
    """Return what stands in a line.

    Raises:
        ValueError: It is no line of a recording.
    """
    told = json.loads(line)
    for kind in ("result", "error", "encoded", "missing"):
        if kind in told:
            who = Identity(str(told["function"]), str(told["call"]))
            return who, Outcome(kind, told[kind], bool(told.get("awaited")))
    raise ValueError("it tells no outcome")


def read_tape(text: str, name: str) -> dict[Identity, list[Outcome]]:
    """Return the outcomes of each call, in the order in which they were recorded.

    Raises:
        OperoUsageError: The text is no recording; the message names the file and the line.
    """
    first, _, rest = text.partition("\n")
    if first.strip() != HEADER:
        raise OperoUsageError(f"{name} is no recording of opero's: make one with record().")
    found: dict[Identity, list[Outcome]] = {}
    for number, line in enumerate(rest.split("\n"), 2):
        if line.strip():
            try:
                who, outcome = _read_line(line)
            except (KeyError, TypeError, ValueError) as error:
                raise OperoUsageError(f"{name}, line {number}, cannot be read: {error}.") from None
            found.setdefault(who, []).append(outcome)
    return found


def _context(who: Identity) -> bytes:
    return f"opero recording {who}".encode("utf-8", "surrogatepass")


def _without(told: Any, secrets: Sequence[str], *, urls: bool = False) -> Any:
    """Return JSON data with stars in place of secrets, and of the user-info in URLs if wanted."""
    if type(told) is str:
        for secret in secrets:
            told = told.replace(secret, _HIDDEN).replace(json.dumps(secret)[1:-1], _HIDDEN)
        return mask_url(told) if urls else told
    if type(told) is list:
        return [_without(item, secrets, urls=urls) for item in told]
    if type(told) is dict:
        return {
            _without(key, secrets, urls=urls): _without(value, secrets, urls=urls)
            for key, value in told.items()
        }
    return told


def _modules(outcome: Outcome) -> Iterator[str]:
    """Return the modules whose classes are named."""
    if outcome.kind == "result":
        yield from _modules_of(outcome.told)
    elif outcome.kind == "error":
        yield outcome.told["type"].partition(":")[0]
        told = outcome.told
        for text in (*told["made_from"], *told["args"], *told["attributes"].values()):
            yield from _modules_of(json.loads(text))


def _modules_of(told: Any) -> Iterator[str]:
    if type(told) is list:
        for item in told:
            yield from _modules_of(item)
    elif type(told) is dict:
        if "$" in told and "t" in told:
            yield told["t"].partition(":")[0]
        for value in told.values():
            yield from _modules_of(value)
