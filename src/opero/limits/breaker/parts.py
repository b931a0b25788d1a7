# this_file: src/opero/limits/breaker/parts.py
"""How many breakers of single values a shared one keeps, and which ones it forgets."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from opero.limits.breaker.shared import CircuitBreaker

__all__ = ["make_room"]

_MOST_PARTS: Final = 1000
"""Fallback values with a breaker of their own; beyond it those without failures are forgotten."""


def make_room(parts: dict[Hashable, CircuitBreaker]) -> None:
    """Forget parts if there are too many: those that know nothing, else the oldest one.

    Args:
        parts: Breakers by what tells their values apart, the oldest first.
    """
    if len(parts) < _MOST_PARTS:
        return
    for key, part in list(parts.items()):
        if part.standing is not None and part.standing.steady:
            del parts[key]
    if len(parts) >= _MOST_PARTS:
        del parts[next(iter(parts))]
