# this_file: src/opero/core/receipt.py
"""What users read of a function: what will happen to its calls, and what has happened to one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

__all__ = ["Explanation", "Receipt", "Source"]

T_co = TypeVar("T_co", covariant=True)
Source = Literal["fresh", "hit", "shared", "stale"]
"""Where a value came from: this call computed it, the cache had it, another caller was just computing it, or the cache
had it and it has expired, but computing it failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt(Generic[T_co]):
    """What `f.call(...)` returns: the value and how it came about.

    Attributes:
        value: The function's result.
        source: "fresh" (this call made it), "hit" (cache), "shared" (another caller was already computing it) or
            "stale" (expired, but computing it anew failed).
        attempts: Attempts made, 0 for a hit.
        calls: Real calls of the function, 0 for a hit.
        fallback: The fallback value that gave the result; None without `arg_fallback` or for a hit.
        label: How opero shows that value: itself, or `api_key[1]` if it is a secret.
        slept: Seconds of pauses between attempts.
        waited: Seconds in the rate limiter.
        seconds: Seconds from start to end.
        remaining: Seconds that were left of the deadline; None without one.
        rejected: Whether `retry_if_result` refused the value and all was spent.
        errors: The exceptions of the calls that failed on the way.
    """

    value: T_co
    source: Source = "fresh"
    attempts: int = 0
    calls: int = 0
    fallback: Any = None
    label: str | None = None
    slept: float = 0.0
    waited: float = 0.0
    seconds: float = 0.0
    remaining: float | None = None
    rejected: bool = False
    errors: tuple[Exception, ...] = ()

    def __repr__(self) -> str:
        parts: list[str] = [self.source]
        if self.attempts:
            parts.append(f"{self.attempts} attempt{'s' * (self.attempts != 1)}")
            parts.append(f"{self.calls} call{'s' * (self.calls != 1)}")
        if self.label is not None:
            parts.append(f"with {self.label}")
        if self.slept or self.waited:
            parts.append(f"{self.slept + self.waited:.3f} s of waiting")
        if self.rejected:
            parts.append("rejected")
        return f"<Receipt {type(self.value).__name__}: {', '.join(parts)} in {self.seconds:.3f} s>"


class Explanation(str):
    """Text that shows itself as it is in a REPL and a notebook."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
