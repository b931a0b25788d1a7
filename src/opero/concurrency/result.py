# this_file: src/opero/concurrency/result.py
"""Report what a map has done: results, failures, and whether it ran to its end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from opero.utils.secrets import mask_text
from opero.utils.units import format_seconds

R_co = TypeVar("R_co", covariant=True)

Status = Literal["complete", "stopped", "cancelled"]
"""All items were run; the map stopped (`max_errors`, `stop_on`, the input raised); it was asked to (`stop_token`)."""

_SHOWN = 5
"""Failures that a `repr` names."""


@dataclass(frozen=True, slots=True)
class ItemResult:
    """One finished item, as `on_result` gets it.

    Attributes:
        index: Its place in the input.
        item: The item.
        value: Its result, None if it failed.
        error: Why it failed, None if it did not.
        attempts: Attempts made; 0 if nothing was called for it.
        origin: "fresh", "hit" (cache), "shared" (equal to another item), "stale" (expired in the cache, but it
            failed) or "resumed" (checkpoint).
    """

    index: int
    item: Any
    value: Any
    error: BaseException | None
    attempts: int
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class MapFailure:
    """One item that failed.

    Attributes:
        index: Its place in the input.
        item: The item.
        error: The error of its last call.
        attempts: Attempts made.
        trace: The traceback in the worker process, None where the error has it itself.
    """

    index: int
    item: Any
    error: BaseException
    attempts: int
    trace: str | None = None

    def __repr__(self) -> str:
        error = mask_text(repr(self.error))
        return f"MapFailure(index={self.index}, error={error}, attempts={self.attempts})"

    def __str__(self) -> str:
        text = mask_text(str(self.error).partition("\n")[0])
        kind = type(self.error).__name__
        return f"item {self.index}: {kind}{f': {text}' if text else ''}"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class MapResult(Generic[R_co]):
    """What a map has done.

    Attributes:
        values: Results of the items that succeeded, in the order of the input (of completion with
            `ordered=False`).
        indices: For each of them, the item's place in the input.
        failures: Items that failed, by index.
        status: "complete" if every item was run, "stopped" after too many failures, an error of `stop_on`
            or an error of the input, "cancelled" by the stop token.
        reason: Why it did not run to its end; None if it did.
        total: Items of the input; None if it was not read to its end.
        hits: Items found in the cache.
        shared: Items whose result was computed for an equal item or by another caller.
        stale: Items that failed and got the expired result that the cache had.
        resumed: Items found in the checkpoint.
        seconds: From start to end.
        busy: Seconds of work in all workers together.
        input_error: What the input has raised; None if it has not.

    Example:
        >>> from opero import operomap
        >>> @operomap(mode="thread", retries=0)
        ... def invert(x):
        ...     return 1 / x
        >>> result = invert.map([1, 2, 0, 4])
        >>> result.values, result.failures[0].index
        ([1.0, 0.5, 0.25], 2)
    """

    values: list[R_co]
    indices: list[int]
    failures: list[MapFailure]
    status: Status = "complete"
    reason: str | None = None
    total: int | None = None
    hits: int = 0
    shared: int = 0
    stale: int = 0
    resumed: int = 0
    seconds: float = 0.0
    busy: float = 0.0
    input_error: Exception | None = None

    @property
    def done(self) -> int:
        """Items that have ended, in whatever way."""
        return len(self.values) + len(self.failures)

    @property
    def ok(self) -> bool:
        """Whether every item was run and none failed."""
        return self.status == "complete" and not self.failures

    def by_index(self) -> dict[int, R_co]:
        """Return the results by the items' places in the input."""
        return dict(zip(self.indices, self.values, strict=True))

    def raise_on_failure(self) -> None:
        """Raise what went wrong, if anything did.

        Raises:
            ExceptionGroup: The errors of all items that failed.
            MapStopped: No item failed, but the map did not run to its end; its cause is the input's own error
                where there is one.
        """
        if self.failures:
            errors = [failure.error for failure in self.failures]
            raise BaseExceptionGroup(f"{len(errors)} of {self._of()} items failed", errors)
        if self.status != "complete":
            from opero.errors import MapStopped

            raise MapStopped(self.reason or self.status, self) from self.input_error

    def _of(self) -> str:
        return f"{self.done if self.total is None else self.total:,}"

    def _facts(self) -> Iterator[str]:
        yield f"{len(self.values):,} of {self._of()} done"
        for count, name in (
            (len(self.failures), "failed"),
            (self.hits, "cached"),
            (self.shared, "shared"),
            (self.stale, "stale"),
            (self.resumed, "resumed"),
        ):
            if count:
                yield f"{count:,} {name}"
        yield f"in {format_seconds(round(self.seconds, 3))}"

    def __repr__(self) -> str:
        head = f"<MapResult {self.status}: {', '.join(self._facts())}"
        if self.reason is not None:
            head += f"; {self.reason}"
        if not self.failures:
            return head + ">"
        lines = [head] + [f"  {failure}" for failure in self.failures[:_SHOWN]]
        if len(self.failures) > _SHOWN:
            lines.append(f"  … and {len(self.failures) - _SHOWN:,} more")
        return "\n".join(lines) + ">"

    def _repr_html_(self) -> str:
        """Show it in a notebook: one line, and a table of the first failures."""
        import html

        text = html.escape(f"{self.status}: {', '.join(self._facts())}")
        if self.reason is not None:
            text += f"; {html.escape(self.reason)}"
        rows = "".join(
            f"<tr><td>{f.index}</td><td>{html.escape(type(f.error).__name__)}</td>"
            f"<td>{html.escape(mask_text(str(f.error).partition(chr(10))[0]))}</td><td>{f.attempts}</td></tr>"
            for f in self.failures[: 2 * _SHOWN]
        )
        head = "<tr><th>item</th><th>error</th><th></th><th>attempts</th></tr>"
        return f"<div><b>MapResult</b> {text}{f'<table>{head}{rows}</table>' if rows else ''}</div>"
