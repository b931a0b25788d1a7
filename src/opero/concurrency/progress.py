# this_file: src/opero/concurrency/progress.py
"""The progress bar: tqdm's, or rich's if asked, and nothing at all where nobody would see it.

Maps that run at the same time share the screen: each bar has a line of its own, and one that ends is written once above
those that go on.
"""

from __future__ import annotations

import functools
import sys
import threading
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar, Final

if TYPE_CHECKING:
    from opero.concurrency.watch import Bar

__all__ = ["hide_bars", "make_bar"]

_REFRESH: Final = 0.1
"""Seconds between two pictures."""

_drawing = threading.RLock()
"""Bars are begun and ended one after the other: neither library lets several threads do that at once."""
_hidden: list[bool] = []


def hide_bars() -> None:
    """Draw none in this process: it shares its terminal with the map that it works for."""
    _hidden.append(True)


def make_bar(name: str, total: int | None, *, rich: bool = False) -> Bar | None:
    """Return a bar for a map, None where there is neither terminal nor notebook.

    Args:
        name: What it is called.
        total: Items of the input, None if nobody knows.
        rich: Whether to draw with rich.

    Raises:
        OperoUsageError: rich is wanted and not installed.
    """
    if _hidden or not (_at_terminal() or _in_notebook()):
        return None
    return _RichBar(name, total) if rich else _TqdmBar(name, total)


def _at_terminal() -> bool:
    # While rich draws, something stands for the stream that did not always know what it stands for.
    stream = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # it is closed
        return False


def _in_notebook() -> bool:
    """Tell whether this is a notebook's kernel: its stderr is no terminal, but it can show widgets."""
    shell = sys.modules.get("IPython")
    running = shell.get_ipython() if shell is not None else None
    return running is not None and "IPKernelApp" in getattr(running, "config", {})


def _told(failed: int, hits: int, resumed: int) -> dict[str, int]:
    """Return what is worth telling of finished items, by its name."""
    counts = {"failed": failed, "cached": hits, "resumed": resumed}
    return {name: count for name, count in counts.items() if count}


class _TqdmBar:
    """A bar of tqdm's: text on stderr, a widget in a notebook."""

    def __init__(self, name: str, total: int | None) -> None:
        with _drawing:
            kind = _tqdm(notebook=_in_notebook())
            self._bar: Any = kind(
                total=total, desc=name, unit="item", file=sys.stderr, dynamic_ncols=True
            )
        self._drawn = monotonic()
        self._state: tuple[int, int, int, int] = (0, 0, 0, 0)

    def show(self, done: int, *, failed: int, hits: int, resumed: int) -> None:
        """Show so many items as done."""
        self._state = (done, failed, hits, resumed)
        now = monotonic()
        if now - self._drawn >= _REFRESH:
            self._drawn = now
            self._draw()

    def _draw(self) -> None:
        done, *more = self._state
        with _drawing:
            self._bar.set_postfix(_told(*more), refresh=False)
            self._bar.update(done - self._bar.n)
            self._bar.refresh()

    def close(self) -> None:
        """Show the last state and end."""
        with _drawing:
            self._draw()
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


class _RichBar:
    """A bar of rich's, in one picture with those of other maps.

    The picture is drawn here and under a lock. The thread with which rich would draw it can come between the parts of
    what is printed above, and would keep a process map from forking.
    """

    _running: ClassVar[Any] = None

    def __init__(self, name: str, total: int | None) -> None:
        self._began = self._drawn = monotonic()
        with _drawing:
            new = _RichBar._running is None
            self._picture: Any = _rich_picture() if new else _RichBar._running
            self._task = self._picture.add_task(name, total=total, told="")
            if new:
                self._picture.start()
                _RichBar._running = self._picture

    def show(self, done: int, *, failed: int, hits: int, resumed: int) -> None:
        """Show so many items as done."""
        now = monotonic()
        rate = done / max(now - self._began, 1e-9)
        told = [f"{rate:,.2f} item/s"]
        told += [f"{count} {name}" for name, count in _told(failed, hits, resumed).items()]
        self._picture.update(self._task, completed=done, told=", ".join(told))
        if now - self._drawn >= _REFRESH:
            self._drawn = now
            with _drawing:
                self._picture.refresh()

    def close(self) -> None:
        """Show the last state and end."""
        with _drawing:
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
    from opero.errors import OperoUsageError

    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        raise OperoUsageError(
            'progress="rich" needs rich, which is not installed: pip install "opero[rich]"'
        ) from None
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        auto_refresh=False,
    )
