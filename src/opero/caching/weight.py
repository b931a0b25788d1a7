# this_file: src/opero/caching/weight.py
"""What a stored result weighs: an estimate that stays cheap however large the result is."""

from __future__ import annotations

from itertools import islice
from sys import getsizeof
from typing import Any, Final

__all__ = ["weigh"]

_BUDGET: Final = 1000
_SAMPLE: Final = 64
_DEPTH: Final = 20
_UNKNOWN: Final = 64


def weigh(value: Any) -> int:
    """Estimate the memory that a value takes, in bytes.

    At most a thousand objects are looked at: of a large container a sample stands for the rest.
    Arrays and data frames are asked for their own count. Objects that occur twice are counted
    twice.

    Args:
        value: Anything.

    Returns:
        Bytes, 1 or more.

    Example:
        >>> 1_000_000 < weigh([bytes(1000)] * 1000) < 1_100_000
        True
    """
    return max(1, int(_weigh(value, [_BUDGET], 0)))


def _weigh(value: Any, budget: list[int], depth: int) -> float:
    budget[0] -= 1
    kind = type(value)
    size: float = _own_size(value)
    if budget[0] < 0 or depth > _DEPTH or kind in (str, bytes, int, float, bool, type(None)):
        return size
    if isinstance(value, dict):
        pairs = list(islice(value.items(), _SAMPLE))
        parts = [part for pair in pairs for part in pair]
        share = len(value) / max(1, len(pairs))
    elif isinstance(value, list | tuple):
        parts = list(value[:: len(value) // _SAMPLE + 1])
        share = len(value) / max(1, len(parts))
    elif isinstance(value, set | frozenset):
        parts = list(islice(value, _SAMPLE))
        share = len(value) / max(1, len(parts))
    elif kind.__module__ == "builtins":
        return size
    else:
        size, parts, share = max(size, _told(value)), _state(value), 1
    return size + sum(_weigh(part, budget, depth + 1) for part in parts) * share


def _own_size(value: Any) -> int:
    try:
        return getsizeof(value)
    except Exception:  # noqa: BLE001 - a class may compute its size wrongly
        return _UNKNOWN


def _told(value: Any) -> int:
    """What arrays (`nbytes`) and data frames (`memory_usage`) say of themselves."""
    try:
        usage: Any = getattr(value, "memory_usage", None)
        if callable(usage):
            used: Any = usage(deep=True)
            return int(used.sum()) if hasattr(used, "sum") else int(used)
        told = getattr(value, "nbytes", 0)
        return told if isinstance(told, int) else 0
    except Exception:  # noqa: BLE001 - as above
        return 0


def _state(value: Any) -> list[Any]:
    """What an ordinary object holds in its dict and slots; arrays have told it already."""
    kind = type(value)
    if hasattr(kind, "nbytes") or hasattr(kind, "memory_usage"):
        return []
    held = list(getattr(value, "__dict__", {}).values())
    slots = getattr(kind, "__slots__", ())
    names = (slots,) if isinstance(slots, str) else slots
    return held + [getattr(value, name) for name in names if hasattr(value, name)]
