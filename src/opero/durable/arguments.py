# this_file: src/opero/durable/arguments.py
"""What tells two calls of one function apart: a digest of the arguments as they were given."""

from __future__ import annotations

import inspect
import json
from hashlib import blake2b
from types import NoneType
from typing import Any, Final

from opero.caching.keys import Unkeyable, digest
from opero.errors import UnserializableError

__all__ = ["Parameters", "digest_of"]

_PLAIN: Final = frozenset({int, str, bool, NoneType})
_SIZE: Final = 20
_SMALL: Final = 1 << 63
"""Python limits the digits of larger integers in decimal."""
_encode: Final = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


class Parameters:
    """Gives the arguments of a call their names.

    Args:
        signature: The function's.
    """

    __slots__ = ("_least", "_names", "_signature")

    def __init__(self, signature: inspect.Signature) -> None:
        self._signature = signature
        known = signature.parameters.values()
        plain = all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in known)
        self._names: tuple[str, ...] = tuple(signature.parameters) if plain else ()
        # Without names no call has this few arguments, and each is bound the long way.
        self._least = sum(p.default is inspect.Parameter.empty for p in known) if plain else 1

    def name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments that are given by name.

        Raises:
            TypeError: They do not fit.
        """
        if not kwargs and self._least <= len(args) <= len(self._names):
            return dict(zip(self._names, args, strict=False))
        return self._signature.bind(*args, **kwargs).arguments


def digest_of(
    parameters: Parameters, args: tuple[Any, ...], kwargs: dict[str, Any], what: str
) -> str:
    """Return the digest of a call's arguments as they are given, by name and without defaults.

    So a new optional parameter changes nothing for the calls that are recorded.

    Args:
        parameters: The function's.
        args: The call's.
        kwargs: The call's.
        what: The function, for the error.

    Raises:
        TypeError: They do not fit.
        UnserializableError: One has no content.
    """
    given = parameters.name(args, kwargs)
    for value in given.values():
        if type(value) not in _PLAIN or (type(value) is int and not -_SMALL < value < _SMALL):
            break
    else:
        # Most arguments are such; JSON keeps their types apart, and costs a tenth.
        return blake2b(_encode(given).encode(), digest_size=_SIZE).hexdigest()
    try:
        return digest(tuple(given.items())).hex()
    except Unkeyable as error:
        raise UnserializableError(
            f"{what} was called with something that has no content to compare on replay: {error}"
        ) from error
