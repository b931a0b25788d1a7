# this_file: src/opero/durable/map_items.py
"""Record the items of maps in a workflow as steps, so that a map goes on where it stopped.

The map takes one number of the line in which it was called; "4/17" is its item 17, and steps that the
mapped function takes for it are "4/17/1" and so on. Maps find this through `opero.concurrency.recorder`.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from opero.concurrency.executors.base import ItemOutcome
from opero.durable.records import RECORDED, StepRecord, StepState
from opero.durable.step import Scope, current, current_scope
from opero.durable.values import Parameters, encode, keepable, pack_error

if TYPE_CHECKING:
    from opero.concurrency.recorder import Finished

__all__ = ["ItemJournal", "record_map"]

_SIGNATURE: Final = inspect.signature(lambda item: item)


class ItemJournal:
    """The items of one map in a workflow's journal.

    Args:
        scope: The line in which the map was called.
        path: The map's place there.
        name: The mapped function.
    """

    blocking: bool = True

    def __init__(self, scope: Scope, path: str, name: str) -> None:
        self._scope = scope
        self._run = scope.run
        self._path = path
        self._name = name
        self._item = Parameters(_SIGNATURE, f"{name}()")
        self._attempts: dict[int, int] = {}
        # A stop waits for the items that are running.
        self._map = StepRecord(
            path=path, name=name, hash="", state=StepState.STARTED, began=time.time()
        )
        self._run.begin(self._map)

    def enter(self, index: int, item: Any, /) -> None:
        """Give an attempt at an item a line of steps of its own."""
        del item
        attempt = self._attempts[index] = self._attempts.get(index, 0) + 1
        scope = self._scope.branch(self._path, index)
        # The steps of the first attempt are recorded with their errors; the second takes them anew.
        current_scope.set(scope if attempt == 1 else scope.attempt(attempt))

    def find_known(self, idx: Sequence[int], items: Sequence[Any], /) -> Mapping[int, ItemOutcome]:
        """Return what is recorded of these items.

        Raises:
            NonDeterminismError: The journal has other items; the workflow is blocked.
            Unwind: The workflow is being put aside, so that no further item may begin, or an outcome cannot be
            rebuilt.
        """
        run, known = self._run, {}
        run.check()
        for index, item in zip(idx, items, strict=True):
            path = f"{self._path}/{index}"
            if path not in run.steps:
                continue
            found = run.find(path, self._name, self._digest(item))
            if found is not None and found.state in RECORDED:
                outcome, done = run.outcome(found), found.state is StepState.DONE
                value, error = (outcome, None) if done else (None, outcome)
                known[index] = ItemOutcome(value=value, error=error, attempts=0, calls=0)
        return known

    def keep(self, finished: Sequence[Finished], /) -> None:
        """Record what became of items, all of them in one transaction.

        Raises:
            UnserializableError: The journal cannot keep a result, or compare an item.
            Unwind: They are not recorded, or the workflow is being put aside.
        """
        run = self._run
        run.write_all([self._step(*one) for one in finished])
        run.check()

    def close(self) -> None:
        """Stop counting the map as running."""
        self._run.finish(self._map)

    def _step(self, index: int, item: Any, outcome: ItemOutcome) -> StepRecord:
        now = time.time()
        step = self._run.new_step(
            f"{self._path}/{index}",
            self._name,
            self._digest(item),
            state=StepState.DONE,
            attempts=max(1, outcome.attempts),
            ended=now,
        )
        if isinstance(outcome.error, Exception):
            # The first run gets the type that a replay will get.
            outcome.error = self._run.note_failure(keepable(outcome.error), step)
            step.state, step.value = StepState.FAILED, pack_error(outcome.error)
        else:
            step.value = encode(outcome.value, f"result of {self._name}() for item {index}")
        return step

    def _digest(self, item: Any) -> str:
        return self._item.digest((item,), {})


def record_map(name: str) -> ItemJournal | None:
    """Begin to record a map; None outside workflows, and where a cancelled one cleans up."""
    scope = current()
    if scope is None or scope.run.cancelling:
        return None
    scope.run.check()
    return ItemJournal(scope, scope.next_path(), name)
