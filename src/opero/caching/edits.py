# this_file: src/opero/caching/edits.py
"""Telling that a function was edited since its entries were stored.

Its entries are kept, because a batch that is resumed after a small change must not pay twice; who
listens hears of it once. A digest of the source lies beside the entries.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from opero import events
from opero.core.function import unwrap_partial
from opero.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from opero.events.bus import Emitter

__all__ = ["Edits", "source_digest"]


def source_digest(fn: Any) -> bytes | None:
    """Return a digest of a function's source, None if there is none to be had.

    What stands before its `def` does not count: changing the options of a decorator is no edit.
    """
    named = unwrap_partial(fn)
    if not (inspect.isroutine(named) or inspect.isclass(named)):
        named = type(named).__call__
    code = getattr(named, "__code__", None)
    if code is not None and code.co_filename == "<string>":
        # Python 3.13 may take the program of `python -c` for it, from wherever the function came.
        return None
    try:
        lines, _ = inspect.getsourcelines(named)
    except (OSError, TypeError):
        return None
    for number, line in enumerate(lines):
        if line.lstrip().startswith(("def ", "async def ")):
            lines = lines[number:]
            break
    from hashlib import blake2b
    from textwrap import dedent

    text = dedent("".join(lines)).rstrip()
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest().encode()


class Edits:
    """Looks once in a process whether a function is the one whose entries lie in a store.

    Args:
        fn: The function.
        store: The `CodedStore` where the entries are.
        prefix: Gives what their keys begin with.
    """

    def __init__(self, fn: Any, store: Any, prefix: Callable[[], str]) -> None:
        self.looked: bool = False
        self._fn = fn
        self._store = store
        self._prefix = prefix

    def look(self, emitter: Emitter) -> None:
        """Compare with what the last process has left; a store that fails is left to the lookup."""
        self.looked = True
        now = source_digest(self._fn)
        if now is None:
            return
        key = f"~source:{self._prefix()}"
        try:
            backend = self._store.backend
            then = backend.get(key)
            if then == now:
                return
            backend.set(key, now, None)
        except StoreError:
            return
        if then is not None and emitter.active:
            emitter.emit(events.FunctionEdited(function=emitter.function))
