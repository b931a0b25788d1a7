# this_file: src/opero/utils/secrets.py
"""What opero may show of a value: secrets become `api_key[0]`, user-info leaves URLs."""

from __future__ import annotations

import re
from collections.abc import Collection

__all__ = ["looks_secret", "mask_url", "show_value"]

_SECRET_WORDS = frozenset(
    {
        "key",
        "token",
        "secret",
        "password",
        "passwd",
        "pwd",
        "passphrase",
        "auth",
        "authorization",
        "credential",
        "cookie",
        "dsn",
        "apikey",
    }
)
_COUNTING_WORDS = frozenset(
    {"max", "min", "num", "n", "count", "total", "prompt", "completion", "input", "output"}
)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_USERINFO = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s]*@")
_LONGEST = 60


def looks_secret(name: str, declared: Collection[str] = ()) -> bool:
    """Tell whether a parameter's values must not be shown.

    Args:
        name: The parameter.
        declared: Names that the user declared secret.

    Example:
        >>> looks_secret("api_key"), looks_secret("accessTokens")
        (True, True)
        >>> looks_secret("max_tokens"), looks_secret("author")
        (False, False)
    """
    if name in declared:
        return True
    words = [word.lower() for word in _WORD.findall(name)]
    for place, word in enumerate(words):
        if word in _SECRET_WORDS:
            return True
        counted = place > 0 and words[place - 1] in _COUNTING_WORDS
        if word.endswith("s") and word[:-1] in _SECRET_WORDS and not counted:
            return True
    return False


def mask_url(text: str) -> str:
    """Take the user-info out of every URL in a text.

    Example:
        >>> mask_url("postgres://me:hunter2@db/x")
        'postgres://***@db/x'
    """
    return _USERINFO.sub(r"\g<scheme>***@", text)


def show_value(name: str, index: int, value: object, *, secret: bool) -> str:
    """Return the label of a fallback value: `model='gpt-4'`, or `api_key[1]` where it is secret.

    Only plain scalars are shown; of anything else the type's name, since a `repr` may hold
    anything.
    """
    if secret:
        return f"{name}[{index}]"
    if not isinstance(value, str | int | float | bool | None):
        return f"{name}[{index}]: {type(value).__name__}"
    shown = mask_url(repr(value)) if isinstance(value, str) else f"{value!r}"
    return f"{name}={shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + '…'}"
