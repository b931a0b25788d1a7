# this_file: src/opero/concurrency/progress.py
"""The progress bar: tqdm's, or rich's if asked, and nothing at all where nobody would see it."""

from __future__ import annotations

import sys
import threading
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from opero.concurrency.watch import Bar

__all__ = ["make_bar"]

_REFRESH: Final = 0.1
"""Seconds between two pictures."""

_drawing = threading.Lock()
"""tqdm's class sets itself up at its first use, and two threads may not do that at once."""


def make_bar(name: str, total: int | None, *, rich: bool = False) -> Bar | None:
    """Return a bar for a map, None where there is neither terminal nor notebook.

    Args:
        name: What it is called.
        total: Items of the input, None if nobody knows.
        rich: Whether to draw with rich.

    Raises:
        OperoUsageError: rich is wanted and not installed.
    """
    if not _seen():
        return None
    return _RichBar(name, total) if rich else _TqdmBar(name, total)


def _seen() -> bool:
    stream = sys.stderr
    try:
        if stream is not None and stream.isatty():
            return True
    except ValueError:  # it is closed
        return False
    # A notebook's stderr is no terminal, but it can show widgets.
    shell = sys.modules.get("IPython")
    running = shell.get_ipython() if shell is not None else None
    return running is not None and "IPKernelApp" in getattr(running, "config", {})


class _TqdmBar:
    """A bar of `tqdm.auto`: text on stderr, a widget in a notebook."""

    def __init__(self, name: str, total: int | None) -> None:
        import warnings

        with _drawing, warnings.catch_warnings():
            # It complains about missing notebook widgets, and then draws text.
            warnings.simplefilter("ignore")
            from tqdm.auto import tqdm

            self._bar: Any = tqdm(
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
        done, failed, hits, resumed = self._state
        told = {"failed": failed, "cached": hits, "resumed": resumed}
        with _drawing:
            self._bar.set_postfix({k: n for k, n in told.items() if n}, refresh=False)
            self._bar.update(done - self._bar.n)
            self._bar.refresh()

    def close(self) -> None:
        """Show the last state and end."""
        self._draw()
        with _drawing:
            self._bar.close()


class _RichBar:
    """A bar of rich's."""

    def __init__(self, name: str, total: int | None) -> None:
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
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._progress.start()
        self._task = self._progress.add_task(name, total=total, told="")

    def show(self, done: int, *, failed: int, hits: int, resumed: int) -> None:
        """Show so many items as done."""
        told = {"failed": failed, "cached": hits, "resumed": resumed}
        text = ", ".join(f"{n} {k}" for k, n in told.items() if n)
        self._progress.update(self._task, completed=done, told=text)

    def close(self) -> None:
        """Show the last state and end."""
        self._progress.stop()
