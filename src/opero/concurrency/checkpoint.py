# this_file: src/opero/concurrency/checkpoint.py
"""The checkpoint of a map: results go to a file as they are there, and a later run takes them from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opero.caching.codec import Coder, Undecodable, Unencodable
from opero.caching.keying import Keying, function_id
from opero.concurrency.engine import Outcome
from opero.core.call import Call
from opero.errors import OperoUsageError, OperoWarning, UnkeyableError
from opero.utils.stack import users_stacklevel

if TYPE_CHECKING:
    from opero.concurrency.journal import Journal
    from opero.concurrency.mapper import Arguments
    from opero.concurrency.recorder import Finished
    from opero.core.function import FunctionInfo
    from opero.core.options import MapOptions

__all__ = ["Checkpoint", "MakeKey", "key_maker"]

MakeKey = Callable[["Arguments", Any], str]
"""From the arguments of a map and an item to the item's key."""


def key_maker(info: FunctionInfo, options: MapOptions) -> MakeKey:
    """Return what makes the keys of a function's items.

    A key is made of the function (its module or script, its name, what it closes over), `cache_version`, the item or
    what `item_key` makes of it, and the further arguments without those that `cache_ignore` names.
    """
    name: list[str] = []

    def prefix() -> str:
        if not name:
            name.append(function_id(info, options.cache_version) + ":")
        return name[0]

    keying = Keying(info, ignore=options.cache_ignore, prefix=prefix)
    identify = options.item_key

    def make(arguments: Arguments, item: Any) -> str:
        what = item if identify is None else identify(item)
        call = Call((*arguments.before, what, *arguments.after), dict(arguments.kwargs))
        try:
            # Arguments that do not fit are the function's to refuse.
            key = keying.key(call)
            return "" if key is None else str(key)
        except UnkeyableError as error:
            why = str(error).partition(". ")[0]
            raise OperoUsageError(
                f"checkpoint={options.checkpoint!r} cannot tell the items of {info.name}() apart: {why}. Say what an "
                "item is with item_key=…, and leave clients and the like out with cache_ignore=(…)."
            ) from error

    return make


class Checkpoint:
    """The results of one map in a file: an `ItemRecorder`.

    Args:
        name: The function's name, for messages.
        journal: The file.
        make_key: Makes the key of an item.
    """

    blocking = True

    def __init__(self, name: str, journal: Journal, make_key: Callable[[Any], str]) -> None:
        self._name = name
        self._journal = journal
        self._make_key = make_key
        self._coder = Coder()
        self._keys: dict[int, str] = {}
        self._warned = False

    def enter(self, index: int, item: Any) -> None:
        """Nothing: items run wherever they want."""

    def recall(self, idx: Sequence[int], items: Sequence[Any]) -> Mapping[int, Outcome]:
        """Return what an earlier run has written."""
        keys = {index: self._make_key(item) for index, item in zip(idx, items, strict=True)}
        written = self._journal.find([key for key in keys.values() if key])
        known: dict[int, Outcome] = {}
        for index, key in keys.items():
            blob = written.get(key)
            try:
                if blob is not None:
                    value = self._coder.decode(blob, key.encode())
                    known[index] = Outcome(value=value, attempts=0, calls=0)
                    continue
            except Undecodable:
                pass  # whoever has written it: the item is run again
            if key:
                self._keys[index] = key
        return known

    def keep(self, finished: Sequence[Finished]) -> None:
        """Write results; failures are tried again by the next run."""
        rows: list[tuple[str, bytes]] = []
        for index, _, outcome in finished:
            key = self._keys.pop(index, None)
            if key is None or outcome.error is not None or outcome.rejected:
                continue
            try:
                rows.append((key, b"".join(self._coder.encode(outcome.value, key.encode()))))
            except Unencodable as signal:
                self._warn(str(signal))
        if rows:
            self._journal.write(rows)

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._name}(): some results cannot be written to the checkpoint, so a later run computes "
                f"them again: {why}.",
                OperoWarning,
                stacklevel=users_stacklevel(),
            )

    def close(self) -> None:
        """Close the file."""
        self._keys.clear()
        self._journal.close()
