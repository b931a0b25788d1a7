# this_file: src/opero/concurrency/report.py
"""Report what a map does (to `on_result`, to listeners, in a progress bar), and what it has done: results and failures.

The bar is tqdm's, or rich's if asked; there is none without a terminal or notebook. Maps that run at the same time
share the screen: each bar has a line of its own, and one that ends is written once above those that go on.
"""

from __future__ import annotations

import contextvars
import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, Literal, TypeVar

from opero import events
from opero.concurrency.executors.base import worker_process
from opero.events.bus import Emitter
from opero.utils import ambient
from opero.utils.secrets import mask_text
from opero.utils.units import format_seconds

if TYPE_CHECKING:
    from opero.concurrency.executors.base import Batch


R_co = TypeVar("R_co", covariant=True)

Status = Literal["complete", "stopped", "cancelled"]
"""All items were run; the map stopped (`max_errors`, `stop_on`, the input raised, no worker is left); it was asked to
(`stop_token`)."""

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


# --- while it runs --------------------------------------------------------------------------------

_REFRESH: Final = 0.1
"""Seconds between two pictures of the bar, and between two events, while items end."""
_IDLE: Final = 0.5
"""Seconds between two pictures while none ends."""
_LONG: Final = 60.0
"""Seconds of standing still after which a map says so."""


@dataclass(eq=False)
class Progress:
    """Takes each finished item once.

    Args:
        emitter: The function's.
        total: Items of the input, None if that is unknown.
        on_result: Called with each item, in the thread of the map.
        bar: The progress bar, None for none.
        keeps: Whether failures are kept for a result; a stream hands them out instead.
        waits_for: Returns what calls wait for now, in a few words, and for how many seconds; None for nothing.
        watched: Whether a thread of its own shows that the map lives while its input is slow.

    Attributes:
        failures: Items that failed, in the order of completion.
        origins: How many results came from where, failed ones included.
        busy: Seconds of work.
        interval: Seconds after which `tick` is to be called though nothing has ended; None for never.
        pulls: Whether the map waits for its input now.
    """

    emitter: Emitter
    total: int | None
    _: KW_ONLY
    on_result: Callable[[ItemResult], object] | None
    bar: Bar | None
    keeps: bool
    waits_for: Callable[[], tuple[str, float] | None] = lambda: None
    watched: bool = False

    def __post_init__(self) -> None:
        self._done = self._failed = 0
        self.failures: list[MapFailure] = []
        self.origins: Counter[str] = Counter()
        self.busy: float = 0.0
        self.interval: float | None = None
        self.pulls: bool = False
        self._closed = threading.Event()
        self._sends = self.emitter.active and self.emitter.wants(events.MapProgress)
        if self.bar is not None or self.emitter.active:
            self.interval = _IDLE
            self._began = self._sent = self._moved = ambient.clock().monotonic()
            self._sent_done = 0
            self._said = False

    def add(self, batch: Batch) -> None:
        """Count finished items."""
        self._done += len(batch.items)
        self.origins[batch.origin] += len(batch.items)
        for position, outcome in batch.odd.items():
            if outcome.error is None:
                continue
            self._failed += 1
            if self.keeps:
                failure = MapFailure(
                    index=batch.idx[position],
                    item=batch.items[position],
                    error=outcome.error,
                    attempts=outcome.attempts,
                    trace=outcome.trace,
                )
                self.failures.append(failure)
        if self.interval is not None:
            self._moved = ambient.clock().monotonic()
            self._show(self._moved)
        if self.on_result is not None:
            for n, (index, item) in enumerate(zip(batch.idx, batch.items, strict=True)):
                one = batch.outcome(n)
                self.on_result(
                    ItemResult(index, item, batch.values[n], one.error, one.attempts, batch.origin)
                )

    def watch(self) -> None:
        """Call `tick` in another thread while input that comes slowly blocks the map's own, where that is wanted."""
        if self.watched and self.interval is not None:
            run = contextvars.copy_context().run
            threading.Thread(target=run, args=(self._watch,), daemon=True).start()

    def _watch(self) -> None:
        while not self._closed.wait(_IDLE):
            if self.pulls:
                self.tick()

    def tick(self) -> None:
        """Show that the map lives although nothing has ended; only to be called where there is an `interval`."""
        now = ambient.clock().monotonic()
        waiting = None
        if now - self._moved >= _IDLE:
            waiting = self.waits_for() or (("input", 0.0) if self.pulls else None)
        if self.bar is not None and waiting is not None:
            self.bar.waits(waiting[0])
        self._show(now)
        standing = max(now - self._moved, 0.0 if waiting is None else waiting[1])
        if standing >= _LONG and not self._said and self.emitter.active:
            self._said = True
            self.emitter.emit(
                events.MapWaiting(
                    done=self._done,
                    total=self.total,
                    reason=None if waiting is None else waiting[0],
                    seconds=now - self._moved,
                )
            )

    def _show(self, now: float) -> None:
        if self.bar is not None:
            hits, resumed = self.origins["hit"], self.origins["resumed"]
            self.bar.show(self._done, failed=self._failed, cached=hits, resumed=resumed)
        if self._sends and now - self._sent >= _REFRESH and self._done != self._sent_done:
            self._send(now)

    def _send(self, now: float, *, finished: bool = False) -> None:
        self._sent, self._sent_done = now, self._done
        self.emitter.emit(
            events.MapProgress(
                done=self._done,
                total=self.total,
                failed=self._failed,
                cached=self.origins["hit"],
                seconds=now - self._began,
                finished=finished,
            )
        )

    def close(self) -> None:
        """Show the last state; only to be called where there is an `interval`."""
        self._closed.set()
        if self.bar is not None:
            self.bar.close()
        if self._sends:
            self._send(ambient.clock().monotonic(), finished=True)


# --- the bar --------------------------------------------------------------------------------------


_drawing = threading.RLock()
"""Bars are started and ended one after the other: neither library lets several threads do that at once."""


def make_bar(name: str, total: int | None, *, rich: bool = False) -> Bar | None:
    """Return a bar for a map, None where there is neither terminal nor notebook.

    Args:
        name: What it is called.
        total: Items of the input, None if that is unknown.
        rich: Whether to draw with rich.

    Raises:
        OperoUsageError: rich is wanted and not installed.
    """
    if worker_process or not (_at_terminal() or _in_notebook()):
        return None
    return _RichBar(name, total) if rich else _TqdmBar(name, total)


def _at_terminal() -> bool:
    # While rich draws, a proxy stands for the stream, which has not always answered for it.
    stream = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # it is closed
        return False


def _in_notebook() -> bool:
    """Return whether this is a notebook's kernel: its stderr is no terminal, but it can show widgets."""
    shell = sys.modules.get("IPython")
    running = shell.get_ipython() if shell is not None else None
    return running is not None and "IPKernelApp" in getattr(running, "config", {})


class Bar:
    """A progress bar: what is to be drawn, and when."""

    def __init__(self) -> None:
        self.began: float = monotonic()
        self.done: int = 0
        self._drawn = self.began
        self._counts: dict[str, int] = {}
        self._reason: str | None = None
        self._closed = False

    def show(self, done: int, **counts: int) -> None:
        """Show so many items as done, and of these some by what has become of them."""
        if done > self.done:
            self._reason = None
        self.done, self._counts = done, counts
        now = monotonic()
        if now - self._drawn >= _REFRESH:
            self._drawn = now
            with _drawing:
                if not self._closed:
                    self.draw()

    def waits(self, reason: str) -> None:
        """Show what the map waits for, until another item is done."""
        self._reason = reason

    def close(self) -> None:
        """Show the last state and end."""
        self._reason = None
        with _drawing:
            self._closed = True
            self.draw()
            self.end()

    def facts(self) -> dict[str, Any]:
        """Return what is worth showing beside the count, by its name."""
        facts: dict[str, Any] = {**self._counts, "waiting": self._reason}
        return {name: fact for name, fact in facts.items() if fact}

    def draw(self) -> None:
        """Draw it."""
        raise NotImplementedError

    def end(self) -> None:
        """Leave the last picture behind."""
        raise NotImplementedError


class _TqdmBar(Bar):
    """A bar of tqdm's: text on stderr, a widget in a notebook."""

    def __init__(self, name: str, total: int | None) -> None:
        with _drawing:
            kind = _tqdm(notebook=_in_notebook())
            self._bar: Any = kind(
                total=total, desc=name, unit="item", file=sys.stderr, dynamic_ncols=True
            )
            # Whatever tqdm's own delay is: the map is under way.
            self._bar.refresh()
        super().__init__()

    def draw(self) -> None:
        """Draw it."""
        self._bar.set_postfix(self.facts(), refresh=False)
        self._bar.update(self.done - self._bar.n)
        self._bar.refresh()

    def end(self) -> None:
        """Leave the last picture behind."""
        bar = self._bar
        if bar.gui:
            bar.close()
            return
        # tqdm would leave it among the others, which then draw over it or leave a copy of themselves behind.
        last = bar.format_meter(**{**bar.format_dict, "rate": None})
        bar.leave = False
        bar.close()
        # Which leaves the cursor where the line of a bar further down ended.
        bar.write(f"\r{last}", file=bar.fp)


@functools.cache
def _tqdm(*, notebook: bool) -> type[Any]:
    import warnings

    with warnings.catch_warnings():
        # It complains about missing notebook widgets, and then draws text.
        warnings.simplefilter("ignore")
        from tqdm import std

        base: Any = std.tqdm
        if notebook:
            # In text it is the same, but imports asyncio.
            from tqdm import auto

            base = auto.tqdm
    own = {
        # Its thread would keep a process map from forking, and outlive every bar.
        "monitor_interval": 0,
        # Of its two default locks the one for threads: the other one settles how multiprocessing starts processes.
        "_lock": getattr(std.tqdm, "_lock", None) or vars(std)["TqdmDefaultWriteLock"].th_lock,
    }
    return type("Bar", (base,), own)


class _RichBar(Bar):
    """A bar of rich's, in one picture with those of other maps.

    The picture is drawn here and under a lock. The thread with which rich would draw it can come between the parts of
    what is printed above, and would keep a process map from forking.
    """

    _running: ClassVar[Any] = None

    def __init__(self, name: str, total: int | None) -> None:
        super().__init__()
        with _drawing:
            new = _RichBar._running is None
            self._picture: Any = _rich_picture() if new else _RichBar._running
            self._task = self._picture.add_task(name, total=total, facts="")
            if new:
                self._picture.start()
                _RichBar._running = self._picture

    def draw(self) -> None:
        """Draw it."""
        facts = [f"{self.done / max(monotonic() - self.began, 1e-9):,.2f} item/s"]
        for name, fact in self.facts().items():
            facts.append(f"{name}: {fact}" if isinstance(fact, str) else f"{fact} {name}")
        self._picture.update(self._task, completed=self.done, facts=", ".join(facts))
        self._picture.refresh()

    def end(self) -> None:
        """Leave the last picture behind."""
        tasks = self._picture.tasks
        if len(tasks) == 1:
            _RichBar._running = None
            self._picture.stop()
            return
        own = self._picture.make_tasks_table([task for task in tasks if task.id == self._task])
        self._picture.remove_task(self._task)
        self._picture.console.print(own)
        self._picture.refresh()


def _rich_picture() -> Any:
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        from opero.errors import OperoUsageError

        raise OperoUsageError(
            'progress="rich" needs rich, which is not installed: pip install "opero[rich]"'
        ) from None
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[facts]}"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        auto_refresh=False,
    )
