# this_file: src/opero/testing/recording.py
"""Tests without network: calls are recorded once, and answered from the file ever after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from opero.testing.player import NotRecordedError, Player
from opero.testing.recorder import Recorder
from opero.testing.tape import read_tape
from opero.utils import ambient

if TYPE_CHECKING:
    import os

__all__ = ["NotRecordedError", "record", "replay"]


@contextmanager
def record(path: str | os.PathLike[str]) -> Iterator[None]:
    """Write down what the calls of all decorated functions give within the block, for `replay`.

    It holds for the whole process: in threads, tasks and maps, and also where the cache is off. What is
    written is what the caller gets at the end: a result, be it from the cache, or the last error. It
    is written at once, so that a block which breaks off leaves what was paid for.

    Args:
        path: The file; one that is there is written anew. Arguments are not in it, only a digest of
            those that are neither secret nor without content. Results are, so look at it before
            you share it.

    Example:
        >>> import tempfile
        >>> from opero import opero
        >>> from opero.testing import record, replay
        >>> @opero
        ... def price(item):
        ...     print("asking")
        ...     return {"tea": 3}[item]
        >>> path = tempfile.mkdtemp() + "/prices.jsonl"
        >>> with record(path):
        ...     price("tea")
        asking
        3
        >>> with replay(path):
        ...     price("tea")
        3
    """
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="\n") as stream:
        recorder = Recorder(stream)
        try:
            with _installed(recorder):
                yield
        finally:
            recorder.stop()


@contextmanager
def replay(path: str | os.PathLike[str]) -> Iterator[None]:
    """Answer the calls of all decorated functions within the block from a file, and call none of them.

    A function is known by its module and name, a call by its arguments. The outcomes of equal calls
    come in the order in which they were recorded. Where the cache is on, the last one also stands for
    all further calls; where it is off, each is given once. There are no pauses, no limits, no
    retries.

    Args:
        path: What `record` has written.

    Raises:
        NotRecordedError: A call was not recorded. It is raised by the call, and by the block too if
            something has swallowed it there.
        OperoUsageError: The file is no recording.
        FileNotFoundError: There is no file.
    """
    file = Path(path)
    player = Player(read_tape(file.read_text(encoding="utf-8"), file.name), file.name)
    with _installed(player):
        yield
    player.complain()


@contextmanager
def _installed(tape: ambient.Tape) -> Iterator[None]:
    before = ambient.install_tape(tape)
    try:
        yield
    finally:
        ambient.install_tape(before)
